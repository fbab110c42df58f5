"""The patterns, what every one promises, and masks of the scores |W_ij| * s_j under them.

`Unstructured` and `NM` choose single entries, `Pairs` twos, `Block` and `Rows` whole tiles of a matrix. Scores
|W_ij| * s_j (magnitude, Wanda) are never written down on a GPU: N:M and rows have programs in `kernels/` that multiply
while they select, so that the weight is read once and the mask written once. Any other pattern, and everything on a
CPU, goes by `pattern.mask` of the scores, with the same bits. How the largest scores are found is in `selection`.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from prunus.patterns.selection import (
    check_scores,
    goes_to_kernels,
    keep_largest,
    keep_largest_of_groups,
    keep_largest_of_row,
    kept_of,
    refuse_nan,
)


class Pattern(Protocol):
    """What a pattern's methods promise; shapes are (out, in), masks are bool, True is kept."""

    @property
    def width(self) -> int | None:
        """How many columns are chosen together, from the left (4 for 2:4); None when all are."""
        ...

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern fixes; None when it is free."""
        ...

    @property
    def by_row(self) -> bool:
        """Whether each row's mask depends on that row's scores alone, so that rows of two masks can be mixed."""
        ...

    def counts(self, shape: tuple[int, int], sparsity: float | None, *, name: str = "this layer") -> int:
        """How many entries a matrix keeps. Raises ValueError when shape or sparsity does not fit, naming `name`."""
        ...

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) of the best `kept` entries. Raises ValueError for NaN or a count that does not fit."""
        ...

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks, for inner loops: does not wait for the device, up to 4 million entries."""
        ...

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """How many entries each block of columns edges[i]..edges[i+1] keeps; the sum is exactly `kept`.

        edges: from 0 to in; each a multiple of `width` where the pattern has one.
        """
        ...

    def unit(self, shape: tuple[int, int], *, name: str = "this layer") -> int:
        """How many entries stand or fall together: counts are multiples of it. Raises ValueError as `counts`."""
        ...

    def pool(self, score: Tensor) -> Tensor:
        """The score (out, in) that each entry competes with in an allocation: the one that its unit is chosen by."""
        ...


def check_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    """The sparsity that will result: the given one, or the one that the pattern fixes.

    Raises ValueError for a sparsity outside [0, 1), one that contradicts the pattern by more than 0.001 (so that
    0.667 goes with 1:3), or a missing one where the pattern fixes none; and for the name of a pattern.

    >>> check_sparsity(NM(2, 4), None)
    0.5
    """
    if isinstance(pattern, str):
        raise ValueError(
            f"{pattern!r} is no pattern. A pattern is a value, such as NM(2, 4), which is 2:4, or Unstructured('row')"
        )
    if sparsity is not None:
        kept_of(0, sparsity)
    fixed = pattern.sparsity
    if fixed is None:
        if sparsity is None:
            raise ValueError(f"{pattern} needs a sparsity, the share of zeros in [0, 1)")
        return sparsity
    if sparsity is not None and abs(sparsity - fixed) > 1e-3:
        raise ValueError(
            f"{pattern} fixes the sparsity at {fixed:g}; got {sparsity:g}. Leave sparsity out, or set it to {fixed:g}"
        )
    return fixed


def check_count(score: Tensor, kept: int, name: str) -> None:
    """Raise ValueError unless the score is a matrix that has `kept` entries to keep."""
    if score.ndim != 2:
        raise ValueError(f"a score is a matrix (out, in); that of {_quoted(name)} has shape {tuple(score.shape)}")
    if not 0 <= operator.index(kept) <= score.numel():
        raise ValueError(f"cannot keep {kept} of the {score.numel()} entries of {_quoted(name)}")


@dataclass(frozen=True)
class Unstructured:
    """Any entries: the best of the whole matrix (`per="layer"`) or of every output row (`per="row"`).

    With rows, kept = q * out + r: the first r rows keep q + 1 entries, the others q.

    >>> Unstructured("row").mask(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2).tolist()
    [[False, True], [False, True]]
    """

    per: Literal["row", "layer"]
    width = sparsity = None  # columns are not chosen in fixed groups, and any sparsity is possible

    def __post_init__(self) -> None:
        if self.per not in ("row", "layer"):
            raise ValueError(f"Unstructured compares weights per 'row' or per 'layer', not per {self.per!r}")

    def __str__(self) -> str:
        return "unstructured"

    @property
    def by_row(self) -> bool:
        """Whether weights are compared within rows."""
        return self.per == "row"

    def counts(self, shape: tuple[int, int], sparsity: float | None, *, name: str = "this layer") -> int:
        """How many entries a (out, in) matrix keeps: `kept_of(out * in, sparsity)`."""
        return kept_of(shape[0] * shape[1], check_sparsity(self, sparsity))

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) bool of the best `kept` entries; ties keep the lower flat index.

        score: (out, in) floating, higher is kept. Raises ValueError for NaN, or kept outside 0..out*in.
        """
        _check_score(score, kept, name)
        return self.choose(score, kept)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks."""
        if self.per == "layer":
            return keep_largest(score, kept)
        return keep_largest_of_row(score, *divmod(kept, max(1, score.shape[0])))

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """How many entries each block of columns keeps: shares of the total, rounded cumulatively.

        With rows, every row gets the same share of a block, and the remainder goes to the first block with room, so
        that the blocks' masks together give each row its exact count.
        """
        rows, columns = shape
        if self.per == "layer":
            return _cumulative(kept, columns, edges)
        each, extra = divmod(kept, max(1, rows))
        shares = _cumulative(each, columns, edges)
        counts = [rows * share for share in shares]
        if extra:
            widths = [stop - start for start, stop in pairwise(edges)]
            roomy = next(i for i, (share, width) in enumerate(zip(shares, widths, strict=True)) if share < width)
            counts[roomy] += extra
        return counts

    def unit(self, shape: tuple[int, int], *, name: str = "this layer") -> int:
        """1: every entry by itself."""
        return 1

    def pool(self, score: Tensor) -> Tensor:
        """The score itself."""
        return score


@dataclass(frozen=True)
class NM:
    """At most `n` nonzeros in `m` consecutive weights along the input dimension; 0 < n < m.

    >>> NM(2, 4).mask(torch.tensor([[1.0, 4.0, 3.0, 2.0]]), 2).tolist()
    [[False, True, True, False]]
    """

    n: int
    m: int
    by_row = True  # a group lies in one row

    def __post_init__(self) -> None:
        if not 0 < operator.index(self.n) < operator.index(self.m):
            raise ValueError(f"N:M keeps N of M weights, 0 < N < M; got {self.n}:{self.m}")

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def width(self) -> int | None:
        """M: so many columns are chosen together."""
        return self.m

    @property
    def sparsity(self) -> float | None:
        """1 - N/M."""
        return 1 - self.n / self.m

    def counts(self, shape: tuple[int, int], sparsity: float | None = None, *, name: str = "this layer") -> int:
        """How many entries a (out, in) matrix keeps: n/m of them.

        Raises ValueError when `in` is not divisible by m, or a sparsity is given that is not 1 - n/m.
        """
        check_sparsity(self, sparsity)
        self._check_columns(shape[1], name)
        return shape[0] * shape[1] // self.m * self.n

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) bool of the best n of every m entries; ties keep the lower column.

        score: (out, in) floating, higher is kept. Raises ValueError for NaN, columns that m does not divide, or a
        count that is not n/m of the entries.
        """
        _check_score(score, kept, name)
        self.check_count((score.shape[0], score.shape[1]), kept, name)
        return self.choose(score, kept)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks; `kept` is implied."""
        return keep_largest_of_groups(score, self.n, self.m)

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """How many entries each block of columns keeps: n/m of it."""
        self.check_count(shape, kept, name)
        widths = [stop - start for start, stop in pairwise(edges)]
        return [shape[0] * width // self.m * self.n for width in widths]

    def unit(self, shape: tuple[int, int], *, name: str = "this layer") -> int:
        """1: within a group, every entry by itself."""
        return 1

    def pool(self, score: Tensor) -> Tensor:
        """The score itself."""
        return score

    def _check_columns(self, columns: int, name: str) -> None:
        if columns % self.m:
            raise ValueError(
                f"{self} needs columns divisible by {self.m}; {_quoted(name)} has {columns}. "
                f"Skip it with exclude=[{_excluded(name)}]."
            )

    def check_count(self, shape: tuple[int, int], kept: int, name: str) -> None:
        """Raise ValueError unless m divides the columns and `kept` is n/m of the entries."""
        self._check_columns(shape[1], name)
        exact = shape[0] * shape[1] // self.m * self.n
        if kept != exact:
            raise ValueError(
                f"{self} keeps exactly {exact} of {shape[0] * shape[1]} entries of {_quoted(name)}, not {kept}: "
                "it goes with the uniform allocation only"
            )


@dataclass(frozen=True)
class Pairs:
    """At most `n` of `m` consecutive pairs of weights along the input dimension hold nonzeros; 0 < n < m.

    2 of 4 pairs are 4:8 in twos: what tensor cores of NVIDIA's Blackwell multiply where numbers have four bits. A pair
    is worth the mean of its scores.

    >>> Pairs(1, 2).mask(torch.tensor([[5.0, 0.0, 3.0, 3.0]]), 2).tolist()
    [[False, False, True, True]]
    """

    n: int
    m: int
    by_row = True

    def __post_init__(self) -> None:
        NM(self.n, self.m)

    def __str__(self) -> str:
        return f"{self.n}:{self.m} pairs"

    @property
    def width(self) -> int | None:
        """2 M: so many columns are chosen together."""
        return 2 * self.m

    @property
    def sparsity(self) -> float | None:
        """1 - N/M."""
        return 1 - self.n / self.m

    def counts(self, shape: tuple[int, int], sparsity: float | None = None, *, name: str = "this layer") -> int:
        """How many entries a (out, in) matrix keeps: n/m of them. Raises ValueError as `NM.counts`, for 2 n of 2 m."""
        return self._alike.counts(shape, sparsity, name=name)

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) bool of the best n of every m pairs; ties keep the lower. Raises ValueError as `NM`."""
        _check_score(score, kept, name)
        self._alike.check_count((score.shape[0], score.shape[1]), kept, name)
        return self.choose(score, kept)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks; `kept` is implied."""
        return _spread(keep_largest_of_groups(_tile_means(score, 1, 2), self.n, self.m), 1, 2)

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """How many entries each block of columns keeps: n/m of it."""
        return self._alike.split(shape, kept, edges, name=name)

    def unit(self, shape: tuple[int, int], *, name: str = "this layer") -> int:
        """2: a pair."""
        return 2

    def pool(self, score: Tensor) -> Tensor:
        """(out, in) float32 or wider: at each entry the mean of its pair."""
        return _spread(_tile_means(score, 1, 2), 1, 2)

    @property
    def _alike(self) -> NM:
        """What has the same counts."""
        return NM(2 * self.n, 2 * self.m)


class _Tiles:
    """What patterns of whole tiles share: `tile` is how many rows and columns one has in a matrix of a shape."""

    width = sparsity = None  # tiles of all columns are chosen together, and any sparsity is possible
    by_row = False  # all tiles of the matrix compete

    def tile(self, shape: tuple[int, int], *, name: str = "this layer") -> tuple[int, int]:
        """Rows and columns of a tile. Raises ValueError when they do not cover the matrix."""
        raise NotImplementedError

    def unit(self, shape: tuple[int, int], *, name: str = "this layer") -> int:
        """The entries of a tile. Raises ValueError when the tiles do not cover the matrix."""
        return math.prod(self.tile(shape, name=name))

    def counts(self, shape: tuple[int, int], sparsity: float | None, *, name: str = "this layer") -> int:
        """How many entries a (out, in) matrix keeps: `kept_of(tiles, sparsity)` tiles.

        Raises ValueError when the tiles do not cover the matrix.
        """
        share, unit = check_sparsity(self, sparsity), self.unit(shape, name=name)
        return kept_of(shape[0] * shape[1] // unit, share) * unit

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) bool of the best tiles with `kept` entries in all; ties keep the tile that comes first.

        score: (out, in) floating, higher is kept. Raises ValueError for NaN, a shape that the tiles do not cover, or a
        count that is not a multiple of a tile.
        """
        _check_score(score, kept, name)
        self.check_whole((score.shape[0], score.shape[1]), kept, name)
        return self.choose(score, kept)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks."""
        rows, columns = self.tile((score.shape[0], score.shape[1]))
        return _spread(keep_largest(_tile_means(score, rows, columns), kept // (rows * columns)), rows, columns)

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """How many entries each block of columns keeps: shares of the tiles, rounded cumulatively.

        Raises ValueError when an edge cuts through tiles.
        """
        self.check_whole(shape, kept, name)
        columns, unit = self.tile(shape)[1], self.unit(shape)
        if any(edge % columns for edge in edges):
            raise ValueError(
                f"{self}: tiles of {columns} columns of {_quoted(name)} cannot be chosen in steps of {edges[1]}: set a "
                f"blocksize that {columns} divides, or prune by score"
            )
        return [unit * share for share in _cumulative(kept // unit, shape[1], edges)]

    def pool(self, score: Tensor) -> Tensor:
        """(out, in) float32 or wider: at each entry the mean over its tile."""
        rows, columns = self.tile((score.shape[0], score.shape[1]))
        return _spread(_tile_means(score, rows, columns), rows, columns)

    def check_whole(self, shape: tuple[int, int], kept: int, name: str) -> None:
        """Raise ValueError unless `kept` is a multiple of a tile."""
        unit = self.unit(shape, name=name)
        if kept % unit:
            raise ValueError(
                f"{self} keeps multiples of {unit} entries of {_quoted(name)}, not {kept}: take counts from "
                "allocations.counts_under"
            )


@dataclass(frozen=True)
class Block(_Tiles):
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

    def tile(self, shape: tuple[int, int], *, name: str = "this layer") -> tuple[int, int]:
        """(rows, columns). Raises ValueError when the tiles do not cover the matrix."""
        if shape[0] % self.rows or shape[1] % self.columns:
            raise ValueError(
                f"{self} needs rows divisible by {self.rows} and columns by {self.columns}; {_quoted(name)} is "
                f"{shape[0]}x{shape[1]}. Skip it with exclude=[{_excluded(name)}]."
            )
        return self.rows, self.columns


@dataclass(frozen=True)
class Rows(_Tiles):
    """Whole output rows: the neurons of a linear layer, the filters of a convolution. A row's score is its mean.

    What follows the row (its bias, the normalisation after it) stays.

    >>> Rows().mask(torch.tensor([[1.0, 4.0], [3.0, 3.0]]), 2).tolist()
    [[False, False], [True, True]]
    """

    def __str__(self) -> str:
        return "filters"

    def tile(self, shape: tuple[int, int], *, name: str = "this layer") -> tuple[int, int]:
        """(1, in)."""
        return 1, shape[1]


def parse(text: str, per: Literal["row", "layer"] = "row") -> Pattern:
    """The pattern that a recipe names: "unstructured" (compared per row or per layer), "N:M", "N:M pairs", "block RxC"
    or "filters".

    Raises ValueError for anything else.

    >>> parse("2:4")
    NM(n=2, m=4)
    """
    if text == "unstructured":
        return Unstructured(per)
    if text == "filters":
        return Rows()
    if tile := re.fullmatch(r"block (\d+)x(\d+)", text):
        return Block(int(tile[1]), int(tile[2]))
    match = re.fullmatch(r"(\d+):(\d+)( pairs)?", text)
    if match is None:
        raise ValueError(
            f"Pattern {text!r} is not N:M (2:4 keeps 2 of 4 consecutive weights; '2:4 pairs' 2 of 4 pairs), not "
            "'unstructured', not 'block RxC' "
            "(block 4x4 prunes tiles of 4 rows and 4 columns) and not 'filters'"
        )
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise ValueError(f"Pattern {text!r} must keep N of M weights with 0 < N < M, as 2:4 does")
    return Pairs(n, m) if match[3] else NM(n, m)


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """|W_ij| * s_j, or |W_ij| without a scale: (out, in) float32, contiguous, so that sums over it are always the same.

    >>> scaled(torch.tensor([[-2.0, 1.0]]), torch.tensor([5.0, 1.0])).tolist()
    [[10.0, 1.0]]
    """
    size = weight.abs().float().contiguous()
    return size if scale is None else size.mul_(scale)


@singledispatch
def mask_scaled(
    pattern: Pattern, weight: Tensor, scale: Tensor | None, kept: int, *, name: str = "this layer"
) -> Tensor:
    """The mask (out, in) bool that the pattern makes of the scores |W_ij| * s_j.

    weight: (out, in) floating. scale: (in,) float32, nothing negative, on the weight's device; None is 1.
    Raises ValueError as `pattern.mask`.

    >>> mask_scaled(NM(1, 2), torch.tensor([[-2.0, 3.0]]), torch.tensor([5.0, 1.0]), 1).tolist()
    [[True, False]]
    """
    return pattern.mask(scaled(weight, scale), kept, name=name)


@mask_scaled.register
def _(pattern: NM, weight: Tensor, scale: Tensor | None, kept: int, *, name: str = "this layer") -> Tensor:
    if not goes_to_kernels(weight):
        return pattern.mask(scaled(weight, scale), kept, name=name)
    from prunus.kernels import keep_of_groups

    check_count(weight, kept, name)
    pattern.check_count((weight.shape[0], weight.shape[1]), kept, name)
    return _checked(keep_of_groups(weight, pattern.n, pattern.m, absolute=True, scale=scale), name)


@mask_scaled.register
def _(pattern: Unstructured, weight: Tensor, scale: Tensor | None, kept: int, *, name: str = "this layer") -> Tensor:
    check_count(weight, kept, name)
    if pattern.per == "row" and goes_to_kernels(weight):
        from prunus.kernels import keep_of_rows, takes_rows

        if takes_rows(weight):
            each, extra = divmod(kept, max(1, weight.shape[0]))
            return _checked(keep_of_rows(weight, each, extra, absolute=True, scale=scale), name)
    return pattern.mask(scaled(weight, scale), kept, name=name)


def _check_score(score: Tensor, kept: int, name: str) -> None:
    """Raise ValueError unless the score is a floating matrix without NaN that has `kept` entries to keep."""
    check_count(score, kept, name)
    check_scores(score, f"the score of {_quoted(name)}")


def _quoted(name: str) -> str:
    """The layer's name as messages have it."""
    return name if name == "this layer" else f"'{name}'"


