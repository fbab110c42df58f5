"""The jobs of a soup: what its members start from, their trainings, their averages. Each is done once in a store.

starts/KEY/       a pruned network with its masks, an average, what a method left that pruned while it trained
trainings/KEY/    a training that starts from one of them, and the mean of its snapshots (swa), if it took any

Keys are hashes of what decides the result, the start included. So soups of 3, 5 and 10 members, and the baselines of
each, share their trainings, in one run, between the cells of a grid, and after a kill.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prunus.during import Part, cubic
from prunus.masks import Masks
from prunus.run.names import criteria
from prunus.run.recipe import ClassifierRecipe, digest, given, member_of, order_of, said
from prunus.run.store import Job, Store
from prunus.run.vision import stages
from prunus.run.vision.dense import read_dense
from prunus.run.vision.experiment import finished, method_of
from prunus.run.vision.setting import Setting
from prunus.run.vision.soups.averaging import Average, Meter, averaged, plain_state
from prunus.run.vision.starts import dense_job
from prunus.soup import average, average_and_reprune, distance, phase_sparsities
from prunus.train import During, Multiplier, Original, Swa

__all__ = [
    "Training",
    "Trunk",
    "averaged_job",
    "base_job",
    "forks_after",
    "mean_job",
    "pruned_job",
    "repruned_job",
    "trained_job",
]

State = Mapping[str, Tensor]
# What decides only the start, or is said by the job itself.
_ELSEWHERE = {"out", "save", "during", "prune", "retrain", "soup", "corruptions"}


def base_job(recipe: ClassifierRecipe) -> Job:
    """What all begin with: the dense training, or one during which a method pruned.

    dense ─▶ prune ─▶ members                        in phases
    during a method, to the end ─▶ members           that are retrained on a schedule of their own
    gmp or dpf, until the mask is final ─▶ members   that do the rest of the training
    """
    if recipe.during is None:
        return dense_job(recipe)
    whole = said(recipe, but={"out": True, "save": True, "soup": True, "retrain": True, "train": {"evaluate_every"}})
    return Job("starts", digest(["method", whole, recipe.retrain is None])[:24], partial(_train_method, recipe))


@dataclass(frozen=True)
class Trunk:
    """What was trained before the members: its rates (after a fork the rest included), steps, and what was measured."""

    original: Original
    steps: int
    measured: Mapping[str, Any]

    @classmethod
    def of(cls, base: Job, store: Store, meter: Meter | None = None) -> Trunk:
        """That of a finished base; meter: measures a dense network, of which others may have measured else."""
        found = read_dense(store.path(base)) if base.room == "dense" else None
        if found is not None:
            measured = {} if meter is None else {"dense": meter.measure(found.state)}
            return cls(found.original, int(found.metrics["steps"]), measured)
        numbers = store.result(base)
        return cls(Original.from_runs(numbers["lrs"], numbers["warmup"]), numbers["steps"], numbers["measured"])


def pruned_job(recipe: ClassifierRecipe, before: Job, phase: int, within: Job | None, phases: int | None = None) -> Job:
    """A network pruned for a phase (of `phases`, or as many as the recipe has); within: what the phase before pruned.

    Every baseline, and every soup of the grid that begins alike, needs it as well.
    """
    asked = recipe.prune
    assert asked is not None
    target = phase_sparsities(asked.sparsity, phases or asked.phases)[phase]
    last, seed = target == asked.sparsity, recipe.seed + 7919 * phase  # as `experiment` draws them
    how = [said(asked, but={"sparsity", "phases"}), target, last and recipe.recalibrate]
    drawn = seed if "seed" in criteria.takes(asked.criterion) else None
    key = digest(["pruned", before.key, None if within is None else within.key, how, drawn])[:24]
    needs = (before,) if within is None else (before, within)
    return Job("starts", key, partial(_prune, recipe, target, seed), needs)


@dataclass(frozen=True)
class Training:
    """A training that starts from a stored network.

    recipe: of the soup; place: the member's, None for a run without members, as the recipe itself says it. phase: from
    0. slower: how many times as long it lasts. whole: as long as in all phases together. swa: share of it after which
    snapshots of every epoch are averaged, besides.
    """

    recipe: ClassifierRecipe
    place: int | None
    phase: int
    slower: int = 1
    whole: bool = False
    swa: float | None = None


def trained_job(asked: Training, start: Job, base: Job) -> Job:
    """A member's training from `start`; base: the training that its rates are those of."""
    own, order = member_of(asked.recipe, asked.place), order_of(asked.recipe, asked.place)
    assert own.prune is not None
    recipe, retrain = said(own, but=_ELSEWHERE), None if own.retrain is None else said(own.retrain)
    split = own.prune.phases if asked.whole or (own.retrain is not None and own.retrain.of == "total") else 1
    how = [asked.phase, asked.slower, asked.whole, asked.swa, order, split]
    key = digest(["trained", recipe, retrain, how, start.key, base.key])[:24]
    needs = (start,) if start is base else (start, base)
    return Job("trainings", key, partial(_train, asked, base), needs)


