"""The stages of a classifier run as functions of a setting: fit, measure, choose masks, count BatchNorm anew.

`jobs` strings them together. Lengths are steps here, epochs in recipes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from prunus.data import pooling_of
from prunus.layers import View, find_layers
from prunus.masks import Masks
from prunus.measure import Accuracy, Corrupted, accuracy, agreement, cost_under, fidelity, own_flops
from prunus.prune import prune
from prunus.recipe import ClassifierPrune, Corruptions, Distill, Given, given, schedules
from prunus.report import progress
from prunus.score import needed, observable
from prunus.train import (
    During,
    Ema,
    Multiplier,
    Trace,
    classification_loss,
    distilled_classification,
    distilled_embeddings,
    distilled_regression,
    recalibrate_,
    regression_loss,
    risen,
    train,
    unrecorded,
)
from prunus.vision.setting import Setting

__all__ = [
    "all_corrupted",
    "calibration",
    "corrupted",
    "cost_of",
    "fit",
    "measure",
    "measure_held",
    "operations",
    "schedule",
    "select",
    "settle",
    "taught",
    "views_of",
]

Loss = Callable[[nn.Module, tuple[Any, Tensor]], Tensor]  # of (model, (inputs, labels))
_CALIBRATED = 1024  # images


def schedule(setting: Setting) -> tuple[Multiplier, int]:
    """The schedule of ordinary training as the recipe says it, and its steps of warm-up."""
    asked = setting.recipe.train
    steps = setting.steps(asked.epochs)
    warmup = round(asked.warmup * setting.epoch_steps)
    made = schedules.make(asked.schedule, steps, warmup=warmup, epoch=setting.epoch_steps)
    return made, warmup or risen(made, steps)


def fit(
    model: nn.Module,
    setting: Setting,
    multiplier: Multiplier,
    *,
    steps: int,
    part: int,
    lr: float | None = None,
    masks: Masks | None = None,
    during: Sequence[During] = (),
    views: Sequence[View] | None = None,
    loss: Loss | None = None,
    checkpoint: Path | None = None,
) -> Trace:
    """Train in place what requires gradients; part as in `Setting.batches`. A running mean, if asked for, ends up in
    the model.

    loss: that of the recipe's labels if left out.

    Retraining (part > 0) stays in the feasible sets of Frank-Wolfe, but is without proximal steps and penalty: what
    they were to bring about is there. A network that has become smaller (no masks) no longer fits those sets. Members
    that do the rest of a training (part > 0, and the recipe retrains nothing) keep all of it.
    """
    asked, trains = setting.recipe.train, part == 0 or setting.recipe.retrain is None
    chosen = asked.chosen if trains else asked.chosen.retraining(smaller=masks is None)
    penalty = [asked.penalty.penalty(model)] if trains and asked.penalty is not None else []
    methods = [*during, *penalty, *chosen.beside(model, masks)]
    optimizer = chosen.made(
        model, Given(lr or asked.lr, asked.momentum, asked.nesterov, asked.weight_decay, setting.new_model)
    )
    mean = [Ema(asked.ema)] if asked.ema is not None else []
    with progress(_named(setting, part), steps) as advance:
        trace = train(
            model,
            setting.batches(part),
            optimizer,
            multiplier,
            steps=steps,
            loss=loss or _labelled(setting),
            masks=masks,
            during=[*methods, *mean],
            epoch_steps=setting.epoch_steps,
            views=views,
            precision=setting.precision,
            clip=asked.clip,
            capture=setting.capture,
            checkpoint=checkpoint,
            on_step=advance.step,
            shared=False,
        )
    for each in mean:  # before a method's own finish, which writes the final zeros
        each.finish()
    return trace


def _named(setting: Setting, part: int) -> str:
    """What a training is, for who waits for it."""
    if part:
        return f"retrain {part}/{given(setting.recipe.prune).phases}"
    return next(iter(setting.recipe.during or ("train",)))


def _labelled(setting: Setting) -> Loss:
    """The loss by labels alone."""
    return regression_loss() if setting.recipe.aim == "values" else classification_loss(_smoothing(setting))


def taught(teacher: nn.Module, asked: Distill | None, setting: Setting) -> Loss:
    """The loss that holds a network against its teacher, as the aim of the recipe has it."""
    teacher = teacher.eval().requires_grad_(False)
    if setting.recipe.aim == "embeddings":
        held = distilled_embeddings(teacher, pooling_of(setting.recipe.model))
        return lambda model, batch: held(model, batch[0])
    asked = asked or Distill()
    if setting.recipe.aim == "values":
        return distilled_regression(teacher, asked.weight)
    return distilled_classification(teacher, asked.weight, asked.temperature, smoothing=_smoothing(setting))


def _smoothing(setting: Setting) -> float:
    return setting.recipe.train.label_smoothing


def measure(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """Accuracy and its companions (shares in [0, 1]) on what the recipe measures on, or what texts are for."""
    return _measured(model, setting, setting.measured())


def measure_held(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """The same on the images that the recipe holds out, by which soups are chosen."""
    return _measured(model, setting, setting.held())


def _measured(model: nn.Module, setting: Setting, batches: Iterator[tuple[Any, Tensor]]) -> dict[str, Any]:
    precision, aim = setting.precision, setting.recipe.aim
    with unrecorded():
        if aim == "embeddings":  # what is never trained is as it came
            dense, pooling = setting.new_model(), pooling_of(setting.recipe.model)
            return asdict(fidelity(model, dense, batches, pooling, precision=precision))
        if aim == "values":
            return asdict(agreement(model, batches, precision=precision))
        found = asdict(accuracy(model, batches, precision=precision))
    return found if setting.recipe.keyed == "images" else found | {"texts": found.pop("images")}


def corrupted(
    model: nn.Module, setting: Setting, asked: Corruptions, on_set: Callable[[], None] | None = None
) -> dict[str, Any]:
    """Means of what `measure` finds over all corrupted sets, by severity and by corruption, and each set's own."""
    return all_corrupted({"": model}, setting, asked, on_set)[""]


