"""One weight file: what it says of its tensors, and any stretch of one's entries, with plain reads.

    .safetensors    8 bytes: length of the header | JSON header | raw tensors, contiguous, little-endian
    .bin .pt .pth   what torch.save wrote, opened by torch's restricted reader: tensors and plain values, never code

A safetensors file is not mapped: nothing larger than a piece is ever held. Whatever is wrong with a file is one
ValueError that names it.
"""

from __future__ import annotations

import json
import math
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "PICKLES", "Stored", "dtype_of", "read_header", "read_pickle"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt")
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in DTYPES.items()}
_POINTER = b"version https://git-lfs"
_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: shape, dtype, and where its bytes start; `mapped` of a pickle, and `entries`, which
    gives any stretch of a packed tensor, stand for the bytes."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    mapped: Tensor | None = None
    entries: Callable[[int, int], Tensor] | None = None

    @property
    def numel(self) -> int:
        """How many entries."""
        return math.prod(self.shape)

    def piece(self, start: int, stop: int, *, pin: bool = False) -> Tensor:
        """Entries start..stop of the flat tensor, read from the file; ValueError when it ends too early.

        pin: into pinned memory, from which a GPU copies without holding others up.
        """
        if self.mapped is not None:
            return self.mapped.reshape(-1)[start:stop].clone()
        if self.entries is not None:
            found = self.entries(start, stop)
            return found.pin_memory() if pin else found
        whole = torch.empty(stop - start, dtype=self.dtype, pin_memory=pin)
        if stop > start:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + start * self.dtype.itemsize)
                _fill(file, memoryview(whole.view(torch.uint8).numpy().data), self.file)
        return whole

    def read(self, *, pin: bool = False) -> Tensor:
        """The whole tensor."""
        return self.piece(0, self.numel, pin=pin).view(self.shape)


def dtype_of(name: str) -> torch.dtype:
    """The dtype that safetensors calls so.

    >>> dtype_of("BF16")
    torch.bfloat16
    """
    return _TORCH[name]


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a weight file in the order of their bytes, and its metadata.

    Raises FileNotFoundError for a file that is not there; ValueError for one that is foreign, damaged or cut short, a
    pointer of git-LFS, or holds a dtype that torch lacks.

    >>> tensors, metadata = read_header(Path("out/model/model.safetensors"))
    """
    _check_whole(file)
    if file.suffix in PICKLES:
        state = read_pickle(file)
        found = {name: each for name, each in state.items() if isinstance(each, Tensor)}
        return {name: Stored(file, each.dtype, tuple(each.shape), 0, each) for name, each in found.items()}, {}
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _LARGEST_HEADER:
                raise ValueError(f"{file} is not a complete safetensors file: it begins with no header; get it again")
            text = opened.read(length)
        header: dict[str, Any] = json.loads(text) if len(text) == length else {}
        metadata: dict[str, str] = header.pop("__metadata__", {})
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        found = {name: _stored(file, name, entry, 8 + length) for name, entry in entries}
        end = max((8 + length + entry["data_offsets"][1] for entry in header.values()), default=0)
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({type(error).__name__}: {error})") from error
    if end > size or not found:
        want = f" of {end:,}" if found else ""
        raise ValueError(f"{file} is not a complete safetensors file: it has {size:,} bytes{want}; download it again")
    return found, metadata


def read_pickle(file: Path) -> Mapping[str, Any]:
    """The mapping that torch.save wrote to a file, its tensors mapped; no code of it runs.

    Raises ValueError for a file that is damaged or holds something else, such as a whole pickled module.
    """
    _check_whole(file)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is a pickle of more than tensors, perhaps a whole module, and opening it could run code; write a "
            f"state dict instead: torch.save(model.state_dict(), path) ({_first_line(error)[:80]})"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{file} is damaged or not a file of torch.save ({_first_line(error)}); download or save it again"
        ) from None
    if not isinstance(found, Mapping):
        raise ValueError(
            f"{file} holds a {type(found).__name__}, not a state dict; write one: torch.save(model.state_dict(), path)"
        )
    return found


def _check_whole(file: Path) -> None:
    """Raise for what is not there, is empty, or stands for a file that was not downloaded."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there; download it again")
    with file.open("rb") as opened:
        start = opened.read(len(_POINTER))
    if start == _POINTER:
        raise ValueError(f"{file} is a git-LFS pointer, not the weights; run `git lfs pull` there, or download it")
    if not start:
        raise ValueError(f"{file} is not a complete {file.suffix[1:]} file: it is empty; download it again")


def _stored(file: Path, name: str, entry: Mapping[str, Any], base: int) -> Stored:
    if entry["dtype"] not in _TORCH:
        raise ValueError(f"{name!r} in {file} has dtype {entry['dtype']}, which torch has no plain tensors of")
    start, end = entry["data_offsets"]
    stored = Stored(file, _TORCH[entry["dtype"]], tuple(entry["shape"]), base + start)
    if end - start != stored.numel * stored.dtype.itemsize:
        raise ValueError(f"{name!r} in {file} has bytes {start} to {end}: the file is damaged; download it again")
    return stored


def _fill(file: Any, room: memoryview, path: Path) -> None:
    """Read until the room is full: a call gives at most 2 GiB."""
    filled = 0
    while filled < len(room):
        count = file.readinto(room[filled:])
        if not count:
            raise ValueError(f"{path} ends too early: it is not complete")
        filled += count


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
