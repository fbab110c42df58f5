"""The kinds of pruning after which the network really is smaller: filters removed, layers decomposed to low rank."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.layers import CONVOLUTIONS
from prunus.machine import autocast, in_mode
from prunus.measure import Cost, flops_of
from prunus.patterns import kept_of
from prunus.recipe import ClassifierPrune
from prunus.shrink import (
    Channels,
    choose_filters,
    decompose,
    filter_norms,
    filter_taylor,
    find_channels,
    ranks_by_budget,
    ranks_by_share,
    remove_filters,
)
from prunus.train import classification_loss, unrecorded
from prunus.vision import stages
from prunus.vision.setting import Setting

__all__ = ["Smaller", "smaller"]

_OUTPUTS = "its outputs are the network's"


@dataclass(frozen=True)
class Smaller:
    """A network that became smaller, and how.

    sparsity: share of the parameters that went; distance: ALLR's first signal, from the energy of the weights;
    left_alone: layer -> why it stays as it was; by_layer: layer -> share of its weights that went; cost: of one image.
    """

    model: nn.Module
    sparsity: float
    distance: float
    left_alone: Mapping[str, str]
    by_layer: Mapping[str, float]
    cost: Mapping[str, Any]


def smaller(model: nn.Module, setting: Setting, asked: ClassifierPrune, seed: int) -> Smaller:
    """The smaller network that the recipe's kind of pruning makes of the model, which stays as it is.

    Raises ValueError for globs that match no layer, budgets too small, and networks whose graph cannot be read.
    """
    example = setting.example()
    with unrecorded():
        if asked.kind == "filters":
            small, kept, lost = _without_filters(model, setting, example, asked, seed)
        else:
            small, kept, lost = _low_rank(model, example, asked, seed)
        return _accounted(model, setting.laid_out(small), example, setting, kept, lost=lost)


def _without_filters(
    model: nn.Module, setting: Setting, example: Tensor, asked: ClassifierPrune, seed: int
) -> tuple[nn.Module, dict[str, str], float | None]:
    channels = find_channels(model, example, include=asked.include, exclude=asked.exclude)
    scores = (
        filter_norms(model, channels, asked.how(seed))
        if asked.ranking == "norms"
        else _by_taylor(model, channels, setting)
    )
    allocation = "global" if asked.allocation == "global" else "uniform"
    gone = choose_filters(scores, channels, asked.sparsity, allocation=allocation)
    left = {layer: each.kept for each in channels if each.kept is not None for layer in each.layers}
    left |= {each.name: "its best filter stays" for each in channels if _would_be_empty(each, asked)}
    return remove_filters(model, example, gone), left, None


def _by_taylor(model: nn.Module, channels: Sequence[Channels], setting: Setting) -> dict[str, Tensor]:
    loss = classification_loss(setting.recipe.train.label_smoothing)
    with in_mode(model, training=False), autocast(setting.device, setting.precision), torch.enable_grad():
        return filter_taylor(model, channels, stages.calibration(setting), loss)


def _would_be_empty(each: Channels, asked: ClassifierPrune) -> bool:
    return each.kept is None and asked.allocation == "uniform" and not kept_of(each.size // each.blocks, asked.sparsity)


def _low_rank(
    model: nn.Module, example: Tensor, asked: ClassifierPrune, seed: int
) -> tuple[nn.Module, dict[str, str], float | None]:
    """Decomposed layers; the one that makes the network's outputs only if `include` names it."""
    head = None if asked.include else _head(model, example)
    include = asked.include or tuple(name for name in _weights(model) if name != head)
    ranks = (ranks_by_budget if asked.allocation == "global" else ranks_by_share)(
        model, asked.sparsity, include=include, exclude=asked.exclude
    )
    small, report = decompose(model, ranks)
    left = {each.name: each.kept for each in report if each.kept is not None}
    weights = _weights(model)
    energy = {each.name: float(weights[each.name].detach().double().square().sum()) for each in report}
    lost = sum(each.error**2 * energy[each.name] for each in report)
    return small, left | ({head: _OUTPUTS} if head is not None else {}), lost


def _accounted(
    model: nn.Module,
    small: nn.Module,
    example: Tensor,
    setting: Setting,
    left: Mapping[str, str],
    *,
    lost: float | None,
) -> Smaller:
    """The numbers; lost: energy of the weights that went, where it is not what is missing."""
    before, after = _weights(model), _weights(small)
    energies = [sum(float(w.detach().double().square().sum()) for w in each.values()) for each in (before, after)]
    counts = [sum(w.numel() for w in each.values()) for each in (before, after)]
    share = 1 - counts[1] / counts[0]
    gone = energies[0] - energies[1] if lost is None else lost
    distance = (max(0.0, gone) / energies[0] / share) ** 0.5 if share > 0 and energies[0] else 0.0
    sizes = [sum(p.numel() for p in each.parameters()) for each in (model, small)]
    dense = sum(stages.operations(setting).values())
    flops = flops_of(small, example)
    by_layer = {
        name: 1 - sum(w.numel() for other, w in after.items() if _within(other, name)) / weight.numel()
        for name, weight in before.items()
    }
    cost = Cost(dense, flops, dense / max(1, flops), sizes[1], sizes[1])
    return Smaller(small, 1 - sizes[1] / sizes[0], distance, dict(left), by_layer, asdict(cost))


def _within(name: str, of: str) -> bool:
    return name == of or name.startswith(f"{of}.")


def _weights(model: nn.Module) -> dict[str, Tensor]:
    """Layer name -> weight, of Linear and convolution layers."""
    found = {name: each for name, each in model.named_modules() if isinstance(each, (nn.Linear, *CONVOLUTIONS))}
    return {name: module.get_parameter("weight") for name, module in found.items()}


@torch.no_grad()
def _head(model: nn.Module, example: Tensor) -> str | None:
    """The layer whose output is the model's, if it is one."""
    copied, outputs = copy.deepcopy(model).cpu().eval(), dict[str, Any]()
    hooks = [
        copied.get_submodule(name).register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out}))
        for name in _weights(model)
    ]
    result = copied(example)
    for hook in hooks:
        hook.remove()
    return next((name for name, out in outputs.items() if out is result), None)
