"""How sparse a saved model is, tensor by tensor, read in bounded memory and without its code.

    W (out, in) --chunks of rows--> nonzeros of every group of 2, 4, 8, 16, of every row and every column --> pattern

Works on every checkpoint, ours or not: what counts is the zeros in the files.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.checkpoint import DTYPES, Stored, read_checkpoint
from prunus.machine import import_extra, read_json

__all__ = ["KEEPING", "Inspection", "Row", "inspect_model"]

KEEPING = ("F32", "F16", "BF16", "F64", "Q8_0", "Q5_0", "Q4_0", "Q6_K", "Q3_K")  # of GGUF: d * q, with a q that is 0

GROUPS: tuple[int, ...] = (2, 4, 8, 16)
_CHUNK = 2**24  # entries looked at together
_FULL = 1 / 3  # share of groups at the limit N below which N:M is chance: some group always holds the most
_WAYS = ("", " transposed")


@dataclass(frozen=True)
class Row:
    """One weight: its name in the file, shape, dtype, entries, zeros, and the pattern its zeros follow.

    pattern: "dense" (under 1 % zeros), "empty" (all zeros), "N:M" (at most N nonzeros in M consecutive weights along
    the last dimension, the input of a Linear), "N:M transposed" (along the one before, as in GPT-2's Conv1D),
    "row-uniform" (as many zeros in each row), "row-uniform transposed", or "unstructured".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    entries: int
    zeros: int
    pattern: str

    @property
    def sparsity(self) -> float:
        """Share of zeros."""
        return self.zeros / max(1, self.entries)


@dataclass(frozen=True)
class Inspection:
    """The weights of a saved model in the order of their names, and its totals.

    rows: tensors of two or more dimensions. entries, zeros: of all floating-point tensors, biases and norms included.
    info: the contents of prunus.json, or None for a model that Prunus did not save.
    """

    rows: tuple[Row, ...]
    entries: int
    zeros: int
    bytes: int
    info: dict[str, Any] | None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def sparsity(self) -> float:
        """Share of zeros over everything stored."""
        return self.zeros / max(1, self.entries)

    @property
    def pruned(self) -> tuple[Row, ...]:
        """The rows that are not dense."""
        return tuple(row for row in self.rows if row.pattern != "dense")

    @property
    def pruned_sparsity(self) -> float:
        """Share of zeros over the weights that are not dense; 0.0 when there are none."""
        return sum(r.zeros for r in self.pruned) / max(1, sum(r.entries for r in self.pruned))


def inspect_model(path: str | Path) -> Inspection:
    """Sparsity and pattern of every weight below `path`, a model folder or one weight file, GGUF too.

    Raises as `checkpoint.read_checkpoint`, and ValueError for files without a floating-point tensor.

    >>> inspection = inspect_model("out/model")
    >>> print(inspection.sparsity, [(row.name, row.pattern) for row in inspection.pruned])
    """
    if Path(path).suffix == ".gguf":
        return _of_gguf(Path(path))
    checkpoint = read_checkpoint(path)
    found = [
        _row(name, stored, DTYPES[stored.dtype])
        for name, stored in checkpoint.tensors.items()
        if stored.dtype.is_floating_point
    ]
    ours = checkpoint.path / "prunus.json"
    return _inspection(path, found, checkpoint.bytes, read_json(ours) if ours.is_file() else None)


def _inspection(path: str | Path, found: list[Row], size: int, info: dict[str, Any] | None) -> Inspection:
    entries, zeros = sum(row.entries for row in found), sum(row.zeros for row in found)
    if entries == 0:
        raise ValueError(f"{path} holds no floating-point tensor, so there is nothing to inspect")
    rows = sorted((row for row in found if len(row.shape) > 1), key=lambda row: _natural(row.name))
    return Inspection(tuple(rows), entries, zeros, size, info)


def _of_gguf(path: Path) -> Inspection:
    """Each tensor as its type gives it back, one after another; the names are the file's."""
    gguf = import_extra("gguf", "gguf", f"{str(path)!r} needs the extra")
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r}; give one that exists")
    try:
        tensors = gguf.GGUFReader(path).tensors
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{str(path)!r} is no GGUF file that opens ({error}); get it anew") from None
    found: list[Row] = []
    for each in tensors:
        values = gguf.quants.dequantize(each.data, each.tensor_type)
        found.append(_row(each.name, _Held(torch.tensor(values)), each.tensor_type.name))
    return _inspection(path, found, path.stat().st_size, None)


