"""How many entries each layer keeps: an allocation turns scores and a sparsity into integer counts.

    scores and shapes of all layers, a sparsity ─▶ allocation ─▶ entries that each keeps ─▶ whole tiles of the pattern

    uniform        the same sparsity in every layer
    uniform_plus   the same in every layer but the first, which stays dense, and the last, which keeps a fifth
    global_        what one model-wide selection of the largest scores leaves to each layer
    lamp           the same, each score seen relative to the larger ones of its layer
    erk            survivors in proportion to the sum of a layer's dimensions
    owl            less sparsity for blocks whose scores have more outliers
    evopress       what a search over levels finds that moves the model's outputs least

A new allocation is one function and one `__all__` entry: recipes find it there. Its counts add up to
`kept_of(all entries, sparsity)` (`round_to_total`). Mappings of scores are read in order and more than once, one tensor
at a time, so their values may be computed on access. A score of -inf marks what was pruned before. Which entries are
kept is the pattern's affair; `counts_under` makes an allocation's counts fit a pattern.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import torch
from torch import Tensor

from prunus.layers import Layer, Lookup
from prunus.patterns import Pattern, check_scores, check_sparsity, kept_of, select_global_share
from prunus.score.criteria import Compare, Criterion, Needs, Score, required, wanda

__all__ = [
    "erk",
    "evopress",
    "global_",
    "lamp",
    "owl",
    "uniform",
    "uniform_plus",
]  # what recipes name; `prunus.score` has the rest

Count = Callable[[Mapping[str, Tensor], float], dict[str, int]]
Loss = Callable[[Mapping[str, int], float], float]
Reads = Literal["", "shapes", "scores", "inputs", "loss"]


@dataclass(frozen=True)
class Allocation:
    """How many entries each layer keeps: (scores of all layers, sparsity) -> layer name -> count.

    reads: what it must be given of the layers: "" (each by itself), their "shapes", their "scores", their "inputs",
    what they receive, or the "loss" of the model at given counts. A plain function is an allocation that reads scores.
    options: names and values of what it was made with, by which a checkpoint knows it from another of its name.

    >>> Allocation(lambda scores, sparsity: {name: 1 for name in scores}, "shapes")({"a": torch.ones(2, 2)}, 0.75)
    {'a': 1}
    """

    count: Count
    reads: Reads = "scores"
    name: str = "allocation"
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        """Layer name -> entries to keep."""
        return self.count(scores, sparsity)


def allocation(*, reads: Reads, **options: Any) -> Callable[[Count], Allocation]:
    """Makes an allocation of a function, saying what it reads, and what the function takes from around it.

    >>> @allocation(reads="shapes")
    ... def halves(scores, sparsity):
    ...     return {name: score.numel() // 2 for name, score in scores.items()}
    >>> halves({"fc": torch.ones(2, 4)}, 0.5)
    {'fc': 4}
    """

    def make(count: Count) -> Allocation:
        name = getattr(count, "__name__", "allocation")
        made = Allocation(count, reads, name, tuple(options.items()))
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
    applied to each score when it is read. loss: (counts, share of the calibration) -> what the model loses (`Tried`).
    """

    found: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    layers: Mapping[str, Layer] | None = None
    change: Callable[[str, Tensor], Tensor] | None = None
    loss: Loss | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.found[name] if self.change is None else self.change(name, self.found[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    def by(self, score: Score) -> Scores:
        """Other scores of the same layers, computed when they are read; themselves where no layers are known."""
        layers = self.layers
        return self if layers is None else replace(self, found=Lookup(layers, lambda name: score(layers[name])))


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
            "compare: take a criterion with scores (wanda, ria, magnitude), uniform, or an allocation that looks at "
            "shapes, inputs or the loss (erk, owl, evopress)"
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
    pooled = _mapped(scores, lambda name, score: pattern.pool(score))
    counts = allocation(pooled, share)
    left = {name: _left(score) for name, score in pooled.items()}
    return _whole(_within(counts, left), units)


def round_to_total(exact: Sequence[float], total: int) -> list[int]:
    """Integers next to the exact numbers that add up to `total`: the largest remainders are rounded up."""
    floors = [int(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: floors[i] - exact[i])  # stable: ties by order
    for i in by_remainder[: total - sum(floors)]:
        floors[i] += 1
    return floors


@allocation(reads="")
def uniform(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """The same sparsity in every layer: `kept_of(numel, sparsity)` entries stay in each.

    >>> uniform({"a": torch.ones(2, 5), "b": torch.ones(1, 10)}, 0.7)
    {'a': 3, 'b': 3}
    """
    return {name: kept_of(size, sparsity) for name, size in _sizes_of(scores).items()}


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
    return select_global_share(_mapped(scores, _relative_to_larger), sparsity)


def uniform_plus(first: str | None = None, last: str | None = None, *, most: float = 0.8) -> Allocation:
    """Uniform but for two layers (Gale et al. 2019): `first` stays dense, `last` loses at most the share `most`.

    With k entries to prune of n, all layers but the first get the sparsity s' = k / (n - n_first); if that exceeds
    `most`, the last one gets `most` and the others (k - most * n_last) / (n - n_first - n_last). The counts add up to
    `kept_of(n, sparsity)`. first, last: names of layers; left out, the first convolution (without one the first layer)
    and the last linear layer, as in the paper.

    Raises ValueError for a name that has no scores, a share outside [0, 1], and when what is left could not hold so
    many zeros.

    >>> uniform_plus("a", "c")({"a": torch.ones(1, 10), "b": torch.ones(10, 10), "c": torch.ones(1, 10)}, 0.75)
    {'a': 10, 'b': 18, 'c': 2}
    """

    if not 0 <= most <= 1:
        raise ValueError(f"most is the share that the last layer loses at most, in [0, 1]; got {most}")

    @allocation(reads="shapes", first=first, last=last, most=most)
    def uniform_plus(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        sizes = _sizes_of(scores)
        whole, spared = _ends(scores, first, last)
        total = kept_of(sum(sizes.values()), sparsity)
        pruned = sum(sizes.values()) - total
        shares = dict.fromkeys(sizes, _share(pruned, sum(sizes.values()) - sizes[whole], sparsity)) | {whole: 0.0}
        if spared is not None and spared != whole and shares[spared] > most:
            others = sum(sizes.values()) - sizes[whole] - sizes[spared]
            share = _share(pruned - most * sizes[spared], others, sparsity)
            shares = dict.fromkeys(sizes, share) | {whole: 0.0, spared: most}
        exact = [(1 - shares[name]) * size for name, size in sizes.items()]
        return dict(zip(sizes, round_to_total(exact, total), strict=True))

    return uniform_plus


@allocation(reads="shapes")
def erk(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """Erdos-Renyi-Kernel (Evci et al. 2020): layer l keeps entries in proportion to the sum of its dimensions.

        kept_l = min(n_l, c * (out + in + kh + kw))   with the c for which they add up to `kept_of(total, sparsity)`

    The dimensions are those of the parameter, four numbers for a Conv2d, two for a Linear; a plain mapping of matrices
    is taken for linear layers. The paper makes the layers that would keep more than they have dense one by one and
    solves again: the same c.

    >>> erk({"wide": torch.ones(4, 40), "fc": torch.ones(10, 20)}, 0.8)
    {'wide': 43, 'fc': 29}
    """
    shapes, sizes = _shapes_of(scores), _sizes_of(scores)
    total = kept_of(sum(sizes.values()), sparsity)
    exact = fill([sum(shapes[name]) for name in sizes], list(sizes.values()), total)
    return dict(zip(sizes, round_to_total(exact, total), strict=True))


def owl(c: float = 5.0, lam: float = 0.08) -> Allocation:
    """Outlier-weighed sparsity (Yin et al. 2024): blocks with more outlying scores lose less.

        D_b = mean over block b of [A > c * mean(A)],   A = |W| * ||X||, Wanda's scores
        s_b = S - lam * (D_b - mean D) / max |D - mean D|

    c is the paper's M, lam its lambda. Means over blocks are weighted by parameters, so the model's sparsity is exactly
    S: the counts add up to `kept_of(total, S)`. Layers of a block get its sparsity. A block is the name up to its first
    integer part ("model.layers.0"); names without one are blocks of their own. A plain mapping of scores is taken as A.

    The paper states s_b within [S - lam, S + lam], its code spreads the s_b over a range of 2 lam, which leaves that
    interval when the D_b are skewed. This keeps the interval; for symmetric D_b both agree.

    Raises ValueError for c <= 0 or lam < 0, and when S - lam or S + lam leaves [0, 1).

    >>> scores = {"h.0.fc": torch.ones(1, 10), "h.1.fc": torch.tensor([[90.0] + [1.0] * 9])}
    >>> owl(c=5, lam=0.1)(scores, 0.5)
    {'h.0.fc': 4, 'h.1.fc': 6}
    """
    if not c > 0 or not lam >= 0:
        raise ValueError(f"owl needs c > 0 and lam >= 0; got c={c}, lam={lam}")

    @allocation(reads="inputs", c=c, lam=lam)
    def owl(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        kept_of(0, sparsity)
        if not (lam <= sparsity and sparsity + lam < 1):
            raise ValueError(
                f"owl(lam={lam}) spreads sparsities over {sparsity} +- {lam}, which leaves [0, 1): "
                f"use lam <= {min(sparsity, 1 - sparsity):.3g}"
            )
        sizes, outliers = _outliers(scores.by(wanda) if isinstance(scores, Scores) else scores, c)
        shares = _block_sparsities(sizes, outliers, sparsity, lam)
        exact = [(1 - shares[_block_of(name)]) * size for name, size in sizes.items()]
        kept = round_to_total(exact, kept_of(sum(sizes.values()), sparsity))
        return dict(zip(sizes, kept, strict=True))

    return owl


def evopress(
    generations: int = 50, offspring: int = 8, step: float = 0.05, levels: int = 6, seed: int = 0
) -> Allocation:
    """A search over the layers' sparsities, by what the pruned model says (EvoPress, Sieberling et al. 2025).

        start at the same sparsity everywhere;  a switch: one layer keeps a step less, another a step more
        generation: children of the best so far, 1 to 3 switches each; the best quarter of them on an eighth of the
        calibration is tried on all of it; a child that loses less there than the best takes its place

    The loss is the KL divergence from the dense model's outputs, of layers each solved at that count beforehand. A step
    is that share of a layer of mean size, in entries, the same number everywhere, so the total never changes. levels:
    how many steps a layer may be away from the start. Each layer is solved at the counts that are tried, so as many
    copies of it are kept.

    Raises ValueError for numbers out of range, and without a loss: it runs the whole model in memory.

    >>> evopress(generations=20).reads
    'loss'
    """
    if min(generations, offspring, levels) < 1 or not 0 < step < 1:
        raise ValueError(
            f"evopress needs generations, offspring and levels >= 1 and step in (0, 1); got {generations}, "
            f"{offspring}, {levels} and {step}"
        )

    @allocation(reads="loss", generations=generations, offspring=offspring, step=step, levels=levels, seed=seed)
    def evopress(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
        kept_of(0, sparsity)
        loss = scores.loss if isinstance(scores, Scores) else None
        if loss is None:
            raise ValueError("evopress runs the whole model: prune it in memory, with calibration")
        sizes, random = _sizes_of(scores), Random(seed)
        total = sum(sizes.values())
        exact = [(1 - sparsity) * size for size in sizes.values()]
        left = {name: int((score > -torch.inf).sum()) for name, score in scores.items()}  # by earlier masks
        start = _within(dict(zip(sizes, round_to_total(exact, kept_of(total, sparsity)), strict=True)), left)
        unit = max(1, round(step * total / len(sizes)))
        best, least = dict.fromkeys(sizes, 0), loss(start, 1.0)

        def counts(steps: Mapping[str, int]) -> dict[str, int]:
            return {name: kept + unit * steps[name] for name, kept in start.items()}

        def allowed(steps: Mapping[str, int]) -> bool:
            return all(abs(steps[name]) <= levels and 0 < kept <= left[name] for name, kept in counts(steps).items())

        for _ in range(generations):
            drawn = [_switched(best, random) for _ in range(offspring)]
            children = [each for each in drawn if each != best and allowed(each)]
            children.sort(key=lambda each: loss(counts(each), 1 / 8))  # stable: ties by order
            for each in children[: max(1, offspring // 4)]:
                value = loss(counts(each), 1.0)
                best, least = (each, value) if value < least else (best, least)
        return counts(best)

    return evopress


def _switched(steps: Mapping[str, int], random: Random) -> dict[str, int]:
    """Levels after 1 to 3 switches, few more often than many; each takes a step from one layer to another."""
    found, names = dict(steps), list(steps)
    for _ in range(min(random.randint(1, 3), random.randint(1, 3)) if len(names) > 1 else 0):
        less, more = random.sample(names, 2)
        found[less] -= 1
        found[more] += 1
    return found


def _mapped(scores: Mapping[str, Tensor], change: Callable[[str, Tensor], Tensor]) -> Scores:
    """The scores with a function applied to each when it is read."""
    if not isinstance(scores, Scores):
        return Scores(scores, _shapes_of(scores), change=change)
    inner = scores.change
    return replace(scores, change=change if inner is None else lambda name, score: change(name, inner(name, score)))


def _shapes_of(scores: Mapping[str, Tensor]) -> Mapping[str, tuple[int, ...]]:
    """Layer name -> shape of its parameter; of a plain mapping, that of the matrix."""
    return scores.shapes if isinstance(scores, Scores) else {name: tuple(each.shape) for name, each in scores.items()}


def _sizes_of(scores: Mapping[str, Tensor]) -> dict[str, int]:
    """Layer name -> number of entries."""
    return {name: math.prod(shape) for name, shape in _shapes_of(scores).items()}


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


def _left(score: Tensor) -> int:
    """How many entries are not -inf; of one number that stands for all, without a look at each."""
    distinct = score if any(score.stride()) else score[:1, :1]
    return int((distinct > -torch.inf).sum()) * score.numel() // max(1, distinct.numel())


def _within(counts: Mapping[str, int], left: Mapping[str, int]) -> dict[str, int]:
    """Counts with the same total of which none exceeds what is left; themselves where none does."""
    if all(counts[name] <= left[name] for name in left):
        return dict(counts)
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


def _share(pruned: float, size: int, sparsity: float) -> float:
    if pruned > size:
        raise ValueError(
            f"sparsity {sparsity} cannot be reached by uniform_plus: its other layers have {size} entries, and "
            f"{pruned:.0f} would have to go. Lower the sparsity, or choose erk or global_"
        )
    return pruned / max(1, size)


def _ends(scores: Mapping[str, Tensor], first: str | None, last: str | None) -> tuple[str, str | None]:
    """The layers that uniform_plus spares: those named, else those of the paper."""
    shapes = _shapes_of(scores)
    for name in (first, last):
        if name is not None and name not in shapes:
            raise ValueError(f"uniform_plus spares {name!r}, which is none of the {len(shapes)} layers pruned")
    linear = [name for name, shape in shapes.items() if len(shape) == 2]
    convolutions = [name for name in shapes if name not in linear]
    return first or (convolutions or list(shapes))[0], last or (linear[-1] if linear else None)


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


def _block_of(name: str) -> str:
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else name
