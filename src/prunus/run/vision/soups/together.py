"""Members of one phase trained as one vectorised network: which of them can be, and that training.

Members of one start, one length and one schedule are stacked; they keep their own batches, peaks, weight decays and
augmentations. The result is that of members alone, up to rounding. See `prunus.train.stacked`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from prunus.masks import Masks
from prunus.run.recipe import digest, said
from prunus.run.vision import stages
from prunus.run.vision.soups.branches import Branch, Grown, State, measured, plain_state, setting_of
from prunus.train import Stacked, classification_loss, member_batches, together, train

if TYPE_CHECKING:
    from prunus.run.vision.soups.units import Unit

__all__ = ["bundles", "grow_stacked"]

_OWN = {"weight_decay", "augment"}  # what members of one stack need not share


def bundles(stacked: bool) -> Callable[[Sequence[Branch]], list[Unit]]:
    """How what is wanted is made into units: each branch alone, or those that can be stacked in one."""

    def bundle(branches: Sequence[Branch]) -> list[Unit]:
        found: dict[str, list[Branch]] = {}
        for branch in branches:
            alone = not stacked or branch.swa is not None
            found.setdefault(branch.key if alone else _alike(branch), []).append(branch)
        return [tuple(unit) for unit in found.values()]

    return bundle


def grow_stacked(unit: Sequence[Branch], state: State, masks: Masks | None, checkpoint: Path | None) -> list[Grown]:
    """The trained branches of a unit, as `branches.grow` gives each; their seconds are shares of the whole.

    Raises ValueError for networks that cannot be vectorised, see `Stacked`.
    """
    settings = [setting_of(branch) for branch in unit]
    setting, first = settings[0], unit[0]
    models = [each.new_model() for each in settings]
    for model in models:
        model.load_state_dict(dict(state))
    stacked = Stacked(models)
    asked = setting.recipe.train
    groups = [
        {"params": list(model.parameters()), "lr": branch.peak, "weight_decay": branch.recipe.train.weight_decay}
        for model, branch in zip(models, unit, strict=True)
    ]
    fused = setting.device.type == "cuda"
    optimizer = torch.optim.SGD(groups, lr=first.peak, momentum=asked.momentum, nesterov=asked.nesterov, fused=fused)
    multiplier = first.rates.multiplier(setting)
    trace = train(
        stacked,
        member_batches([each.batches(branch.part) for each, branch in zip(settings, unit, strict=True)]),
        optimizer,
        multiplier,
        steps=first.steps,
        loss=cast(Any, together(classification_loss(asked.label_smoothing))),
        masks=None if masks is None else stacked.masks(masks),
        epoch_steps=setting.epoch_steps,
        precision=setting.precision,
        capture=setting.capture,
        checkpoint=checkpoint,
        save_every=5 * setting.epoch_steps,
        shared=False,
    )
    grown: list[Grown] = []
    top = max(multiplier(step) for step in range(first.steps))
    for model, own, branch in zip(models, settings, unit, strict=True):
        if masks is not None:
            masks.check(model)
        stages.settle(model, own)
        numbers = measured(model, own) | {"steps": branch.steps, "seconds": trace.seconds / len(unit)}
        grown.append(Grown(plain_state(model), None, numbers | {"initial_lr": branch.peak * top}))
    return grown


def _alike(branch: Branch) -> str:
    """Hash of what members of one stack share."""
    recipe = said(branch.recipe, only={"images", "model", "precision", "device", "capture"})
    train = said(branch.recipe.train, but=_OWN)
    return digest([recipe, train, branch.start, branch.part, branch.steps, str(branch.rates)])
