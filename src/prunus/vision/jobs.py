"""The jobs of a classifier: trainings, prunings, averages. Each is done once in a store, whatever asks for it.

dense/KEY/        the dense training that all begin with: see `dense`
starts/KEY/       a pruned network with its masks, an average, what a method left that pruned while it trained
trainings/KEY/    a training that starts from one of them, and the mean of its snapshots (swa), if it took any

Keys are hashes of what decides the result, the start included. So single runs, soups of 3, 5 and 10 members, and the
baselines of each, share what is alike in them, in one run, between the cells of a grid, and after a kill.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapt import Adaptation, adapt
from prunus.during import Part, cubic
from prunus.jobs import Job, Store, ran_on
from prunus.masks import Masks
from prunus.recipe import ClassifierRecipe, criteria, digest, given, member_of, methods, order_of, said
from prunus.shrink import resized
from prunus.soup import average, average_and_reprune, distance, finish, phase_sparsities
from prunus.train import During, Multiplier, Original, Swa
from prunus.vision import stages
from prunus.vision.dense import dense_key, losses_by_epoch, read_dense, train_dense, watchers
from prunus.vision.setting import Setting, steps_of
from prunus.vision.smaller import smaller
from prunus.vision.soups.averaging import Average, Meter, averaged

__all__ = [
    "ClassifierJobs",
    "Training",
    "Trunk",
    "averaged_job",
    "base_job",
    "forks_after",
    "mean_job",
    "measured_of",
    "network",
    "pruned_job",
    "repruned_job",
    "trained_job",
]

State = Mapping[str, Tensor]
_LOSSES = 100  # kept of a retraining
# What decides only the start, or is said by the job itself.
_ELSEWHERE = {"out", "save", "during", "prune", "retrain", "soup", "corruptions"}


@dataclass(frozen=True)
class ClassifierJobs:
    """Jobs of one network on one set of images, all known from the beginning, for the pool."""

    store: Store
    wanted: tuple[Job, ...]
    recipe: ClassifierRecipe

    def jobs(self) -> Sequence[Job]:
        """All of them."""
        return self.wanted

    def expected(self) -> Sequence[Job]:
        """The same: none joins later."""
        return self.wanted

    @contextmanager
    def prepared(self) -> Generator[None]:
        """Read the images and count the network's operations before any thread trains."""
        stages.operations(Setting.anew(self.recipe))
        yield


def base_job(recipe: ClassifierRecipe) -> Job:
    """What all begin with: the dense training, or one during which a method pruned.

    dense ─▶ prune ─▶ retrain                        in phases
    during a method, to the end ─▶ retrain           on a schedule of its own
    gmp or dpf, until the mask is final ─▶ members   that do the rest of the training
    """
    if recipe.during is None:
        return Job("dense", dense_key(recipe), partial(_train_dense, recipe))
    whole = said(recipe, but={"out": True, "save": True, "soup": True, "retrain": True, "train": {"evaluate_every"}})
    return _start(recipe, ["method", whole, _forks(recipe)], _train_method)


@dataclass(frozen=True)
class Trunk:
    """What was trained before all else: its rates (after a fork the rest included), steps, and what was measured."""

    original: Original
    steps: int
    measured: Mapping[str, Any]

    @classmethod
    def of(cls, base: Job, store: Store) -> Trunk:
        """That of a finished base."""
        found = read_dense(store.path(base)) if base.room == "dense" else None
        if found is not None:
            return cls(found.original, int(found.metrics["steps"]), {"dense": found.metrics})
        numbers = store.result(base)
        return cls(Original.from_runs(numbers["lrs"], numbers["warmup"]), numbers["steps"], numbers["measured"])


def pruned_job(
    recipe: ClassifierRecipe,
    before: Job,
    phase: int,
    within: Job | None = None,
    *,
    base: Job | None = None,
    phases: int | None = None,
) -> Job:
    """A network pruned for a phase (of `phases`, or as many as the recipe has); within: what the phase before pruned.

    base: what was trained first, if that is not `before`: the recipe may rewind to it. All that begin alike share it.
    """
    asked, count, rewind = given(recipe.prune), phases or given(recipe.prune).phases, _rewind(recipe)
    target = phase_sparsities(asked.sparsity, count, asked.ramp)[phase]
    seed, last = recipe.seed + 7919 * phase, phase + 1 == count
    how = [said(asked, but={"sparsity", "phases"}), target, last and [recipe.recalibrate, recipe.data.measured]]
    drawn = seed if "seed" in criteria.takes(asked.criterion) else None
    key = ["pruned", before.key, None if within is None else within.key, how, drawn, rewind]
    needs = tuple(job for job in (before, within, None if rewind is None else base) if job is not None)
    if asked.kind != "zeros":
        return _start(recipe, key, _shrink, needs)
    what = partial(_prune, target=target, seed=seed, last=last, within=within)
    return _start(recipe, key, what, needs)


