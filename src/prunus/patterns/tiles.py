"""Patterns that choose whole tiles of a matrix: blocks of some rows and columns, or output rows."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.patterns.protocol import check_score, check_sparsity, cumulative, excluded, quoted
from prunus.patterns.selection import keep_largest, kept_of

__all__ = ["Block", "Rows"]


@dataclass(frozen=True)
class Block:
    """Whole tiles of `rows` x `columns` weights; a tile's score is the mean over its entries.

    The mean ranks as the sum does; over tiles of several sizes it compares what an entry is worth on average. A tile
    with an entry at -inf (pruned before) is -inf. Tiles are counted from the upper left corner and must cover the
    matrix; ties keep the tile that comes first, row by row.

    >>> Block(1, 2).mask(torch.tensor([[1.0, 4.0, 3.0, 3.0]]), 2).tolist()
    [[False, False, True, True]]
    """

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if operator.index(self.rows) < 1 or operator.index(self.columns) < 1:
            raise ValueError(f"A block has at least 1 row and 1 column; got {self.rows}x{self.columns}")

    def __str__(self) -> str:
        return f"block {self.rows}x{self.columns}"

    @property
    def width(self) -> int | None:
        """None: tiles of all columns are chosen together."""
        return None

    @property
    def sparsity(self) -> float | None:
        """None: any sparsity is possible, up to the size of a tile."""
        return None

    @property
    def by_row(self) -> bool:
        """False: all tiles of the matrix compete."""
        return False

    def counts(self, shape: tuple[int, int], sparsity: float | None, *, name: str = "this layer") -> int:
        """How many entries a (out, in) matrix keeps: `kept_of(tiles, sparsity)` tiles.

        Raises ValueError when the tiles do not cover the matrix.
        """
        share, unit = check_sparsity(self, sparsity), self.unit(shape, name=name)
        return kept_of(shape[0] * shape[1] // unit, share) * unit

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) bool of the best tiles with `kept` entries in all.

        score: (out, in) floating, higher is kept. Raises ValueError for NaN, a shape that the tiles do not cover, or a
        count that is not a multiple of a tile.
        """
        check_score(score, kept, name)
        _check_whole(self, (score.shape[0], score.shape[1]), kept, name)
        return self.choose(score, kept)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks."""
        return _choose_tiles(score, kept, self.rows, self.columns)

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """How many entries each block of columns keeps: shares of the tiles, rounded cumulatively.

        Raises ValueError when an edge cuts through tiles.
        """
        _check_whole(self, shape, kept, name)
        if any(edge % self.columns for edge in edges):
            raise ValueError(f"{self} cannot be chosen in steps of {edges[1]} columns; {self.columns} must divide them")
        unit = self.rows * self.columns
        return [unit * share for share in cumulative(kept // unit, shape[1], edges)]

    def unit(self, shape: tuple[int, int], *, name: str = "this layer") -> int:
        """rows * columns. Raises ValueError when the tiles do not cover the matrix."""
        if shape[0] % self.rows or shape[1] % self.columns:
            raise ValueError(
                f"{self} needs rows divisible by {self.rows} and columns by {self.columns}; {quoted(name)} is "
                f"{shape[0]}x{shape[1]}. Skip it with exclude=[{excluded(name)}]."
            )
        return self.rows * self.columns

    def pool(self, score: Tensor) -> Tensor:
        """(out, in) float32 or wider: at each entry the mean over its tile."""
        return _spread(_tile_means(score, self.rows, self.columns), self.rows, self.columns)


@dataclass(frozen=True)
class Rows:
    """Whole output rows: the neurons of a linear layer, the filters of a convolution. A row's score is its mean.

    What follows the row (its bias, the normalisation after it) stays.

    >>> Rows().mask(torch.tensor([[1.0, 4.0], [3.0, 3.0]]), 2).tolist()
    [[False, False], [True, True]]
    """

    def __str__(self) -> str:
        return "filters"

    @property
    def width(self) -> int | None:
        """None: rows span all columns."""
        return None

    @property
    def sparsity(self) -> float | None:
        """None: any sparsity is possible, up to the size of a row."""
        return None

    @property
    def by_row(self) -> bool:
        """False: rows compete."""
        return False

    def counts(self, shape: tuple[int, int], sparsity: float | None, *, name: str = "this layer") -> int:
        """How many entries a (out, in) matrix keeps: `kept_of(out, sparsity)` rows."""
        return kept_of(shape[0], check_sparsity(self, sparsity)) * shape[1]

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) bool of the best rows with `kept` entries in all; ties keep the row that comes first.

        score: (out, in) floating, higher is kept. Raises ValueError for NaN, or a count that is no multiple of a row.
        """
        check_score(score, kept, name)
        _check_whole(self, (score.shape[0], score.shape[1]), kept, name)
        return self.choose(score, kept)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks."""
        return _choose_tiles(score, kept, 1, score.shape[1])

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """[kept], for the one block that spans all columns.

        Raises ValueError for several blocks: each would choose rows of its own.
        """
        _check_whole(self, shape, kept, name)
        if len(edges) != 2:
            raise ValueError(
                f"{self} span all {shape[1]} columns of {quoted(name)} and cannot be chosen block by block: "
                f"set the blocksize to {shape[1]} or more, or prune by score"
            )
        return [kept]

    def unit(self, shape: tuple[int, int], *, name: str = "this layer") -> int:
        """The entries of a row, `in`."""
        return shape[1]

    def pool(self, score: Tensor) -> Tensor:
        """(out, in) float32 or wider: at each entry the mean over its row."""
        return _spread(_tile_means(score, 1, score.shape[1]), 1, score.shape[1])


def _check_whole(pattern: Block | Rows, shape: tuple[int, int], kept: int, name: str) -> None:
    unit = pattern.unit(shape, name=name)
    if kept % unit:
        raise ValueError(
            f"{pattern} keeps multiples of {unit} entries of {quoted(name)}, not {kept}: take counts from "
            "allocations.counts_under"
        )


def _tile_means(score: Tensor, rows: int, columns: int) -> Tensor:
    """(out / rows, in / columns) float32 or wider; a tile with +inf and -inf counts as -inf."""
    wide = score if score.dtype == torch.float64 else score.float()
    tiles = wide.reshape(score.shape[0] // rows, rows, score.shape[1] // columns, columns)  # (R, rows, C, columns)
    means = tiles.mean((1, 3))
    return means.masked_fill_(means.isnan(), -torch.inf)


def _spread(tiles: Tensor, rows: int, columns: int) -> Tensor:
    return tiles.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _choose_tiles(score: Tensor, kept: int, rows: int, columns: int) -> Tensor:
    return _spread(keep_largest(_tile_means(score, rows, columns), kept // (rows * columns)), rows, columns)
