"""Patterns that choose single entries: anywhere in a matrix or a row, or some of every few columns."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from prunus.patterns.protocol import check_score, check_sparsity, cumulative, excluded, quoted
from prunus.patterns.selection import keep_largest, keep_largest_of_groups, keep_largest_of_row, kept_of

__all__ = ["NM", "Unstructured"]


@dataclass(frozen=True)
class Unstructured:
    """Any entries: the best of the whole matrix (`per="layer"`) or of every output row (`per="row"`).

    With rows, kept = q * out + r: the first r rows keep q + 1 entries, the others q.

    >>> Unstructured("row").mask(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 2).tolist()
    [[False, True], [False, True]]
    """

    per: Literal["row", "layer"]

    def __post_init__(self) -> None:
        if self.per not in ("row", "layer"):
            raise ValueError(f"Unstructured compares weights per 'row' or per 'layer', not per {self.per!r}")

    def __str__(self) -> str:
        return "unstructured"

    @property
    def width(self) -> int | None:
        """None: columns are not chosen in fixed groups."""
        return None

    @property
    def sparsity(self) -> float | None:
        """None: any sparsity is possible."""
        return None

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
        check_score(score, kept, name)
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
            return cumulative(kept, columns, edges)
        each, extra = divmod(kept, max(1, rows))
        shares = cumulative(each, columns, edges)
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

    @property
    def by_row(self) -> bool:
        """True: a group lies in one row."""
        return True

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
        check_score(score, kept, name)
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
                f"{self} needs columns divisible by {self.m}; {quoted(name)} has {columns}. "
                f"Skip it with exclude=[{excluded(name)}]."
            )

    def check_count(self, shape: tuple[int, int], kept: int, name: str) -> None:
        """Raise ValueError unless m divides the columns and `kept` is n/m of the entries."""
        self._check_columns(shape[1], name)
        exact = shape[0] * shape[1] // self.m * self.n
        if kept != exact:
            raise ValueError(
                f"{self} keeps exactly {exact} of {shape[0] * shape[1]} entries of {quoted(name)}, not {kept}: "
                "it goes with the uniform allocation only"
            )