@dataclass(frozen=True)
class Training:
    """A training that starts from a stored network.

    recipe: of the run; place: the member's, None for a run without members, as the recipe itself says it. phase: from
    0. slower: how many times as long it lasts. whole: as long as in all phases together. swa: share of it after which
    snapshots of every epoch are averaged, besides.
    """

    recipe: ClassifierRecipe
    place: int | None
    phase: int
    slower: int = 1
    whole: bool = False
    swa: float | None = None

    @property
    def own(self) -> ClassifierRecipe:
        """The member's recipe."""
        return member_of(self.recipe, self.place)

    @property
    def ends(self) -> bool:
        """Whether a run ends with it: of one without members, the last phase; members are averaged in each."""
        return self.recipe.soup is not None or self.phase + 1 == given(self.recipe.prune).phases


def trained_job(asked: Training, start: Job, base: Job) -> Job:
    """A training from `start`; base: the training that its rates are those of."""
    own, order = asked.own, order_of(asked.recipe, asked.place)
    prune, alone = given(own.prune), own.soup is None
    recipe, retrain = said(own, but=_ELSEWHERE), None if own.retrain is None else said(own.retrain)
    split = prune.phases if asked.whole or (own.retrain is not None and own.retrain.of == "total") else 1
    how = [asked.phase, asked.slower, asked.whole, asked.swa, order, split]
    key = ["trained", recipe, retrain, how, start.key, base.key, *([asked.ends] if alone else [])]
    needs = (start,) if start is base else (start, base)
    return Job("trainings", digest(key)[:24], partial(_train, asked, base), needs, passing=alone)


