"""Pruning within earlier masks: scores of -inf where they prune, so that no weight comes back.

A weight that was pruned is zero, but a zero need not score worst: not by a score that is no product with |W_ij|, not
beside inputs that are zero, and not in a layer that is now to keep more than was left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.layers import Layer, View
from prunus.masks import Masks
from prunus.score.criteria import Criterion

if TYPE_CHECKING:
    from prunus.patterns import Pattern


def limited(score: Tensor, view: View, within: Masks) -> Tensor:
    """The score (out, in) with -inf where earlier masks prune; itself where they do not know the parameter."""
    if view.parameter not in within:
        return score
    return score.masked_fill(~view.matrix(within[view.parameter]).to(score.device), -torch.inf)


def check_within(pattern: Pattern, score: Tensor, mask: Tensor, *, name: str) -> None:
    """Raise ValueError for a mask that keeps an entry whose score is -inf."""
    if bool((score[mask] == -torch.inf).any()):
        raise ValueError(f"{pattern} cannot keep {int(mask.sum())} entries of '{name}' within the earlier masks")


def staying(criterion: Criterion, views: Sequence[View], within: Masks) -> Criterion:
    """The criterion with scores that are -inf where earlier masks prune.

    views: those of the layers that it will be asked about.
    Raises ValueError for a criterion without a score; its solve does where the pattern cannot keep as many as it is to.
    """
    score, by_name = criterion.score, {view.name: view for view in views}
    if score is None:
        raise ValueError(
            f"{criterion.name} cannot stay within earlier masks: prune at once, or by a criterion with a score"
        )

    def left(layer: Layer) -> Tensor:
        return limited(score(layer), by_name[layer.name], within)

    @torch.no_grad()
    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        found = left(layer)
        mask = pattern.mask(found, kept, name=layer.name)
        check_within(pattern, found, mask, name=layer.name)
        return torch.where(mask, layer.weight, 0.0), mask

    return replace(criterion, score=left, solve=solve)
