"""How many entries each layer keeps: an allocation turns scores and a sparsity into integer counts.

    uniform        the same sparsity in every layer
    uniform_plus   the same in every layer but the first, which stays dense, and the last, which keeps a fifth
    global_        what one model-wide selection of the largest scores leaves to each layer
    lamp           the same, each score seen relative to the larger ones of its layer
    erk            survivors in proportion to the sum of a layer's dimensions
    owl            less sparsity for blocks whose scores have more outliers

A new allocation is one function and one `__all__` entry; its counts add up to `kept_of(all entries, sparsity)`
(`_round_to_total`), and recipes have lists of names of their own. Mappings of scores are read in order and more than
once, one tensor at a time, so their values may be computed on access. A score of -inf marks what was pruned before.
Which entries are kept is the pattern's affair; `counts_under` makes an allocation's counts fit a pattern.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.patterns import Pattern, check_scores, check_sparsity, kept_of, select_global_share

__all__ = ["Allocation", "counts_under", "erk", "global_", "lamp", "owl", "uniform", "uniform_plus"]

Allocation = Callable[[Mapping[str, Tensor], float], dict[str, int]]


def uniform(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """The same sparsity in every layer: `kept_of(numel, sparsity)` entries stay in each.

    >>> uniform({"a": torch.ones(2, 5), "b": torch.ones(1, 10)}, 0.7)
    {'a': 3, 'b': 3}
    """
    return {name: kept_of(score.numel(), sparsity) for name, score in scores.items()}


def global_(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """What one selection of the largest scores over all layers leaves to each; the counts add up exactly.

    With `Unstructured("layer")`, exact selection by these counts is the direct model-wide mask, bit for bit. Ties go to
    earlier layers, then to lower flat indices. Raises ValueError for NaN or float64 scores.

    >>> global_({"a": torch.tensor([[1.0, 2.0]]), "b": torch.tensor([[3.0, 4.0]])}, 0.5)
    {'a': 0, 'b': 2}
    """
    return select_global_share(scores, sparsity)


def lamp(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Layer-adaptive magnitude pruning (Lee et al. 2021): one model-wide selection of scores relative to their layer.

        score(u) = S_u^2 / sum_{v: S_v >= S_u} S_v^2,   of equal S one after the other

    S are the scores given, the paper's are |W|. A layer's largest entry has score 1, so a layer is emptied only when
    fewer entries stay than there are layers. Sums are taken from the largest on, in float64; the relative scores are
    compared in float32. Raises ValueError for NaN.

    >>> lamp({"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.tensor([[9.0, 9.0, 9.0]])}, 0.5)
    {'a': 1, 'b': 2}
    """
    return select_global_share(_Mapped(scores, _relative_to_larger), sparsity)