def _excluded(name: str) -> str:
    """What to write into `exclude` for the layer, and those of its name in the other blocks."""
    return "its name" if name == "this layer" else '"' + re.split(r"\.\d+\.", name)[-1] + '"'


def _cumulative(kept: int, columns: int, edges: Sequence[int]) -> list[int]:
    """Shares of `kept` proportional to block widths, whose partial sums are the rounded exact ones."""
    sums = [(2 * kept * edge + columns) // (2 * columns) for edge in edges]
    return [stop - start for start, stop in pairwise(sums)]


def _tile_means(score: Tensor, rows: int, columns: int) -> Tensor:
    """(out / rows, in / columns) float32 or wider; a tile with +inf and -inf counts as -inf."""
    wide = score if score.dtype == torch.float64 else score.float()
    tiles = wide.reshape(score.shape[0] // rows, rows, score.shape[1] // columns, columns)  # (R, rows, C, columns)
    means = tiles.mean((1, 3))
    return means.masked_fill_(means.isnan(), -torch.inf)


def _spread(tiles: Tensor, rows: int, columns: int) -> Tensor:
    return tiles.repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _checked(found: tuple[Tensor, Tensor], name: str) -> Tensor:
    mask, nans = found
    refuse_nan(int(nans), mask.numel(), f"the score of {_quoted(name)}")
    return mask
