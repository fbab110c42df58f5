"""Pruning within earlier masks: scores of -inf where they prune, so that no weight comes back.

A weight that was pruned is zero, but a zero need not score worst: not by a score that is no product with |W_ij|, not
beside inputs that are zero, and not in a layer that is now to keep more than was left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.layers import Layer, View
from prunus.masks import Masks
from prunus.score.criteria import Criterion, Score

if TYPE_CHECKING:
    from prunus.patterns import Pattern


def limited(score: Tensor, view: View, within: Mapping[str, Tensor]) -> Tensor:
    """The score (out, in) with -inf where earlier masks prune; itself where they do not know the parameter."""
    if view.parameter not in within:
        return score
    return score.masked_fill(~view.matrix(within[view.parameter]).to(score.device), -torch.inf)


def check_known(within: Masks, parameters: Mapping[str, Tensor]) -> None:
    """Raise ValueError for earlier masks of parameters that the model has not, or has in another shape."""
    for name, mask in within.items():
        if name not in parameters or parameters[name].shape != mask.shape:
            raise ValueError(
                f"the earlier masks have '{name}' {tuple(mask.shape)}, which is no parameter of the model: they are of "
                "another model, or of a wrapped one"
            )


def check_within(pattern: Pattern, score: Tensor, mask: Tensor, *, name: str) -> None:
    """Raise ValueError for a mask that keeps an entry whose score is -inf."""
    if bool((score[mask] == -torch.inf).any()):
        raise ValueError(f"{pattern} cannot keep {int(mask.sum())} entries of '{name}' within the earlier masks")


def staying(criterion: Criterion, views: Sequence[View], within: Masks) -> Criterion:
    """The criterion with scores that are -inf where earlier masks prune.

    views: those of the layers that it will be asked about.
    Raises ValueError for a criterion that cannot stay; its solve does where the pattern cannot keep as many as asked.
    """
    score, by_name = criterion.score, {view.name: view for view in views}
    if not criterion.stays:
        raise ValueError(
            f"{criterion.name} cannot stay within earlier masks: prune at once, or by a criterion with a score"
        )

    @torch.no_grad()
    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        view = by_name[layer.name]
        left = limited(torch.zeros(view.shape, device=layer.weight.device), view, within)
        weight, mask = criterion.solve(layer, _Within(pattern, left == -torch.inf), kept)
        check_within(pattern, left, mask, name=layer.name)
        return weight, mask

    return replace(criterion, score=None if score is None else _limiting(score, by_name, within), solve=solve)


def _limiting(score: Score, views: Mapping[str, View], within: Masks) -> Score:
    return lambda layer: limited(score(layer), views[layer.name], within)


@dataclass(frozen=True, eq=False)
class _Within:
    """A pattern that chooses, of a whole layer, what is pruned already last of all; pruned: (out, in) bool."""

    pattern: Pattern
    pruned: Tensor

    def __str__(self) -> str:
        return str(self.pattern)

    @property
    def width(self) -> int | None:
        return self.pattern.width

    @property
    def sparsity(self) -> float | None:
        return self.pattern.sparsity

    @property
    def by_row(self) -> bool:
        return self.pattern.by_row

    def counts(self, shape: tuple[int, int], sparsity: float | None, *, name: str = "this layer") -> int:
        return self.pattern.counts(shape, sparsity, name=name)

    def mask(self, score: Tensor, kept: int, *, name: str = "this layer") -> Tensor:
        return self.pattern.mask(score.masked_fill(self.pruned, -torch.inf), kept, name=name)

    def choose(self, score: Tensor, kept: int) -> Tensor:
        return self.pattern.choose(score.masked_fill(self.pruned, -torch.inf), kept)

    def split(self, shape: tuple[int, int], kept: int, edges: Sequence[int], *, name: str = "this layer") -> list[int]:
        return self.pattern.split(shape, kept, edges, name=name)

    def unit(self, shape: tuple[int, int], *, name: str = "this layer") -> int:
        return self.pattern.unit(shape, name=name)

    def pool(self, score: Tensor) -> Tensor:
        return self.pattern.pool(score)
