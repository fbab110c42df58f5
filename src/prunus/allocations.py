"""How many entries each layer keeps: an allocation turns scores and a sparsity into integer counts.

    uniform   the same sparsity in every layer
    global_   what one model-wide selection of the largest scores leaves to each layer
    owl       less sparsity for blocks whose scores have more outliers

A new allocation is one function and one `__all__` entry. Mappings of scores are read in order and more than once, one
tensor at a time, so their values may be computed on access. Which entries are kept is the pattern's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from prunus.selection import check_scores, kept_of, select_global_share

__all__ = ["Allocation", "global_", "owl", "uniform"]

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


def _outliers(scores: Mapping[str, Tensor], c: float) -> tuple[dict[str, int], dict[str, int]]:
    """Entries of each layer, and of each block those above c times the block's mean."""
    sizes: dict[str, int] = {}
    sums: dict[str, float] = {}
    entries: dict[str, int] = {}
    for name, score in scores.items():
        check_scores(score, f"score of '{name}'")
        block = _block_of(name)
        sizes[name] = score.numel()
        sums[block] = sums.get(block, 0.0) + float(score.sum(dtype=torch.float64))
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
