"""Sparse from the start: a random topology, and exchanging some of its connections. What RigL and SET share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from prunus.during.choose import keep_allocated
from prunus.layers import View, parameter_shapes
from prunus.masks import Masks
from prunus.patterns import keep_largest
from prunus.score import Allocation, Count, Scores, limited
from prunus.train import Plan


def random_scores(views: Sequence[View], seed: Sequence[int]) -> dict[str, Tensor]:
    """Layer name -> uniform random numbers (out, in) float32 on the CPU, the same on every machine for a seed.

    >>> random_scores([View("a", "a.weight", None, False, (1, 2))], [0])["a"].shape
    torch.Size([1, 2])
    """
    mixed = 0
    for number in seed:  # several small integers, kept apart
        mixed = (mixed * 1_000_003 + number + 1) % (1 << 63)
    generator = torch.Generator().manual_seed(mixed)
    return {view.name: torch.rand(view.shape, generator=generator) for view in views}


def random_topology(model: nn.Module, plan: Plan, sparsity: float, allocation: Allocation | Count, seed: int) -> Masks:
    """Random masks with the allocation's counts; exactly `kept_of(all, sparsity)` connections stay.

    None stays that the masks of the training prune. Raises ValueError where they leave fewer.
    """
    parameters, views = dict(model.named_parameters()), plan.views
    drawn = random_scores(views, [seed])
    drawn = {view.name: limited(drawn[view.name], view, plan.masks) for view in views}
    chosen = keep_allocated(Scores(drawn, parameter_shapes(parameters, views)), sparsity, allocation)
    return Masks.of(views, chosen, {view.parameter: parameters[view.parameter].shape for view in views})


@torch.no_grad()
def exchange(
    views: Sequence[View],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    growth: Mapping[str, Tensor],
    fraction: float,
) -> Masks:
    """Masks in which each layer lost the share `fraction` of its connections and grew as many others.

    weights, masks: by parameter name. growth: layer name -> scores (out, in). Lost are the smallest |w|; grown are the
    largest growth scores among all that are not kept, those just lost included: a layer without zeros stays dense.
    """
    matrices = {view.name: view.matrix(masks[view.parameter]) for view in views}
    counts = torch.stack([matrix.sum() for matrix in matrices.values()]).tolist()
    changed: dict[str, Tensor] = {}
    for view, active in zip(views, counts, strict=True):
        mask, count = matrices[view.name], int(fraction * active)
        if count == 0:
            continue
        weight = view.matrix(weights[view.parameter]).detach().float().abs()
        stays = keep_largest(weight.masked_fill(~mask, -1.0), active - count)
        score = growth[view.name].to(mask.device).float()
        changed[view.name] = stays | keep_largest(score.masked_fill(stays, -torch.inf), count)
    whole = {name: mask.clone() for name, mask in masks.items()}
    for view in views:
        if view.name in changed:
            view.write_(whole[view.parameter], changed[view.name])
    return Masks(whole)
