"""Saved models on the Hugging Face hub, whole and with their card."""

from __future__ import annotations

from pathlib import Path

from prunus.save.folder import CARD_NAME, check_whole


def push_to_hub(
    folder: str | Path, repository: str, *, private: bool | None = None, token: str | None = None, message: str = ""
) -> str:
    """The address of a saved model on the hub, after its folder was uploaded as it is: weights, masks, model card.

    repository: "owner/name", made if it is not there. private: of a new one. token: by default that of `hf auth login`.
    Raises ValueError, before anything is sent, for a folder that is damaged or without a card, FileNotFoundError for
    one that Prunus did not save, and what huggingface_hub raises.

    >>> push_to_hub("out/model", "me/opt-125m-sparse")  # doctest: +SKIP
    """
    check_whole(folder)
    if not (Path(folder) / CARD_NAME).is_file():
        raise ValueError(f"{folder} has no {CARD_NAME}: write what the model is before it is shared")
    from huggingface_hub import HfApi

    hub = HfApi(token=token)
    hub.create_repo(repository, private=private, exist_ok=True)
    said = message or "Upload a sparse model made with Prunus"
    done = hub.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=said)
    return str(done.repo_url)
