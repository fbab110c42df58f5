"""Folders whose weights are packed by their zeros, and the ordinary folders that they were; see `checkpoint.packed`.

    ordinary folder ─ pack ─▶ packed folder ─ unpack ─▶ the same weights, masks, config and tokenizer
                                          └─ load_model ─▶ a model, without a folder between

A mask that is the nonzeros of its weight is not stored twice: packed.json says whose bits are masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from prunus.checkpoint import (
    PACKED_NAME,
    Checkpoint,
    check_causal,
    empty_model,
    nonzero,
    pack_tensor,
    read_checkpoint,
    read_config,
)
from prunus.machine import read_json, without_bars, write_json
from prunus.masks import Masks
from prunus.save.shards import ShardWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Packing", "load_model", "loaded_model", "pack_", "unpack_"]

Packing = bool | Literal["zstd"]
_STEM = "packed"


def pack_(folder: Path, packed: Packing, masks: Masks | None, max_shard_bytes: float = 4e9) -> bool:
    """Put packed weights in the place of a folder's own, one tensor at a time; whether the masks are among them.

    What was written is read back and compared before the folder's own weights go. Raises OSError where it differs.
    """
    dense = read_checkpoint(folder)
    said: dict[str, Any] = {}
    with ShardWriter(folder, stem=_STEM, max_shard_bytes=max_shard_bytes) as writer:
        for name, each in dense.tensors.items():
            stored, said[name] = pack_tensor(name, each.read(), zstd=packed == "zstd")
            for key, part in stored.items():
                writer.write(key, part)
    within = _are_nonzeros(masks, dense, said)
    names = list(masks) if masks is not None and within else []
    write_json(folder / PACKED_NAME, {"format": 1, "tensors": said, "masks": names})
    _check_same(dense, read_checkpoint(folder))
    for file in dense.files:
        file.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return within


def unpack_(packed: Checkpoint, folder: Path, max_shard_bytes: float = 4e9) -> None:
    """Write the weights of a packed folder, and the masks that are among them, into another as ordinary ones."""
    with ShardWriter(folder, max_shard_bytes=max_shard_bytes) as writer:
        for name, each in packed.tensors.items():
            writer.write(name, each.read())
    names: Sequence[str] = read_json(packed.path / PACKED_NAME)["masks"]
    if names:
        Masks({name: nonzero(packed.tensors[name].read()) for name in names}).save(folder / "masks.safetensors")


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model of a packed or ordinary folder on the CPU, in eval mode; dtype: None is its own.

    Raises FileNotFoundError and ValueError for folders that hold no such model; see `checkpoint.check_causal`.

    >>> load_model("out/model")
    """
    checkpoint = read_checkpoint(folder)
    config = read_config(checkpoint.folder)
    model = empty_model(config, dtype or checkpoint.dtype(config))
    check_causal(checkpoint, model)
    return loaded_model(checkpoint, model)


def loaded_model(checkpoint: Checkpoint, empty: Any, **options: Any) -> Any:
    """The model that `empty` is made for, with the weights of a checkpoint. options: of from_pretrained."""
    options = {"dtype": empty.dtype, **options}
    with without_bars():
        if not checkpoint.is_packed:
            return type(empty).from_pretrained(str(checkpoint.folder), **options).eval()
        state = {name: each.read() for name, each in checkpoint.tensors.items()}
        return type(empty).from_pretrained(None, config=empty.config, state_dict=state, **options).eval()


def _are_nonzeros(masks: Masks | None, dense: Checkpoint, said: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether every mask is the nonzeros of the stored weight of its name."""
    return masks is not None and all(
        name in said
        and said[name]["bits"]
        and dense.tensors[name].shape == mask.shape
        and torch.equal(nonzero(dense.tensors[name].read()), mask.cpu())
        for name, mask in masks.items()
    )


def _check_same(dense: Checkpoint, packed: Checkpoint) -> None:
    for name, each in dense.tensors.items():
        one, other = each.read(), packed.tensors[name].read()
        if one.shape != other.shape or not torch.equal(*(part.reshape(-1).view(torch.uint8) for part in (one, other))):
            raise OSError(f"{name!r} was not written as it is; the disk may be failing")