def measured_of(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """What was measured of a training at its end."""
    return next(reversed(numbers["measured"].values()))


def averaged_job(recipe: ClassifierRecipe, start: Job, members: Sequence[Job]) -> Job:
    """The average of a phase's members, as the recipe asks for it; start: what they were pruned as."""
    held = recipe.data.validation if recipe.data.measure_on != "test" else None
    how = [given(recipe.soup).average, recipe.recalibrate, held]
    return _start(recipe, ["averaged", how, [member.key for member in members]], _average, (start, *members))


def mean_job(recipe: ClassifierRecipe, members: Sequence[Job]) -> Job:
    """The mean of dense members."""
    return _start(recipe, ["mean", recipe.recalibrate, [member.key for member in members]], _mean, members)


def repruned_job(recipe: ClassifierRecipe, runs: Sequence[tuple[Job, Job]]) -> Job:
    """The mean of runs with masks of their own, pruned again: IMP-RePrune. runs: (what was pruned, the training)."""
    how = [said(given(recipe.prune)), recipe.recalibrate, recipe.seed]
    key = ["repruned", how, [trained.key for _, trained in runs]]
    return _start(recipe, key, _reprune, [job for run in runs for job in run])


def _start(recipe: ClassifierRecipe, key: Any, what: Any, needs: Sequence[Job] = ()) -> Job:
    """What others start from; what a single run does is kept as long as it is needed."""
    brief = recipe.retrain is None and recipe.soup is None  # and is measured next
    return Job("starts", digest(key)[:24], partial(what, recipe), tuple(needs), recipe.soup is None, brief)


def _forks(recipe: ClassifierRecipe) -> bool:
    """Whether members do the rest of a training."""
    return recipe.retrain is None and recipe.soup is not None


def _rewind(recipe: ClassifierRecipe) -> int | None:
    return None if recipe.retrain is None else recipe.retrain.rewind


def network(recipe: ClassifierRecipe, store: Store, job: Job, base: Job) -> nn.Module:
    """What a job left, on the recipe's device, in a network of the shape that pruning gave it."""
    setting = Setting.of(recipe)
    model = setting.new_model()
    if recipe.prune is not None and recipe.prune.kind != "zeros" and job is not base:
        return setting.laid_out(resized(model, store.state(job)))
    model.load_state_dict(store.state(job))
    return model


def forks_after(recipe: ClassifierRecipe, images: int) -> int:
    """Steps of the training that members branch off: all, or those after which a method's mask has its last sparsity.

    DPF, which would go on choosing, is stopped there. images: how many are trained on. Raises ValueError for a mask
    that is final only at the end, and for a training that is too short for a method.
    """
    whole = steps_of(recipe, images, recipe.train.epochs)
    if recipe.during is None:
        return whole
    name, method = _method(recipe)
    method.check(whole, steps_of(recipe, images))
    if not _forks(recipe):
        return whole
    sparsity = given(recipe.prune).sparsity
    last = max(cubic(sparsity, whole, every=method.every, start=method.start, stop=method.stop))
    if last >= whole:
        raise ValueError(
            f"during.{name}: the mask is final only at the end, so nothing is left to members: set during.{name}.stop "
            "below 1, or give a section retrain"
        )
    return last


def _method(recipe: ClassifierRecipe) -> tuple[str, Any]:
    """The name of the method that prunes while training, and itself, with the run's seed and pattern if it has one."""
    name, options = next(iter((recipe.during or {}).items()))
    asked = given(recipe.prune)
    return name, methods.make({name: dict(options)}, asked.sparsity, seed=recipe.seed, pattern=asked.pattern)


def _train_dense(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    setting, folder = Setting.of(recipe), store.path(job)
    found, where = read_dense(folder), ran_on(store.work(job), setting.name)
    if found is not None and found.metrics["key"] != job.key:
        raise ValueError(f"{folder} holds another dense training; give another folder, or delete it")
    found = found or train_dense(setting, folder, checkpoint=store.checkpoint(job), log=store.log)
    return {**found.metrics, **where}


def _train_method(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    setting = Setting.of(recipe)
    where = ran_on(store.work(job), setting.name)
    method = _method(recipe)[1]
    whole, steps = setting.steps(recipe.train.epochs), forks_after(recipe, len(setting.sets.train))
    taking: During = method if steps == whole else Part(method, whole)
    multiplier, warmup = stages.schedule(setting)
    model = setting.new_model()
    trace = stages.fit(
        model,
        setting,
        multiplier,
        steps=steps,
        part=0,
        during=[taking, *watchers(setting, store.log, model, method)],
        views=stages.views_of(model, given(recipe.prune)),
        checkpoint=store.checkpoint(job),
    )
    masks, lost = finish(taking, model)
    reached = dict(method.named_buffers()).get("reached")
    measured = _measure_pruned(model, setting, settles=not _forks(recipe))
    store.write_state(job, model.state_dict(), _on_cpu(masks))
    runs = Original.of([recipe.train.lr * multiplier(step) for step in range(whole)], warmup).runs()
    numbers = {"lrs": runs, "warmup": warmup, "losses": losses_by_epoch(trace.losses, setting.epoch_steps)}
    numbers |= {"steps": steps, "seconds": trace.seconds, "measured": measured}
    numbers |= {"distance": lost, "sparsity": masks.sparsity, **where}
    return numbers | ({} if reached is None else {"reached": float(reached)})


def _measure_pruned(model: nn.Module, setting: Setting, *, settles: bool = True) -> dict[str, Any]:
    """What a pruned network is as it is, and with BatchNorm statistics counted anew; those stay in it."""
    found = {"pruned": stages.measure(model, setting)}
    if settles and stages.settle(model, setting):
        found["recalibrated"] = stages.measure(model, setting)
    return found


def _prune(
    recipe: ClassifierRecipe, job: Job, store: Store, *, target: float, seed: int, last: bool, within: Job | None
) -> dict[str, Any]:
    asked, rewind, setting = given(recipe.prune), _rewind(recipe), Setting.of(recipe)
    earlier, state = None if within is None else store.masks(within), store.state(job.needs[0])
    model = setting.new_model()
    model.load_state_dict(state)
    masks = stages.select(model, target, earlier, asked, seed, setting=setting)
    on_device = Masks({name: mask.to(setting.device) for name, mask in masks.items()})
    lost = distance({name: state[name].to(setting.device) for name in masks}, on_device, earlier)
    if rewind is not None:
        model.load_state_dict(store.state(job.needs[-1], f"epoch-{rewind}"))
        on_device.apply_(model)
    measured = _measure_pruned(model, setting) if last else {}
    store.write_state(job, model.state_dict(), _on_cpu(masks))
    return {"distance": lost, "sparsity": masks.sparsity, "measured": measured}


def _shrink(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    """Make a network really smaller; `network` makes its shape again."""
    setting = Setting.of(recipe)
    model = setting.new_model()
    model.load_state_dict(store.state(job.needs[0]))
    small = smaller(model, setting, given(recipe.prune), recipe.seed)
    measured = _measure_pruned(small.model, setting)
    store.write_state(job, small.model.state_dict())
    numbers = {"distance": small.distance, "sparsity": small.sparsity, "measured": measured, **small.cost}
    return numbers | {"by_layer": dict(small.by_layer), "left_alone": dict(small.left_alone)}


def _train(asked: Training, base: Job, job: Job, store: Store) -> dict[str, Any]:
    own, start = asked.own, job.needs[0]
    setting = replace(Setting.of(own), order=order_of(asked.recipe, asked.place))
    lost, masks = store.result(start).get("distance", 0.0), store.masks(start)
    where = ran_on(store.work(job), setting.name)
    multiplier, steps, peak = _rates(asked, Trunk.of(base, store), lost, setting)
    model = network(own, store, start, base)
    adaptation = _adapted(model, own, masks)
    swa = Swa(asked.swa) if asked.swa is not None else None
    trace = stages.fit(
        model,
        setting,
        multiplier,
        steps=steps,
        part=asked.phase + 1,
        lr=peak,
        masks=masks if adaptation is None else adaptation.held,
        during=[swa] if swa is not None else [],
        views=() if adaptation is not None else None,  # adapters hide layers, and no method that goes on asks for any
        loss=_taught(asked, base, store),
        checkpoint=store.checkpoint(job),
    )
    if adaptation is not None:
        adaptation.merge_()
    if masks is not None:
        masks.check(model)
    measured = _measure_trained(asked, model, setting)
    store.write_state(job, model.state_dict())
    if swa is not None:
        swa.finish()
        store.write_state(job, model.state_dict(), name="swa")
    every = -(-steps // _LOSSES)
    losses = {"losses": losses_by_epoch(trace.losses, every), "every": every}
    numbers = {"steps": steps, "seconds": trace.seconds, "initial_lr": max(trace.lrs)}
    return {"measured": measured, **numbers, **losses, **where}


def _adapted(model: nn.Module, own: ClassifierRecipe, masks: Masks | None) -> Adaptation | None:
    """What of a pruned network is retrained, where that is not everything."""
    asked = own.retrain
    if asked is None or "full" in asked.train:
        return None
    views = [view for view in stages.views_of(model, given(own.prune)) if view.parameter in (masks or {})]
    generator = torch.Generator().manual_seed(own.seed)
    return adapt(model, asked.train, masks=masks, views=views, rank=asked.rank, alpha=asked.alpha, generator=generator)


def _taught(asked: Training, base: Job, store: Store) -> stages.Loss | None:
    """The loss that holds what is retrained against the dense network; None if the recipe asks for no teacher."""
    own = asked.own
    distill = None if own.retrain is None or asked.whole else own.retrain.distill
    if distill is None and own.aim != "embeddings":
        return None
    return stages.taught(network(own, store, base, base), distill, Setting.of(own))


def _measure_trained(asked: Training, model: nn.Module, setting: Setting) -> dict[str, Any]:
    """What a run ends with: as training left it, where it has no members, and with BatchNorm counted anew."""
    if not asked.ends:
        return {}
    found = {"retrained": stages.measure(model, setting)} if asked.recipe.soup is None else {}
    if stages.settle(model, setting) or not found:
        found["settled"] = stages.measure(model, setting)
    return found


def _rates(asked: Training, trunk: Trunk, lost: float, setting: Setting) -> tuple[Multiplier, int, float]:
    """step -> factor of the peak, steps and peak of a training. lost: what pruning took away."""
    own = asked.own
    if own.retrain is None:  # members do the rest of the training
        whole = stages.schedule(setting)[0]
        steps = asked.slower * (trunk.original.steps - trunk.steps)
        return (lambda step: whole(trunk.steps + step // asked.slower)), steps, own.train.lr
    each = own.retrain.budgets(given(own.prune).phases, trunk.original.steps, setting.epoch_steps)
    steps = asked.slower * (sum(each) if asked.whole else each[asked.phase])
    made = own.retrain.multiplier(trunk.original, steps, lost, setting.epoch_steps)
    return made, steps, own.retrain.lr or trunk.original.peak


def _average(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    start, *members = job.needs
    masks = store.masks(start)
    assert masks is not None
    asked: Average = given(recipe.soup).average
    states, base = [store.state(member) for member in members], store.state(start)
    state, shares = averaged(asked, states, base, masks, Meter.of(recipe))
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
    asked, parameters = given(recipe.prune), dict(meter.model.named_parameters())
    for name, value in mean.items():
        parameters[name].copy_(value)
    return _on_cpu(stages.select(meter.model, asked.sparsity, None, asked, recipe.seed, setting=meter.setting))


def _on_cpu(masks: Masks) -> Masks:
    return Masks({name: mask.cpu() for name, mask in masks.items()})
