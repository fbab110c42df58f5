"""One-shot pruning of any module in memory: score every layer, allot the counts, choose the masks, apply them.

    views ─▶ score ─▶ allocation and pattern: counts ─▶ pattern: masks ─▶ applied

Nothing changes before everything is chosen and checked. Models larger than memory, and solvers that also move the
weights that stay, are the affair of `stream`; pruning again and again that of `retrain.imp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.layers import Inputs, Layer, View, find_layers
from prunus.machine import in_mode
from prunus.masks import Masks
from prunus.patterns import Pattern, Unstructured, check_sparsity
from prunus.score import Allocation, Score, counts_under, erk, global_, lamp, magnitude, observe, uniform, uniform_plus

__all__ = ["ALLOCATIONS", "named_allocation", "prune"]

ALLOCATIONS = ("global", "uniform", "uniform_plus", "erk", "lamp")
_LAYER = Unstructured("layer")


@torch.no_grad()
def prune(
    model: nn.Module,
    score: Score = magnitude,
    pattern: Pattern = _LAYER,
    sparsity: float | None = None,
    *,
    allocation: Allocation | None = None,
    views: Sequence[View] | None = None,
    within: Masks | None = None,
    batches: Iterable[Any] | None = None,
) -> Masks:
    """Masks of the model's prunable weights, chosen and applied: pruned entries are +0.0 in the model.

    sparsity: the share of zeros over all `views` together; may be left out where the pattern fixes it.
    allocation: how the zeros are shared out; None is `global_`, or what the pattern fixes.
    views: the prunable weights, by default `find_layers(model)`.
    within: earlier masks. What they prune stays pruned and counts as zero: the sparsity is that of the result.
    batches: calibration for scores that need inputs (`wanda`, `ria`): x, or tuples that begin with x, given to the
        model in eval mode and on its device. Linear and convolutions of one group can be observed.

    Raises ValueError for a model without prunable weights, a sparsity outside [0, 1) or below that of `within`, a
    pattern that does not fit a layer or `within`, scores with NaN, and a score that needs inputs when there are none.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> prune(model, sparsity=0.75)
    Masks(2 parameters, sparsity 0.7500)
    """
    views = list(find_layers(model) if views is None else views)
    if not views:
        raise ValueError(
            "nothing to prune: no Linear or convolution weight was found, or include and exclude left none"
        )
    check_sparsity(pattern, sparsity)
    inputs = {} if batches is None else _calibrate(model, views, batches)
    parameters = dict(model.named_parameters())
    scores: dict[str, Tensor] = {}
    for view in views:  # all at once: an allocation reads them several times, and a random score draws anew each time
        layer = Layer(view.name, view.matrix(parameters[view.parameter].detach()), inputs.get(view.name))
        scores[view.name] = _limited(score(layer), view, within)
    counts = counts_under(pattern, scores, sparsity, allocation)
    matrices = {name: pattern.mask(scores[name], kept, name=name) for name, kept in counts.items()}
    for name, matrix in matrices.items():
        if within is not None and bool((scores[name][matrix] == -torch.inf).any()):
            raise ValueError(f"{pattern} cannot keep {counts[name]} entries of '{name}' within the earlier masks")
    masks = Masks.of(views, matrices, {name: parameter.shape for name, parameter in parameters.items()})
    masks.apply_(model)
    return masks


def named_allocation(name: str, model: nn.Module, views: Sequence[View]) -> Allocation:
    """The allocation that a recipe names, with what it needs of the model.

    "uniform_plus" leaves the first convolution dense (without one the first layer) and spares the last linear layer;
    "erk" takes the dimensions of the parameters. Raises ValueError for a name that is not in ALLOCATIONS.

    >>> model = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 4))
    >>> allocation = named_allocation("uniform_plus", model, find_layers(model))
    >>> allocation({"0": torch.ones(2, 4), "2": torch.ones(4, 2)}, 0.25)
    {'0': 8, '2': 4}
    """
    parameters = dict(model.named_parameters())
    shapes = {view.name: _shape(parameters[view.parameter], view) for view in views}
    if name == "uniform_plus":
        convolutions = [each for each, shape in shapes.items() if len(shape) > 2]
        linear = [each for each, shape in shapes.items() if len(shape) == 2]
        return uniform_plus((convolutions or list(shapes))[0], linear[-1] if linear else None)
    plain = {"global": global_, "uniform": uniform, "lamp": lamp, "erk": erk(shapes)}
    if name not in plain:
        raise ValueError(f"There is no allocation {name!r}; there are {', '.join(ALLOCATIONS)}.")
    return plain[name]


def _shape(parameter: Tensor, view: View) -> tuple[int, ...]:
    return tuple(parameter.shape) if view.index is None else view.shape


def _limited(score: Tensor, view: View, within: Masks | None) -> Tensor:
    """The score with -inf where earlier masks prune."""
    if within is None or view.parameter not in within:
        return score
    return score.masked_fill(~view.matrix(within[view.parameter]).to(score.device), -torch.inf)


def _calibrate(model: nn.Module, views: Sequence[View], batches: Iterable[Any]) -> dict[str, Inputs]:
    """What each layer receives over the batches, the model in eval mode meanwhile."""
    device = next(model.parameters()).device
    with in_mode(model, training=False), observe(model, views, gram=False) as inputs:
        for batch in batches:
            x = batch[0] if isinstance(batch, (tuple, list)) else batch
            model(x.to(device))
    return inputs
