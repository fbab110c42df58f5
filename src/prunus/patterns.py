"""Where zeros may lie in a matrix (out, in), and the exact mask for a score under each pattern.

    Unstructured("layer")   any `kept` entries of the matrix
    Unstructured("row")     the same number in every output row (the first rows take the remainder)
    NM(n, m)                at most n nonzeros in m consecutive weights along the input dimension: 2:4 keeps 2 of 4.
                            Others count the zeros; for 2:4 that is the same, for 1:4 it is not.

A new pattern is one frozen dataclass with these methods. How the largest scores are found is in `selection.py`, how
many entries each layer keeps in `allocations.py`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

from torch import Tensor

from prunus.selection import check_scores, keep_largest, keep_largest_of_group, keep_largest_of_row, kept_of

__all__ = ["NM", "Pattern", "Unstructured", "check_sparsity", "kept_of", "parse"]


class Pattern(Protocol):
    """What `counts`, `mask` and `split` promise; shapes are (out, in), masks are bool, True is kept."""

    @property
    def width(self) -> int | None:
        """How many columns are chosen together, from the left (4 for 2:4); None when all are."""
        ...

    @property
    def sparsity(self) -> float | None:
        """The share of zeros that the pattern fixes; None when it is free."""
        ...

    def counts(self, shape: tuple[int, int], sparsity: float | None, *, name: str = "this layer") -> int:
        """How many entries a matrix keeps. Raises ValueError when shape or sparsity does not fit, naming `name`."""
        ...

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) of the best `kept` entries. Raises ValueError for NaN or a count that does not fit."""
        ...

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks, for inner loops: does not wait for the device."""
        ...

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """How many entries each block of columns edges[i]..edges[i+1] keeps; the sum is exactly `kept`.

        edges: from 0 to in; each a multiple of `width` where the pattern has one.
        """
        ...


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

    def counts(self, shape: tuple[int, int], sparsity: float | None, *, name: str = "this layer") -> int:
        """How many entries a (out, in) matrix keeps: `kept_of(out * in, sparsity)`."""
        return kept_of(shape[0] * shape[1], check_sparsity(self, sparsity))

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        """The mask (out, in) bool of the best `kept` entries; ties keep the lower flat index.

        score: (out, in) floating, higher is kept. Raises ValueError for NaN, or kept outside 0..out*in.
        """
        _check(score, kept, name)
        return self.choose(score, kept)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks."""
        if self.per == "layer":
            return keep_largest(score, kept)
        each, extra = divmod(kept, max(1, score.shape[0]))
        mask = keep_largest_of_row(score, each)
        if extra:
            mask[:extra] = keep_largest_of_row(score[:extra], each + 1)
        return mask

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
        _check(score, kept, name)
        self._check_count((score.shape[0], score.shape[1]), kept, name)
        return self.choose(score, kept)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        """`mask` without its checks; `kept` is implied."""
        rows, columns = score.shape
        groups = score.reshape(rows, columns // self.m, self.m)  # (out, groups, m)
        return keep_largest_of_group(groups, self.n).view(rows, columns)

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        """How many entries each block of columns keeps: n/m of it."""
        self._check_count(shape, kept, name)
        widths = [stop - start for start, stop in pairwise(edges)]
        return [shape[0] * width // self.m * self.n for width in widths]

    def _check_columns(self, columns: int, name: str) -> None:
        if columns % self.m:
            skip = "its name" if name == "this layer" else f'"{name}"'
            raise ValueError(
                f"{self} needs columns divisible by {self.m}; {_quoted(name)} has {columns}. "
                f"Skip it with exclude=[{skip}]."
            )

    def _check_count(self, shape: tuple[int, int], kept: int, name: str) -> None:
        self._check_columns(shape[1], name)
        exact = shape[0] * shape[1] // self.m * self.n
        if kept != exact:
            raise ValueError(
                f"{self} keeps exactly {exact} of {shape[0] * shape[1]} entries of {_quoted(name)}, not {kept}: "
                "it goes with the uniform allocation only"
            )


def parse(text: str, per: Literal["row", "layer"] = "row") -> Pattern:
    """The pattern that a word of a recipe names: "unstructured" (compared per row or per layer) or "N:M".

    Raises ValueError for anything else.

    >>> parse("2:4")
    NM(n=2, m=4)
    """
    if text == "unstructured":
        return Unstructured(per)
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ValueError(f"Pattern {text!r} is not N:M (2:4 keeps 2 of 4 consecutive weights) and not 'unstructured'")
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise ValueError(f"Pattern {text!r} must keep N of M weights with 0 < N < M, as 2:4 does")
    return NM(n, m)


def check_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    """The sparsity that will result: the given one, or the one that the pattern fixes.

    Raises ValueError for a sparsity outside [0, 1), one that contradicts the pattern by more than 0.001 (so that
    0.667 goes with 1:3), or a missing one where the pattern fixes none.

    >>> check_sparsity(NM(2, 4), None)
    0.5
    """
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


def _check(score: Tensor, kept: int, name: str) -> None:
    if score.ndim != 2:
        raise ValueError(f"a score is a matrix (out, in); that of {_quoted(name)} has shape {tuple(score.shape)}")
    if not 0 <= operator.index(kept) <= score.numel():
        raise ValueError(f"cannot keep {kept} of the {score.numel()} entries of {_quoted(name)}")
    check_scores(score, f"the score of {_quoted(name)}")


def _quoted(name: str) -> str:
    return name if name == "this layer" else f"'{name}'"


def _cumulative(kept: int, columns: int, edges: Sequence[int]) -> list[int]:
    """Shares of `kept` proportional to block widths, whose partial sums are the rounded exact ones."""
    sums = [(2 * kept * edge + columns) // (2 * columns) for edge in edges]
    return [stop - start for start, stop in pairwise(sums)]