def averaged_job(recipe: ClassifierRecipe, start: Job, members: Sequence[Job]) -> Job:
    """The average of a phase's members, as the recipe asks for it; start: what they were pruned as."""
    held = recipe.images.validation if recipe.images.measure_on != "test" else None
    how = [given(recipe.soup).average, recipe.recalibrate, held]
    key = digest(["averaged", how, [member.key for member in members]])[:24]
    return Job("starts", key, partial(_average, recipe), (start, *members))


def mean_job(recipe: ClassifierRecipe, members: Sequence[Job]) -> Job:
    """The mean of dense members."""
    key = digest(["mean", recipe.recalibrate, [member.key for member in members]])[:24]
    return Job("starts", key, partial(_mean, recipe), tuple(members))


def repruned_job(recipe: ClassifierRecipe, runs: Sequence[tuple[Job, Job]]) -> Job:
    """The mean of runs with masks of their own, pruned again: IMP-RePrune. runs: (what was pruned, the training)."""
    assert recipe.prune is not None
    how = [said(recipe.prune), recipe.recalibrate, recipe.seed]
    key = digest(["repruned", how, [trained.key for _, trained in runs]])[:24]
    return Job("starts", key, partial(_reprune, recipe), tuple(job for run in runs for job in run))


def forks_after(setting: Setting) -> int:
    """Steps of the training that members branch off: all, or those after which a method's mask has its last sparsity.

    DPF, which would go on choosing, is stopped there. Raises ValueError for a mask that is final only at the end.
    """
    recipe, whole = setting.recipe, setting.steps(setting.recipe.train.epochs)
    if recipe.during is None or recipe.retrain is not None:
        return whole
    assert recipe.prune is not None
    name, options = next(iter(recipe.during.items()))
    method: Any = method_of(name, options, recipe.prune.sparsity, recipe.seed)
    last = max(cubic(recipe.prune.sparsity, whole, every=method.every, start=method.start, stop=method.stop))
    if last >= whole:
        raise ValueError(
            f"during.{name}: the mask is final only at the end, so nothing is left to members: set during.{name}.stop "
            "below 1, or give a section retrain"
        )
    return last


