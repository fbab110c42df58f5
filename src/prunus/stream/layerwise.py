"""The layers of a block solved from what they received: by one process, or shared among several.

    inputs_r = statistics of rank r's windows;   inputs = sum_r inputs_r;   each layer is solved by one rank and sent

Every rank ends with the same bits: sums come out alike everywhere, and weights and masks are their solver's. Layers of
one input stay together, because solvers factorise it once. Which blocks there are, and in which order, is in `stream`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.layers import Inputs, Layer, View
from prunus.machine import ranks
from prunus.patterns import Pattern
from prunus.score import Criterion

__all__ = ["Task", "add_up_", "owners", "solve_layers_"]


@dataclass(frozen=True)
class Task:
    """What is done with every layer: counts has view name -> entries to keep."""

    criterion: Criterion
    pattern: Pattern
    counts: Mapping[str, int]


@torch.no_grad()
def add_up_(views: Sequence[View], inputs: Mapping[str, Inputs]) -> None:
    """What all ranks' windows taught about the inputs of these views, in place of this rank's own."""
    for each in {id(inputs[view.name]): inputs[view.name] for view in views if view.name in inputs}.values():
        tokens = torch.tensor([each.tokens], dtype=torch.int64, device=each.squares.device)
        ranks.sum_(tokens)
        each.tokens = int(tokens)
        if each.gram is None:
            ranks.sum_(each.squares)
        else:
            ranks.sum_(each.gram)
            each.squares.copy_(each.gram.diagonal())


def owners(views: Sequence[View], inputs: Mapping[str, Inputs], world: int) -> dict[str, int]:
    """View name -> rank that solves it: groups of one input, the dearest first, each to the rank with least to do.

    A group of inputs n costs a factorisation and sweeps, n^3 + sum of out * n^2.
    """
    groups: dict[int, list[View]] = {}  # a layer whose inputs nobody asked for stands alone
    for view in views:
        groups.setdefault(id(inputs.get(view.name, view)), []).append(view)
    costs = [(sum(v.shape[0] for v in group) + group[0].shape[1]) * group[0].shape[1] ** 2 for group in groups.values()]
    load = [0] * world
    found: dict[str, int] = {}
    for cost, group in sorted(zip(costs, groups.values(), strict=True), key=lambda each: -each[0]):
        rank = load.index(min(load))
        load[rank] += cost
        found |= {view.name: rank for view in group}
    return found


@torch.no_grad()
def solve_layers_(
    parameters: Mapping[str, nn.Parameter],
    views: Sequence[View],
    task: Task,
    inputs: Mapping[str, Inputs],
    *,
    shared: bool = False,
) -> tuple[dict[str, Tensor], list[str]]:
    """Parameter name -> mask, beside the weights, which were solved in place; views that saw no token.

    shared: whether the ranks share the views; their `inputs` are added up before.
    """
    by = owners(views, inputs, ranks.count() if shared else 1)
    masks: dict[str, Tensor] = {}
    for view in views:
        parameter = parameters[view.parameter]
        whole = masks.setdefault(view.parameter, torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device))
        if shared and by[view.name] != ranks.index():
            continue
        layer = Layer(view.name, view.matrix(parameter.data), inputs.get(view.name))
        with torch.autocast(parameter.device.type, enabled=False):
            weight, mask = task.criterion.solve(layer, task.pattern, task.counts[view.name])
        view.write_(parameter.data, weight.masked_fill(~mask, 0.0))
        view.write_(whole, mask)
    if shared:
        for view in views:
            for stored in (parameters[view.parameter].data, masks[view.parameter]):
                matrix = view.matrix(stored).contiguous()
                ranks.send_(matrix, by[view.name])
                view.write_(stored, matrix)
    fallback = [view.name for view in views if view.name in inputs and inputs[view.name].tokens == 0]
    return masks, fallback
