"""What an allocation is, what it sees of the layers, and how its counts fit a pattern.

    scores and shapes of all layers, a sparsity ─▶ allocation ─▶ entries that each keeps ─▶ whole tiles of the pattern

The allocations themselves are in `allocations`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from prunus.layers import Layer
from prunus.patterns import Pattern, check_sparsity
from prunus.score.criterion import Compare, Criterion, Needs, Score, required

__all__ = [
    "Allocation",
    "Count",
    "Scores",
    "allocation",
    "allocation_of",
    "check_comparable",
    "compared",
    "counts_under",
    "fill",
    "mapped",
    "needed",
    "round_to_total",
    "shapes_of",
    "sizes_of",
]

Count = Callable[[Mapping[str, Tensor], float], dict[str, int]]
Reads = Literal["", "shapes", "scores", "inputs"]


@dataclass(frozen=True)
class Allocation:
    """How many entries each layer keeps: (scores of all layers, sparsity) -> layer name -> count.

    reads: what it must be given of the layers: "" (each by itself), their "shapes", their "scores", or their "inputs",
    what they receive. A plain function is an allocation that reads scores.

    >>> Allocation(lambda scores, sparsity: {name: 1 for name in scores}, "shapes")({"a": torch.ones(2, 2)}, 0.75)
    {'a': 1}
    """

    count: Count
    reads: Reads = "scores"
    name: str = "allocation"

    def __call__(self, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        """Layer name -> entries to keep."""
        return self.count(scores, sparsity)


def allocation(*, reads: Reads) -> Callable[[Count], Allocation]:
    """Makes an allocation of a function, saying what it reads."""

    def make(count: Count) -> Allocation:
        name = getattr(count, "__name__", "allocation")
        made = Allocation(count, reads, name)
        vars(made).update(__doc__=count.__doc__, __name__=name, __module__=count.__module__)
        return made

    return make


def allocation_of(value: Allocation | Count) -> Allocation:
    """The allocation that a value or a plain function is. Raises ValueError for what is neither.

    >>> allocation_of(lambda scores, sparsity: {}).reads
    'scores'
    """
    if isinstance(value, Allocation):
        return value
    name = getattr(value, "__name__", repr(value)).rstrip("_")
    if not callable(value) or required(value) != 2:
        made = "; it makes one: call it" if callable(value) and required(value) == 0 else ""
        raise ValueError(f"{name} is no allocation{made}. An allocation is a function (scores, sparsity) -> counts")
    return Allocation(value, name=name)


@dataclass(frozen=True, eq=False)
class Scores(Mapping[str, Tensor]):
    """Layer name -> score (out, in), and what else an allocation may ask of the layers.

    shapes: of the parameters, such as (out, in, kh, kw). layers: weights and inputs, where they are known. change: is
    applied to each score when it is read.
    """

    found: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, Layer] | None = None
    change: Callable[[str, Tensor], Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.found[name] if self.change is None else self.change(name, self.found[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def by(self, score: Score) -> Scores:
        """Other scores of the same layers, computed when they are read; themselves where no layers are known."""
        return self if self.layers is None else replace(self, found=Scored(self.layers, score))


@dataclass(frozen=True, eq=False)
class Scored(Mapping[str, Tensor]):
    """The score of each layer, computed anew at each look, so that one layer's is in memory at a time."""

    layers: Mapping[str, Layer]
    score: Score

    def __getitem__(self, name: str) -> Tensor:
        return self.score(self.layers[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)


def mapped(scores: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> Scores:
    """The scores with a function applied to each when it is read."""
    if not isinstance(scores, Scores):
        return Scores(scores, shapes_of(scores), change=change)
    inner = scores.change
    return replace(scores, change=change if inner is None else lambda name, score: change(name, inner(name, score)))


def shapes_of(scores: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    """Layer name -> shape of its parameter; of a plain mapping, that of the matrix."""
    return scores.shapes if isinstance(scores, Scores) else {name: tuple(each.shape) for name, each in scores.items()}


def sizes_of(scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Layer name -> number of entries."""
    return {name: math.prod(shape) for name, shape in shapes_of(scores).items()}


def compared(criterion: Criterion, allocation: Allocation | Count) -> Compare:
    """Within what scores compete where the pattern leaves it open: as the criterion says, but in the whole layer where
    an allocation has compared layers.

    >>> compared(wanda, uniform), compared(wanda, global_)
    ('row', 'layer')
    """
    return criterion.compare if not allocation_of(allocation).reads else "layer"


def needed(criterion: Criterion, allocation: Allocation | Count) -> Needs:
    """What must be measured for both: "", "norms" or "gram"."""
    return criterion.needs or ("norms" if allocation_of(allocation).reads == "inputs" else "")


def check_comparable(criterion: Criterion, allocation: Allocation | Count) -> None:
    """Raise ValueError for an allocation that compares layers by scores that the criterion does not have."""
    if criterion.score is None and allocation_of(allocation).reads == "scores":
        raise ValueError(
            f"{criterion.name} chooses inside one layer and has no scores for {allocation_of(allocation).name} to "
            "compare: take uniform, or an allocation that looks at shapes or inputs (erk, owl)"
        )


def counts_under(
    pattern: Pattern, scores: Mapping[str, Tensor], sparsity: float | None, allocation: Allocation | Count
) -> dict[str, int]:
    """How many entries each layer keeps under a pattern: the allocation's counts, made whole tiles or rows of it.

    The allocation sees at each entry the score by which its tile or row competes. What it asks of a
    layer beyond the entries that are not -inf goes to the others, in proportion to their counts. Rounded to whole tiles
    the total stays as near as half of the largest one. A pattern that fixes the sparsity also fixes the counts.

    Raises ValueError as pattern and allocation do, for an allocation where the pattern fixes the counts, and for a
    sparsity that scores of -inf exceed already.

    >>> scores = {"a": torch.tensor([[1.0, 9.0, 2.0, 3.0]]), "b": torch.tensor([[4.0, 4.0]])}
    >>> counts_under(Block(1, 2), scores, 0.5, global_)
    {'a': 2, 'b': 2}
    """
    share = check_sparsity(pattern, sparsity)
    if pattern.sparsity is not None:
        if allocation_of(allocation).reads:
            raise ValueError(
                f"{pattern} fixes how many entries every layer keeps: leave out {allocation_of(allocation).name}"
            )
        return {name: pattern.counts(_matrix(score), sparsity, name=name) for name, score in scores.items()}
    units = {name: pattern.unit(_matrix(score), name=name) for name, score in scores.items()}
    pooled = mapped(scores, lambda name, score: pattern.pool(score))
    counts = allocation(pooled, share)
    left = {name: int((score > -torch.inf).sum()) for name, score in pooled.items()}
    if any(counts[name] > left[name] for name in left):
        counts = _within(counts, left)
    return _whole(counts, units)


def round_to_total(exact: Sequence[float], total: int) -> list[int]:
    """Integers next to the exact numbers that add up to `total`: the largest remainders are rounded up."""
    floors = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: floors[i] - exact[i])  # stable: ties by order
    for i in by_remainder[: total - sum(floors)]:
        floors[i] += 1
    return floors


def fill(weights: Sequence[int], sizes: Sequence[int], total: int) -> list[float]:
    """min(size, c * weight) for each, with the c for which they add up to total (at most the sum of the sizes)."""
    full: set[int] = set()
    while True:
        free = [i for i in range(len(sizes)) if i not in full]
        rest, weight = total - sum(sizes[i] for i in full), sum(weights[i] for i in free)
        if free and rest and not weight:  # nothing was asked of these: what they have decides
            weights, weight = sizes, sum(sizes[i] for i in free)
        exact = [float(size) if i in full else weights[i] * rest / max(weight, 1) for i, size in enumerate(sizes)]
        over = {i for i in free if exact[i] > sizes[i]}
        if not over:
            return exact
        full |= over


def _within(counts: Mapping[str, int], left: Mapping[str, int]) -> dict[str, int]:
    """Counts with the same total of which none exceeds what is left."""
    total = sum(counts.values())
    if total > sum(left.values()):
        raise ValueError(
            f"{total} entries should stay, but earlier masks left only {sum(left.values())}: raise the sparsity"
        )
    exact = fill([counts[name] for name in left], list(left.values()), total)
    return dict(zip(left, round_to_total(exact, total), strict=True))


def _whole(counts: Mapping[str, int], units: Mapping[str, int]) -> dict[str, int]:
    """Multiples of each layer's unit next to the counts; largest remainders go up while that nears the total."""
    whole = {name: counts[name] // unit * unit for name, unit in units.items()}
    missing = sum(counts.values()) - sum(whole.values())
    for name in sorted(units, key=lambda name: (whole[name] - counts[name]) / units[name]):  # stable: ties by order
        if whole[name] < counts[name] and 2 * missing >= units[name]:
            whole[name] += units[name]
            missing -= units[name]
    return whole


def _matrix(score: Tensor) -> tuple[int, int]:
    return score.shape[0], score.shape[1]