def all_corrupted(
    networks: Mapping[str, nn.Module],
    setting: Setting,
    asked: Corruptions,
    on_set: Callable[[], None] | None = None,
) -> dict[str, dict[str, Any]]:
    """What `corrupted` gives of each of several networks; every set is made or read once for all of them."""
    sets: dict[str, dict[str, dict[int, Accuracy]]] = {name: {} for name in networks}
    for corruption, severity, images in setting.corrupted(asked):
        with unrecorded():
            for name, network in networks.items():
                found = accuracy(network, setting._plain(images), precision=setting.precision)
                sets[name].setdefault(corruption, {})[severity] = found
        if on_set is not None:
            on_set()
    return {name: _means(Corrupted(found), asked) for name, found in sets.items()}


def _means(found: Corrupted, asked: Corruptions) -> dict[str, Any]:
    return {
        "mean": found.mean(),
        "by_severity": {str(severity): found.mean(severity=severity) for severity in asked.severities},
        "by_name": {name: found.mean(name=name) for name in found.sets},
        "sets": {name: {str(k): asdict(each) for k, each in row.items()} for name, row in found.sets.items()},
    }


def settle(model: nn.Module, setting: Setting) -> bool:
    """Count the BatchNorm statistics anew on the recipe's share of an epoch of augmented training batches.

    Whether there was anything to count. Every row of a table ends so: some settled and some not would differ by that
    alone.
    """
    share = setting.recipe.recalibrate
    wanted = bool(share) and any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules())
    if wanted:
        with unrecorded():
            recalibrate_(model, setting.training(share), precision=setting.precision)
    return wanted


_operations: dict[tuple[Any, ...], dict[str, int]] = {}


def operations(setting: Setting) -> dict[str, int]:
    """Module name -> floating-point operations of one image or text, counted once a process for each network.

    torch's counter hooks every module of the process, so it must not run beside a thread that trains.
    """
    example = setting.example()
    shapes = tuple(tuple(each.shape) for each in (example.values() if isinstance(example, dict) else [example]))
    recipe = setting.recipe
    key = (recipe.model, repr(recipe.arguments), recipe.aim, setting.sets.train.classes, shapes)
    if key not in _operations:
        model = setting.new_model().to("cpu")
        _operations[key] = own_flops(model, example)
    return _operations[key]


def cost_of(model: nn.Module, masks: Masks, setting: Setting) -> dict[str, Any]:
    """What `measure.cost` says of one image, from the operations counted before."""
    return asdict(cost_under(operations(setting), model, masks))


def views_of(model: nn.Module, asked: ClassifierPrune) -> list[View]:
    """The prunable layers. Raises ValueError for a glob that matches none."""
    return find_layers(model, include=asked.include, exclude=asked.exclude)


def calibration(setting: Setting) -> Iterator[tuple[Any, Tensor]]:
    """The batches on which layers are observed before they are pruned."""
    return setting.training(min(1.0, _CALIBRATED / len(setting.sets.train)))


def select(
    model: nn.Module, sparsity: float, within: Masks | None, asked: ClassifierPrune, seed: int, *, setting: Setting
) -> Masks:
    """Masks of a model as the recipe asks for them, chosen and applied; what `within` prunes stays pruned.

    What layers receive, where criterion or allocation need it, is measured on the first training images.
    """
    criterion, allocation, pattern = asked.how(seed), asked.sharing(), asked.where()
    batches = calibration(setting)
    views, needs = views_of(model, asked), needed(criterion, allocation)
    with unrecorded() if needs else nullcontext():
        return prune(
            model,
            criterion,
            pattern,
            None if pattern.sparsity is not None else sparsity,
            allocation=allocation,
            views=observable(model, views, asked.include) if needs else views,
            within=within,
            batches=batches,
        )
