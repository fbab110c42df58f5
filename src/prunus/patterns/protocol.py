"""What every pattern promises, and the checks and sums that they share."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import Protocol

from torch import Tensor

from prunus.patterns.selection import check_scores, kept_of

__all__ = ["Pattern", "check_count", "check_score", "check_sparsity", "cumulative", "excluded", "quoted"]


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


def check_score(score: Tensor, kept: int, name: str) -> None:
    """Raise ValueError unless the score is a floating matrix without NaN that has `kept` entries to keep."""
    check_count(score, kept, name)
    check_scores(score, f"the score of {quoted(name)}")


def check_count(score: Tensor, kept: int, name: str) -> None:
    """Raise ValueError unless the score is a matrix that has `kept` entries to keep."""
    if score.ndim != 2:
        raise ValueError(f"a score is a matrix (out, in); that of {quoted(name)} has shape {tuple(score.shape)}")
    if not 0 <= operator.index(kept) <= score.numel():
        raise ValueError(f"cannot keep {kept} of the {score.numel()} entries of {quoted(name)}")


def quoted(name: str) -> str:
    """The layer's name as messages have it."""
    return name if name == "this layer" else f"'{name}'"


def excluded(name: str) -> str:
    """What to write into `exclude` for the layer."""
    return "its name" if name == "this layer" else f'"{name}"'


def cumulative(kept: int, columns: int, edges: Sequence[int]) -> list[int]:
    """Shares of `kept` proportional to block widths, whose partial sums are the rounded exact ones."""
    sums = [(2 * kept * edge + columns) // (2 * columns) for edge in edges]
    return [stop - start for start, stop in pairwise(sums)]