@dataclass(frozen=True)
class _Held:
    """A tensor in memory, read as one on disk is."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def numel(self) -> int:
        return self.tensor.numel()

    def read(self) -> Tensor:
        return self.tensor

    def piece(self, start: int, stop: int) -> Tensor:
        return self.tensor.flatten()[start:stop]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _row(name: str, stored: Stored | _Held, dtype: str) -> Row:
    shape, entries = stored.shape, stored.numel
    if len(shape) < 2 or entries == 0:
        return Row(name, shape, dtype, entries, entries - int(_nonzero(stored.read()).sum()), "dense")
    tally = _Tally(*_matrix_shape(shape))
    for matrix, start, chunk in _chunks(stored, shape):
        tally.add(_nonzero(chunk), matrix, start)
    return Row(name, shape, dtype, entries, entries - tally.nonzeros, tally.pattern())


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(matrices, rows, columns): a stack of experts for three dimensions, a flattened convolution for more."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    return 1, shape[0], math.prod(shape[1:])


def _chunks(stored: Stored | _Held, shape: tuple[int, ...]) -> Iterator[tuple[int, int, Tensor]]:
    """(matrix number, first row, (rows, columns) chunk); chunks begin at multiples of 16 rows."""
    matrices, rows, columns = _matrix_shape(shape)
    step = max(GROUPS[-1], _CHUNK // max(1, columns) // GROUPS[-1] * GROUPS[-1])
    for matrix in range(matrices):
        for start in range(0, rows, step):
            stop, before = min(rows, start + step), matrix * rows
            yield matrix, start, stored.piece((before + start) * columns, (before + stop) * columns).view(-1, columns)


def _nonzero(tensor: Tensor) -> Tensor:
    if tensor.element_size() == 1:  # float8: every bit but the sign
        return tensor.view(torch.uint8).bitwise_and(127) != 0
    return tensor != 0


class _Tally:
    """Counts of nonzeros of a stack of (rows, columns) matrices, along both directions."""

    def __init__(self, matrices: int, rows: int, columns: int) -> None:
        self.nonzeros = 0
        self.size = (matrices, rows, columns)
        # direction -> group size M -> how many groups hold 0, 1, .., M nonzeros
        self.groups = {way: {m: torch.zeros(m + 1, dtype=torch.int64) for m in GROUPS} for way in _WAYS}
        self.per_row = torch.zeros(matrices, rows, dtype=torch.int64)
        self.per_column = torch.zeros(matrices, columns, dtype=torch.int64)

    def add(self, nonzero: Tensor, matrix: int, start: int) -> None:
        """nonzero: (rows, columns) bool, rows `start` and on of the matrix."""
        across, along = nonzero.sum(1), nonzero.sum(0)
        self.nonzeros += int(across.sum())
        self.per_row[matrix, start : start + len(across)] = across
        self.per_column[matrix] += along
        self._count_groups("", nonzero)
        self._count_groups(" transposed", nonzero.t())

    def pattern(self) -> str:
        """The tightest description of where the zeros are."""
        total = math.prod(self.size)
        if self.nonzeros == 0:
            return "empty"
        if self.nonzeros > 0.99 * total:
            return "dense"
        for way, length in zip(_WAYS, (self.size[2], self.size[1]), strict=True):
            found = self._tightest(way, length)
            if found is not None:
                return f"{found[0]}:{found[1]}{way}"
        if _even(self.per_row):
            return "row-uniform"
        return "row-uniform transposed" if _even(self.per_column) else "unstructured"

    def _count_groups(self, way: str, nonzero: Tensor) -> None:
        counts = nonzero.to(torch.uint8)
        for size in GROUPS:
            if counts.shape[1] % 2:
                return
            counts = counts.unflatten(1, (-1, 2)).sum(2, dtype=torch.uint8)  # (rows, columns / size)
            self.groups[way][size] += torch.bincount(counts.flatten(), minlength=size + 1)

    def _tightest(self, way: str, length: int) -> tuple[int, int] | None:
        """(N, M) of the smallest share N/M, then the smallest M, that holds and is meant."""
        holding: list[tuple[float, int, int]] = []
        for size, histogram in self.groups[way].items():
            most = int(histogram.nonzero().max()) if histogram.any() else 0
            meant = histogram[most] >= _FULL * histogram.sum()
            if length % size == 0 and length > size and 0 < most < size and meant:
                holding.append((most / size, size, most))
        return (min(holding)[2], min(holding)[1]) if holding else None


def _even(counts: Tensor) -> bool:
    """Whether the rows of each matrix hold equally many nonzeros, up to the one that a remainder asks for."""
    return counts.shape[1] > 1 and bool(((counts.amax(1) - counts.amin(1)) <= 1).all())
