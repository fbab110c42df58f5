"""Weights packed by their zeros: a bit for each entry, and the entries that are not zero. Exact, and smaller.

    packed.safetensors, or shards and an index     NAME        the tensor, or its nonzeros in order
                                                   NAME.bits   8 entries a byte, lowest bit first; 1 is a nonzero
    packed.json                                    what each tensor was: dtype, shape, nonzeros, how it is stored

    bytes / dense bytes = kept + 1 / (8 itemsize)      60 % zeros in 16 bits: 0.4 + 0.0625 = 0.4625

The four bits that a group of 2:4 takes are as many as its two places would. A zero is an entry all of whose bits are 0:
-0.0 stays what it is. What would not become smaller is stored as it was. zstd compresses what is left, each byte of the
entries apart: their exponents are much alike, their mantissas are not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import torch
from torch import Tensor

from prunus.checkpoint.stored import DTYPES, Stored, dtype_of, read_header
from prunus.machine import read_json
from prunus.masks import pack, unpack

__all__ = ["PACKED_NAME", "nonzero", "pack_tensor", "read_packed"]

PACKED_NAME = "packed.json"
FORMAT = 1
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an entry -> what holds its bits


@dataclass(frozen=True)
class _Packed:
    """Where the entries of a packed tensor lie. bits: None where all are stored; count: how many are."""

    values: Stored
    bits: Stored | None
    count: int
    zstd: bool
    dtype: torch.dtype
    numel: int

    def piece(self, start: int, stop: int) -> Tensor:
        """Entries start..stop of the flat tensor."""
        if self.bits is None:
            return self._values(start, stop)
        first, end = start // 8, -(-stop // 8)
        before, bits = self._bits(0, first), self._bits(first, end)
        inside = unpack(bits, min(self.numel, 8 * end) - 8 * first)
        kept = inside[start - 8 * first : stop - 8 * first]
        skipped = int(unpack(before, 8 * first).sum()) + int(inside[: start - 8 * first].sum())
        found = torch.zeros(stop - start, dtype=self.dtype)
        _as_bits(found)[kept] = _as_bits(self._values(skipped, skipped + int(kept.sum())))
        return found

    def _values(self, start: int, stop: int) -> Tensor:
        if not self.zstd:
            return self.values.piece(start, stop)
        size = self.dtype.itemsize
        planes = _expanded(self.values, self.count * size).view(size, self.count)
        return planes[:, start:stop].t().flatten().clone(memory_format=torch.contiguous_format).view(self.dtype)

    def _bits(self, start: int, stop: int) -> Tensor:
        assert self.bits is not None
        return _expanded(self.bits, -(-self.numel // 8))[start:stop] if self.zstd else self.bits.piece(start, stop)


def pack_tensor(name: str, tensor: Tensor, *, zstd: bool) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is stored of a tensor, by name, and what packed.json says of it.

    >>> pack_tensor("w", torch.tensor([0.0, 0.0, 3.0, 0.0]), zstd=False)[0]
    {'w': tensor([3.]), 'w.bits': tensor([4], dtype=torch.uint8)}
    """
    flat = tensor.detach().cpu().reshape(-1)
    kept = nonzero(flat)
    count = int(kept.sum())
    smaller = count * flat.element_size() + -(-flat.numel() // 8) < flat.nbytes
    said = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "bits": smaller, "zstd": zstd}
    stored = {name: _as_bits(flat)[kept].view(flat.dtype), f"{name}.bits": pack(kept)} if smaller else {name: flat}
    if zstd:
        stored = {key: _compressed(each) for key, each in stored.items()}
    elif not smaller:
        stored[name] = tensor
    return stored, said | {"count": count if smaller else flat.numel()}


def nonzero(tensor: Tensor) -> Tensor:
    """Which entries have a bit that is not 0; -0.0 has."""
    return _as_bits(tensor) != 0


def _as_bits(tensor: Tensor) -> Tensor:
    """The same memory as integers, which every operation takes."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def read_packed(folder: Path, files: Sequence[Path]) -> dict[str, Stored]:
    """Name -> tensor of a packed folder, which unpacks what is read of it.

    Raises ValueError for a packed.json of a newer version, or one that its weight files do not fit.
    """
    said = read_json(folder / PACKED_NAME)
    if not isinstance(said, Mapping) or said.get("format") != FORMAT:
        raise ValueError(f"{folder / PACKED_NAME} is of no format that this Prunus reads ({FORMAT}); use a newer one")
    parts = {name: each for file in files for name, each in read_header(file)[0].items()}
    try:
        return {name: _stored(name, each, parts) for name, each in said["tensors"].items()}
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: {PACKED_NAME} and the weight files are not of one model ({error}); get it again"
        ) from None


def _stored(name: str, said: Mapping[str, Any], parts: Mapping[str, Stored]) -> Stored:
    bits = parts[f"{name}.bits"] if said["bits"] else None
    dtype, shape = dtype_of(said["dtype"]), tuple(said["shape"])
    packed = _Packed(parts[name], bits, said["count"], said["zstd"], dtype, math.prod(shape))
    return Stored(parts[name].file, dtype, shape, 0, entries=packed.piece)


def _compressed(flat: Tensor) -> Tensor:
    planes = flat.view(torch.uint8).view(-1, flat.element_size()).t().contiguous()
    found = pyarrow.compress(planes.numpy(), codec="zstd", asbytes=True)
    return torch.frombuffer(bytearray(found), dtype=torch.uint8) if found else flat.new_zeros(0, dtype=torch.uint8)


def _expanded(stored: Stored, size: int) -> Tensor:
    """The bytes of a compressed tensor, (size,) uint8. Raises ValueError for damage."""
    if not size:
        return torch.zeros(0, dtype=torch.uint8)
    try:
        found = pyarrow.decompress(stored.read().numpy(), size, codec="zstd", asbytes=True)
    except OSError as error:
        raise ValueError(f"{stored.file} is damaged ({error}); get it again") from None
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)