def _train_method(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    assert recipe.during is not None
    assert recipe.prune is not None
    setting = Setting.of(recipe)
    name, options = next(iter(recipe.during.items()))
    method = method_of(name, options, recipe.prune.sparsity, recipe.seed)
    whole, steps = setting.steps(recipe.train.epochs), forks_after(setting)
    taking: During = method if steps == whole else Part(method, whole)
    multiplier, warmup = stages.schedule(setting)
    model = setting.new_model()
    trace = stages.fit(
        model,
        setting,
        multiplier,
        steps=steps,
        part=0,
        during=[taking],
        views=stages.views_of(model, recipe.prune),
        checkpoint=store.checkpoint(job),
    )
    masks, lost = finished(taking, name, model)
    measured = {"pruned": stages.measure(model, setting)}
    if recipe.retrain is not None and recipe.recalibrate and stages.has_batchnorm(model):  # as `experiment` does
        stages.recalibrate(model, setting)
        measured["recalibrated"] = stages.measure(model, setting)
    store.write_state(job, model.state_dict(), _on_cpu(masks))
    runs = Original.of([recipe.train.lr * multiplier(step) for step in range(whole)], warmup).runs()
    return {
        "lrs": runs,
        "warmup": warmup,
        "steps": steps,
        "seconds": trace.seconds,
        "measured": measured,
        "distance": lost,
    }


def _prune(recipe: ClassifierRecipe, target: float, seed: int, job: Job, store: Store) -> dict[str, Any]:
    asked = recipe.prune
    assert asked is not None
    before, *more = job.needs
    within = store.masks(more[0]) if more else None
    meter, state = Meter.of(recipe), store.state(before)
    masks = stages.select(meter.put(state), target, within, asked, seed, setting=meter.setting)
    pruned: State = plain_state(meter.model)
    if target == asked.sparsity:  # the last phase begins with settled statistics, as that of `experiment` does
        pruned = meter.settled(pruned)
    store.write_state(job, pruned, _on_cpu(masks))
    device = meter.setting.device
    on_device = Masks({name: mask.to(device) for name, mask in masks.items()})
    return {"distance": distance({name: state[name].to(device) for name in masks}, on_device, within)}


def _train(asked: Training, base: Job, job: Job, store: Store) -> dict[str, Any]:
    own, start = member_of(asked.recipe, asked.place), job.needs[0]
    setting = replace(Setting.of(own), order=order_of(asked.recipe, asked.place))
    lost = store.result(start).get("distance", 0.0)
    multiplier, steps, peak = _rates(asked, Trunk.of(base, store), lost, setting)
    model, masks = setting.new_model(), store.masks(start)
    model.load_state_dict(store.state(start))
    swa = Swa(asked.swa) if asked.swa is not None else None
    trace = stages.fit(
        model,
        setting,
        multiplier,
        steps=steps,
        part=asked.phase + 1,
        lr=peak,
        masks=masks,
        during=[swa] if swa is not None else [],
        checkpoint=store.checkpoint(job),
    )
    if masks is not None:
        masks.check(model)
    stages.settle(model, setting)
    held = stages.measure_held(model, setting) if setting.sets.held is not None else None
    numbers = {"measured": stages.measure(model, setting), "held": held, "steps": steps}
    store.write_state(job, model.state_dict())
    if swa is not None:
        swa.finish()
        store.write_state(job, model.state_dict(), name="swa")
    return numbers | {"seconds": trace.seconds, "initial_lr": max(trace.lrs)}


def _rates(asked: Training, trunk: Trunk, lost: float, setting: Setting) -> tuple[Multiplier, int, float]:
    """step -> factor of the peak, steps and peak of a training. lost: what pruning took away."""
    own = member_of(asked.recipe, asked.place)
    assert own.prune is not None
    if own.retrain is None:  # members do the rest of the training
        whole = stages.schedule(setting)[0]
        steps = asked.slower * (trunk.original.steps - trunk.steps)
        return (lambda step: whole(trunk.steps + step // asked.slower)), steps, own.train.lr
    each = own.retrain.budgets(own.prune.phases, trunk.original.steps, setting.epoch_steps)
    steps = asked.slower * (sum(each) if asked.whole else each[asked.phase])
    return own.retrain.multiplier(trunk.original, steps, lost), steps, own.retrain.lr or trunk.original.peak


def _average(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    start, *members = job.needs
    masks = store.masks(start)
    assert masks is not None
    asked: Average = given(recipe.soup).average
    state, shares = averaged(asked, [store.state(member) for member in members], masks, Meter.of(recipe))
    store.write_state(job, state)
    return {"shares": shares}


def _mean(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    store.write_state(job, Meter.of(recipe).settled(average([store.state(member) for member in job.needs])))
    return {}


def _reprune(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    meter, states = Meter.of(recipe), [store.state(trained) for trained in job.needs[1::2]]
    masks = [mask for mask in map(store.masks, job.needs[::2]) if mask is not None]
    state, again = average_and_reprune(states, masks, select=lambda mean, _: _select(recipe, meter, mean))
    store.write_state(job, meter.settled(state), _on_cpu(again))
    return {}


@torch.no_grad()
def _select(recipe: ClassifierRecipe, meter: Meter, mean: State) -> Masks:
    """Masks as the recipe chooses them, of an average of which only the prunable tensors are given."""
    asked, parameters = recipe.prune, dict(meter.model.named_parameters())
    assert asked is not None
    for name, value in mean.items():
        parameters[name].copy_(value)
    return _on_cpu(stages.select(meter.model, asked.sparsity, None, asked, recipe.seed, setting=meter.setting))


def _on_cpu(masks: Masks) -> Masks:
    return Masks({name: mask.cpu() for name, mask in masks.items()})
