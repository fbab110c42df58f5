"""What a saved folder holds of the model and of its source: every tensor, or the reason why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from prunus.checkpoint import DTYPES, Checkpoint, Layout, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["account"]


def account(folder: Path, source: Path | None, model: PreTrainedModel | None) -> dict[str, dict[str, str]]:
    """`dropped`: tensor of the source that is not in `folder` -> why; `cast`: tensor -> the dtypes it had and has.

    A source whose weights are not there is not compared. Raises ValueError when a tensor of the model is in no file.
    """
    saved = read_checkpoint(folder)
    held = set() if model is None else _held(saved, model)
    found: dict[str, dict[str, str]] = {"dropped": {}, "cast": {}}
    try:
        origin = read_checkpoint(source) if source is not None else None
    except (ValueError, FileNotFoundError):
        origin = None
    if origin is None:
        return found
    targets = {} if model is None else Layout.of(model, origin.tensors).targets
    for name, each in origin.tensors.items():
        if name in saved.tensors:
            now = saved.tensors[name].dtype
            if now != each.dtype:
                found["cast"][name] = f"{DTYPES[each.dtype]} to {DTYPES[now]}"
        elif name not in targets:
            found["dropped"][name] = "no tensor of the model is made of it"
        elif targets[name] not in held:
            found["dropped"][name] = "tied: stored once, under another name"
    return found


def _held(saved: Checkpoint, model: PreTrainedModel) -> set[str]:
    """The names of the model's tensors that the saved ones make; ties make their other names without holding them."""
    on_meta = {name: torch.empty(each.shape, dtype=each.dtype, device="meta") for name, each in saved.tensors.items()}
    layout = Layout.of(model, on_meta)
    held = set(layout.made({name: on_meta[name] for name in layout.targets}))
    own = model.state_dict(keep_vars=True)
    there = {id(own[name]) for name in held if name in own}
    lost = [name for name, each in own.items() if id(each) not in there]
    if lost:
        raise ValueError(f"{lost[0]!r} and {len(lost) - 1} other tensors of the model are in no file that was saved")
    return held