def uniform_plus(first: str, last: str | None = None, *, most: float = 0.8) -> Allocation:
    """Uniform but for two layers (Gale et al. 2019): `first` stays dense, `last` loses at most the share `most`.

    With k entries to prune of n, all layers but the first get the sparsity s' = k / (n - n_first); if that exceeds
    `most`, the last one gets `most` and the others (k - most * n_last) / (n - n_first - n_last). The counts add up to
    `kept_of(n, sparsity)`. first, last: names of layers, of the first convolution and the last linear layer in the
    paper; without a last one none is spared.

    Raises ValueError for a name that has no scores, and when what is left could not hold so many zeros.

    >>> uniform_plus("a", "c")({"a": torch.ones(1, 10), "b": torch.ones(10, 10), "c": torch.ones(1, 10)}, 0.75)
    {'a': 10, 'b': 18, 'c': 2}
    """

    def allocate(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        sizes = {name: score.numel() for name, score in scores.items()}
        total = kept_of(sum(sizes.values()), sparsity)
        for name in (first, last):
            if name is not None and name not in sizes:
                raise ValueError(f"uniform_plus spares {name!r}, which is none of the {len(sizes)} layers pruned")
        pruned = sum(sizes.values()) - total
        shares = dict.fromkeys(sizes, _share(pruned, sum(sizes.values()) - sizes[first], sparsity)) | {first: 0.0}
        if last is not None and last != first and shares[last] > most:
            others = sum(sizes.values()) - sizes[first] - sizes[last]
            share = _share(pruned - most * sizes[last], others, sparsity)
            shares = dict.fromkeys(sizes, share) | {first: 0.0, last: most}
        exact = [(1 - shares[name]) * size for name, size in sizes.items()]
        return dict(zip(sizes, _round_to_total(exact, total), strict=True))

    return allocate


def erk(shapes: Mapping[str, Sequence[int]]) -> Allocation:
    """Erdos-Renyi-Kernel (Evci et al. 2020): layer l keeps entries in proportion to the sum of its dimensions.

        kept_l = min(n_l, c * (out + in + kh + kw))   with the c for which they add up to `kept_of(total, sparsity)`

    shapes: layer name -> shape of the parameter, four numbers for a Conv2d, two for a Linear. The paper makes the
    layers that would keep more than they have dense one by one and solves again: the same c.

    Raises ValueError for a layer without a shape.

    >>> scores = {"conv": torch.ones(2, 9), "fc": torch.ones(10, 20)}
    >>> erk({"conv": (2, 1, 3, 3), "fc": (10, 20)})(scores, 0.8)
    {'conv': 10, 'fc': 34}
    """

    def allocate(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        sizes = {name: score.numel() for name, score in scores.items()}
        for name in sizes:
            if name not in shapes:
                raise ValueError(f"erk needs the shape of '{name}'; it was given those of {len(shapes)} other layers")
        total = kept_of(sum(sizes.values()), sparsity)
        exact = _fill([sum(shapes[name]) for name in sizes], list(sizes.values()), total)
        return dict(zip(sizes, _round_to_total(exact, total), strict=True))

    return allocate


def owl(c: float = 5.0, lam: float = 0.08) -> Allocation:
    """Outlier-weighed sparsity (Yin et al. 2024): blocks with more outlying scores lose less.

        D_b = mean over block b of [A > c * mean(A)],   A = the scores (the paper's are Wanda's, |W| * ||X||)
        s_b = S - lam * (D_b - mean D) / max |D - mean D|

    Means over blocks are weighted by parameters, so the model's sparsity is exactly S: the counts add up to
    `kept_of(total, S)`. Layers of a block get its sparsity. A block is the name up to its first integer part
    ("model.layers.0"); names without one are blocks of their own.

    The paper states s_b within [S - lam, S + lam], its code spreads the s_b over a range of 2 lam, which leaves that
    interval when the D_b are skewed. This keeps the interval; for symmetric D_b both agree.

    Raises ValueError for c <= 0 or lam < 0, and when S - lam or S + lam leaves [0, 1).

    >>> scores = {"h.0.fc": torch.ones(1, 10), "h.1.fc": torch.tensor([[90.0] + [1.0] * 9])}
    >>> owl(c=5, lam=0.1)(scores, 0.5)
    {'h.0.fc': 4, 'h.1.fc': 6}
    """
    if not c > 0 or not lam >= 0:
        raise ValueError(f"owl needs c > 0 and lam >= 0; got c={c}, lam={lam}")

    def allocate(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        kept_of(0, sparsity)
        if not (lam <= sparsity and sparsity + lam < 1):
            raise ValueError(
                f"owl(lam={lam}) spreads sparsities over {sparsity} +- {lam}, which leaves [0, 1): "
                f"use lam <= {min(sparsity, 1 - sparsity):.3g}"
            )
        sizes, outliers = _outliers(scores, c)
        shares = _block_sparsities(sizes, outliers, sparsity, lam)
        exact = [(1 - shares[_block_of(name)]) * size for name, size in sizes.items()]
        kept = _round_to_total(exact, kept_of(sum(sizes.values()), sparsity))
        return dict(zip(sizes, kept, strict=True))

    return allocate


def counts_under(
    pattern: Pattern, scores: Mapping[str, Tensor], sparsity: float | None, allocation: Allocation | None = None
) -> dict[str, int]:
    """How many entries each layer keeps under a pattern: the allocation's counts, made whole tiles or rows of it.

    The allocation (None: `global_`) sees at each entry the score by which its tile or row competes. What it asks of a
    layer beyond the entries that are not -inf goes to the others, in proportion to their counts. Rounded to whole tiles
    the total stays as near as half of the largest one. A pattern that fixes the sparsity also fixes the counts.

    Raises ValueError as pattern and allocation do, for an allocation where the pattern fixes the counts, and for a
    sparsity that scores of -inf exceed already.

    >>> counts_under(Block(1, 2), {"a": torch.tensor([[1.0, 9.0, 2.0, 3.0]]), "b": torch.tensor([[4.0, 4.0]])}, 0.5)
    {'a': 2, 'b': 2}
    """
    share = check_sparsity(pattern, sparsity)
    if pattern.sparsity is not None:
        if allocation is not None:
            raise ValueError(f"{pattern} fixes how many entries every layer keeps: leave out the allocation")
        return {name: pattern.counts(_matrix(score), sparsity, name=name) for name, score in scores.items()}
    units = {name: pattern.unit(_matrix(score), name=name) for name, score in scores.items()}
    pooled = _Mapped(scores, lambda name, score: pattern.pool(score))
    counts = (allocation or global_)(pooled, share)
    left = {name: int((score > -torch.inf).sum()) for name, score in pooled.items()}
    if any(counts[name] > left[name] for name in left):
        counts = _within(counts, left)
    return _whole(counts, units)


def _within(counts: Mapping[str, int], left: Mapping[str, int]) -> dict[str, int]:
    """Counts with the same total of which none exceeds what is left."""
    total = sum(counts.values())
    if total > sum(left.values()):
        raise ValueError(
            f"{total} entries should stay, but earlier masks left only {sum(left.values())}: raise the sparsity"
        )
    exact = _fill([counts[name] for name in left], list(left.values()), total)
    return dict(zip(left, _round_to_total(exact, total), strict=True))


def _whole(counts: Mapping[str, int], units: Mapping[str, int]) -> dict[str, int]:
    """Multiples of each layer's unit next to the counts; largest remainders go up while that nears the total."""
    whole = {name: counts[name] // unit * unit for name, unit in units.items()}
    missing = sum(counts.values()) - sum(whole.values())
    for name in sorted(units, key=lambda name: (whole[name] - counts[name]) / units[name]):  # stable: ties by order
        if whole[name] < counts[name] and 2 * missing >= units[name]:
            whole[name] += units[name]
            missing -= units[name]
    return whole


def _fill(weights: Sequence[int], sizes: Sequence[int], total: int) -> list[float]:
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


def _share(pruned: float, size: int, sparsity: float) -> float:
    if pruned > size:
        raise ValueError(
            f"sparsity {sparsity} cannot be reached by uniform_plus: its other layers have {size} entries, and "
            f"{pruned:.0f} would have to go. Lower the sparsity, or choose erk or global_"
        )
    return pruned / max(1, size)


def _matrix(score: Tensor) -> tuple[int, int]:
    return score.shape[0], score.shape[1]


@dataclass(frozen=True)
class _Mapped(Mapping[str, Tensor]):
    """A mapping with a function applied to each value when it is read."""

    values_: Mapping[str, Tensor]
    change: Callable[[str, Tensor], Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.change(name, self.values_[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def _relative_to_larger(name: str, score: Tensor) -> Tensor:
    """LAMP's scores of one layer, (numel,) float32, in descending order; -inf stays."""
    check_scores(score, f"score of '{name}'")
    ordered = score.reshape(-1).double().sort(descending=True).values
    squares = ordered.masked_fill(ordered == -torch.inf, 0.0).square_()
    sums = squares.cumsum(0)
    relative = torch.where(sums > 0, squares / sums.clamp_(min=torch.finfo(torch.float64).tiny), 0.0)
    return relative.float().masked_fill_(ordered == -torch.inf, -torch.inf)


def _outliers(scores: Mapping[str, Tensor], c: float) -> tuple[dict[str, int], dict[str, int]]:
    """Entries of each layer, and of each block those above c times the block's mean."""
    sizes: dict[str, int] = {}
    sums: dict[str, float] = {}
    entries: dict[str, int] = {}
    for name, score in scores.items():
        check_scores(score, f"score of '{name}'")
        block = _block_of(name)
        sizes[name] = score.numel()
        alive = score.masked_fill(score == -torch.inf, 0.0)
        sums[block] = sums.get(block, 0.0) + float(alive.sum(dtype=torch.float64))
        entries[block] = entries.get(block, 0) + score.numel()
    outliers = dict.fromkeys(sums, 0)
    for name, score in scores.items():
        block = _block_of(name)
        outliers[block] += int((score.float() > c * sums[block] / entries[block]).sum())
    return sizes, outliers


def _block_sparsities(
    sizes: Mapping[str, int], outliers: Mapping[str, int], sparsity: float, lam: float
) -> dict[str, float]:
    entries = dict.fromkeys(outliers, 0)
    for name, size in sizes.items():
        entries[_block_of(name)] += size
    mean = sum(outliers.values()) / sum(entries.values())
    away = {block: outliers[block] / entries[block] - mean for block in outliers}
    largest = max(abs(value) for value in away.values())
    if largest == 0:
        return dict.fromkeys(outliers, sparsity)
    return {block: sparsity - lam * value / largest for block, value in away.items()}


def _round_to_total(exact: Sequence[float], total: int) -> list[int]:
    """Integers next to the exact numbers that add up to `total`: the largest remainders are rounded up."""
    floors = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: floors[i] - exact[i])  # stable: ties by order
    for i in by_remainder[: total - sum(floors)]:
        floors[i] += 1
    return floors


def _block_of(name: str) -> str:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name
