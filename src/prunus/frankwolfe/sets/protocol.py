"""What a feasible set is made of: a gauge on nonnegative vectors, and how tensors are seen as such vectors.

    tensors ──Seen.split──▶ profile a >= 0 (problems, n) ──Gauge──▶ c >= 0 ──rebuild──▶ tensors
             entries: |x_i|   groups: ||x_g||_2   spectrum: singular values

The set {x: gauge(profile(x)) <= r} is convex when the gauge is a symmetric, monotone norm, and then everything about it
comes from the gauge: max <m, x> over it is r * max <profile(m), c> over {gauge(c) <= 1} (entries and groups by the
Cauchy-Schwarz inequality, the spectrum by von Neumann's trace inequality), reached where x has m's signs, directions or
singular vectors; and its Euclidean projection replaces the profile by the profile's projection.

Everything works on several problems at once, one a row, and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

Rebuild = Callable[[Tensor], Tensor]


class Gauge(Protocol):
    """A symmetric, monotone norm on profiles a: (problems, n) float, a >= 0."""

    def at(self, n: int) -> Gauge:
        """The same gauge for profiles of n entries: shares have become counts."""
        ...

    def norm(self, a: Tensor) -> Tensor:
        """The gauge of each row, (problems,)."""
        ...

    def best(self, a: Tensor) -> Tensor:
        """Rows c >= 0, (problems, n), of gauge at most 1 and largest <a, c>; zeros for a row of zeros if c is open."""
        ...

    def project(self, a: Tensor, radius: Tensor) -> Tensor:
        """The rows of gauge at most radius: (problems,) that are nearest to a."""
        ...

    def reach(self, n: int) -> float:
        """The largest Euclidean norm in the unit ball, whose diameter is twice that."""
        ...

    def rank(self, n: int) -> int | None:
        """How many of the largest entries decide `best`; None: all."""
        ...


class Seen(Protocol):
    """How a matrix, or any tensor, is seen as a profile."""

    @property
    def free_columns(self) -> bool:
        """Whether the columns of the matrix may stand in any order."""
        ...

    def key(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """The matrix (rows, columns) as which a tensor of this shape is handled. Raises ValueError if it cannot be."""
        ...

    def count(self, rows: int, columns: int) -> int:
        """The length of a matrix's profile."""
        ...

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        """x: (problems, rows, columns) float32 -> its profiles, and what makes matrices of other profiles."""
        ...


def count_of(k: int | float, n: int) -> int:
    """K of n: an int is a count, a float in (0, 1] a share, rounded to the nearest; at least 1 and at most n.

    So 1 is one entry and 1.0 all of them. The authors' code rounds a share down: one entry less, at most.
    Raises ValueError for anything else.

    >>> count_of(3, 10), count_of(0.25, 10), count_of(1, 10), count_of(1.0, 10)
    (3, 2, 1, 10)
    """
    if isinstance(k, bool) or not k > 0 or (isinstance(k, float) and k > 1):
        raise ValueError(f"K is a count (an int of at least 1) or a share (a float in (0, 1]); got {k!r}")
    return min(n, k) if isinstance(k, int) else min(n, max(1, round(k * n)))


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """The matrix (rows, columns) of a weight: its first dimension against all others; a vector is a column."""
    if not shape:
        return 1, 1
    columns = 1
    for size in shape[1:]:
        columns *= size
    return shape[0], columns
