"""Config and tokenizer of a model: from a folder, or the hub's snapshot of a name. Nothing ever asks."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from prunus.checkpoint.folder import ADAPTER, ADAPTER_TENSORS, INDEX_NAME, SINGLE_NAME
from prunus.machine import read_json

__all__ = ["download_weights", "hub_folder", "read_config", "read_tokenizer"]

_SMALL = [
    "*.json", "*.txt", "*.model", "*.tiktoken", "*.codes", "*.spm", "*.jinja", "*.py",
    "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
]  # fmt: skip
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@lru_cache(maxsize=8)
def hub_folder(name: str) -> Path:
    """The local snapshot of a model of the Hugging Face hub, with all but its weights; ValueError if there is none."""
    return _snapshot(name, _SMALL)


def download_weights(name: str) -> Path:
    """The local snapshot of a model of the hub with the weights that count; pickles only where it has nothing else."""
    folder = hub_folder(name)
    for single, index in ((SINGLE_NAME, INDEX_NAME), _PICKLED):
        shards = dict(read_json(folder / index)["weight_map"]).values() if (folder / index).is_file() else [single]
        wanted = sorted(set(shards))
        if not all((folder / each).is_file() for each in wanted):
            folder = _snapshot(name, [*_SMALL, *wanted])
        if (folder / wanted[0]).is_file():
            break
    return folder


def read_config(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The config of the model in a folder, with no code of its own run unless that is trusted.

    Raises ValueError for a folder without config.json, one that transformers does not know, one that needs code, an
    adapter without its model, and GGUF files without their name.
    """
    from transformers import AutoConfig

    found = next((name for name in (ADAPTER, ADAPTER_TENSORS) if (path / name).is_file()), None)
    if found is not None and not (path / "config.json").is_file():
        raise ValueError(
            f"model: {str(path)!r} is an adapter alone ({found}): load its model, merge it (`prunus merge MODEL "
            "ADAPTER OUT`, or peft's merge_and_unload and save_pretrained), and give that folder"
        )
    if (path / "model" / "config.json").is_file() and not (path / "config.json").is_file():
        raise ValueError(f"model: {str(path)!r} is the folder of a run; give its model, {str(path / 'model')!r}")
    quantised = sorted(each.name for each in path.glob("*.gguf"))
    if quantised and not (path / "config.json").is_file():
        raise ValueError(
            f"model: {str(path)!r} holds no config.json; of what lies there ({', '.join(quantised[:3])}) name one file"
        )
    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"model: {str(path)!r} needs code of its own (auto_map in its config.json); if you trust that code, "
                "set trust_remote_code: true"
            ) from None
        why = " ".join(str(error).split())
        raise ValueError(f"model: {str(path)!r} has no config that opens ({why}); get the model again") from error


def read_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of the model in a folder. Raises ValueError where there is none that opens.

    For a folder without one transformers may make a blank one, to which each text is nothing, or unknown words.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(str(path), trust_remote_code=trust_remote_code)
        if len(found) <= len(set(found.all_special_ids)):
            raise ValueError("it has special tokens alone")
        return found
    except Exception as error:  # the tokenizers library raises Exception itself
        if isinstance(error, ImportError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model: {str(path)!r} has no tokenizer that opens ({reason}); copy the model's own there"
        ) from error


def _snapshot(name: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"model: {name!r} is neither a model folder nor a hub name that opens ({reason})") from error
