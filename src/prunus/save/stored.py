"""Safetensors read in pieces with plain reads: what a file says of its tensors, and any stretch of one's entries.

    8 bytes: length of the header | JSON header | raw tensors, contiguous, little-endian

The safetensors library maps whole files; here nothing larger than a piece is ever held or mapped.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.save.shards import _DTYPES, INDEX_NAME, SINGLE_NAME

__all__ = ["Stored", "read_header", "weight_files"]

_TORCH = {name: dtype for dtype, name in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """One tensor in a file: shape, dtype and where its bytes start."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """How many entries."""
        return math.prod(self.shape)

    def piece(self, start: int, stop: int) -> Tensor:
        """Entries start..stop of the flat tensor, read from the file; ValueError when it ends too early."""
        whole = torch.empty(stop - start, dtype=self.dtype)
        if stop > start:
            with self.file.open("rb", buffering=0) as file:
                file.seek(self.start + start * self.dtype.itemsize)
                if file.readinto(whole.view(torch.uint8).numpy().data) != whole.nbytes:
                    raise ValueError(f"{self.file} ends too early: it is not complete")
        return whole


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a checkpoint: a file itself, or those of a Hugging Face folder. Raises ValueError.

    >>> weight_files(Path("out/model"))
    [PosixPath('out/model/model.safetensors')]
    """
    if path.is_file():
        return [path]
    if (path / INDEX_NAME).is_file():
        index: dict[str, str] = json.loads((path / INDEX_NAME).read_text(encoding="utf-8"))["weight_map"]
        return [path / file for file in dict.fromkeys(index.values())]
    if (path / SINGLE_NAME).is_file():
        return [path / SINGLE_NAME]
    raise ValueError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}; name a safetensors file or such a folder")


def read_header(file: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and its metadata.

    Raises ValueError for a file that is missing, foreign, damaged or cut short, or holds a dtype that torch lacks.

    >>> tensors, metadata = read_header(Path("out/model/model.safetensors"))
    """
    size = file.stat().st_size if file.is_file() else 0
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            header: dict[str, Any] = json.loads(opened.read(length)) if 8 + length <= size else {}
        metadata: dict[str, str] = header.pop("__metadata__", {})
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        found: dict[str, Stored] = {}
        for name, entry in entries:
            if entry["dtype"] not in _TORCH:
                raise ValueError(f"{name!r} in {file} has dtype {entry['dtype']}, of which no mean is known")
            start, end = entry["data_offsets"]
            stored = Stored(file, _TORCH[entry["dtype"]], tuple(entry["shape"]), 8 + length + start)
            if end - start != stored.numel * stored.dtype.itemsize or 8 + length + end > size:
                raise ValueError(f"{name!r} in {file} has bytes {start} to {end}: the file is damaged or not complete")
            found[name] = stored
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({type(error).__name__}: {error})") from error
    if not found:
        raise ValueError(f"{file} is not a complete safetensors file: it has no tensors")
    return found, metadata
