"""What is made of a run when all its jobs are done: its network, its numbers, and of a soup a row for each run."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prunus.jobs import Job, Store
from prunus.machine import read_json
from prunus.masks import Masks
from prunus.measure import CORRUPTIONS, headline, weight_change
from prunus.report import progress
from prunus.vision import stages
from prunus.vision.jobs import Trunk, network
from prunus.vision.plan import Plan, Run, before_retraining
from prunus.vision.setting import Setting
from prunus.vision.soups.averaging import Meter
from prunus.vision.soups.geometry import Geometry, geometry
from prunus.vision.soups.rows import Rows

__all__ = ["Outcome", "outcome"]

_KEPT = (
    "top5",
    "loss",
    "calibration_error",
    "maximum_calibration_error",
    "worst_class",
    "images",
    "texts",
    "spearman",
    "pearson",
)


@dataclass(frozen=True)
class Outcome:
    """A finished run: the network, its masks (None when dense or smaller), its numbers.

    trace: learning rates as runs and losses by epoch of the first training; losses of each phase's. geometry: what lies
    between the members of a soup.
    """

    model: nn.Module
    masks: Masks | None
    result: dict[str, Any]
    trace: Mapping[str, Any] = field(default_factory=dict[str, Any])
    geometry: Geometry | None = None


def outcome(plan: Plan, store: Store, *, picture: bool = True) -> Outcome:
    """Measured, from a store in which all of the plan's jobs are finished. picture: the plane of three members, too.

    Its seconds are those of measuring and of all trainings but a dense one, which others share.
    """
    started = time.perf_counter()
    found = _single(plan, store) if plan.recipe.soup is None else _soup(plan, store, picture=picture)
    own = [job for job in plan.jobs if job.room == "trainings" or (job is plan.base and plan.recipe.during is not None)]
    trained = sum(store.result(job)["seconds"] for job in own)
    found.result["seconds"] = trained + time.perf_counter() - started
    return found


def _soup(plan: Plan, store: Store, *, picture: bool) -> Outcome:
    meter = Meter.of(plan.recipe)
    rows = Rows(plan, store, meter)
    result, found = rows.result(), None
    members = [store.state(job) for job in rows.last.members]
    if len(members) > 1:
        found = geometry(meter, members, list(rows.masks), picture=picture)
        result["between"] = found.numbers()
    return Outcome(meter.put(store.state(rows.soup.state)), rows.masks, result, geometry=found)


def _single(plan: Plan, store: Store) -> Outcome:
    """Dense or pruned, in phases or at once, each of its stages measured by the job that ended it."""
    recipe, run, setting = plan.recipe, plan.runs["single"], Setting.of(plan.recipe)
    trunk, model = Trunk.of(plan.base, store), network(recipe, store, run.state, plan.base)
    found = before_retraining(plan, run, store)
    for job in run.trainings:
        found |= store.result(job)["measured"]
    if next(reversed(found)) not in ("recalibrated", "settled") and stages.settle(model, setting):
        found["settled"] = stages.measure(model, setting)
    last, masks = next(reversed(found.values())), None if run.masks is None else store.masks(run.masks)
    result = {**dict([headline(last)]), **{key: last[key] for key in last if key in _KEPT}}
    result |= {"measured_on": recipe.data.measured, "stages": found, "phases": _phases(plan, run, trunk, store)}
    result |= {"sparsity": 0.0 if masks is None else masks.sparsity, **_work(plan, run, trunk, store)}
    result |= _sizes(plan, run, model, masks, store)
    if recipe.corruptions is not None:
        sets = len(recipe.corruptions.names or CORRUPTIONS) * len(recipe.corruptions.severities)
        with progress("corruptions", sets) as advance:
            result["corrupted"] = stages.corrupted(model, setting, recipe.corruptions, advance)
    return Outcome(model, masks, result, _trace(plan.base, store) | {"phases": _losses(run, store)})


def _work(plan: Plan, run: Run, trunk: Trunk, store: Store) -> dict[str, Any]:
    """How much was trained in all, and how fast."""
    asked, epoch = plan.recipe.train, Setting.of(plan.recipe).epoch_steps
    numbers = [store.result(job) for job in run.trainings]
    steps = trunk.steps + sum(each["steps"] for each in numbers)
    seconds = store.result(plan.base)["seconds"] + sum(each["seconds"] for each in numbers)
    speed = steps * asked.batch_size / max(seconds, 1e-9)
    left = {key: value for key, value in store.result(plan.base).items() if key == "left_of_start"}
    return {"epochs": steps / epoch, "steps": steps, "train_seconds": seconds, "images_per_second": speed, **left}


def _phases(plan: Plan, run: Run, trunk: Trunk, store: Store) -> list[dict[str, Any]]:
    """A row for each phase: what pruning took away, and how it was retrained."""
    recipe, rows = plan.recipe, list[dict[str, Any]]()
    if recipe.during is not None and recipe.retrain is None:
        return rows
    epoch = Setting.of(recipe).epoch_steps
    for index, phase in enumerate(run.phases):
        pruned, retrain = store.result(phase.pruned), recipe.retrain
        row = {"phase": index + 1, "sparsity": pruned["sparsity"], "distance": pruned["distance"]}
        if retrain is not None:
            trained = store.result(phase.members[0])
            share = min(1.0, trained["steps"] / trunk.original.steps)
            begun = min(1.0, max(pruned["distance"], share)) * (retrain.lr or trunk.original.peak)
            row |= {"share": share, "initial_lr": begun if retrain.schedule == "allr" else trained["initial_lr"]}
            row |= {"steps": trained["steps"], "epochs": trained["steps"] / epoch}
        rows.append(row)
    return rows


def _losses(run: Run, store: Store) -> list[dict[str, Any]]:
    """Losses of each phase's retraining, each a mean over `every` steps."""
    trained = (store.result(phase.members[0]) for phase in run.phases)
    return [{key: found[key] for key in ("losses", "every") if key in found} for found in trained]


def _sizes(plan: Plan, run: Run, model: nn.Module, masks: Masks | None, store: Store) -> dict[str, Any]:
    """What the network costs, and how its layers share the sparsity."""
    pruned = {} if run.masks is None else store.result(run.masks)
    found = {key: pruned[key] for key in ("reached",) if key in pruned}
    if run.masks is not None and masks is None:  # a smaller network
        return {key: value for key, value in pruned.items() if key not in ("distance", "measured")}
    if masks is None:
        return found
    found |= stages.cost_of(model, masks, Setting.of(plan.recipe))
    found["by_layer"] = {name: 1 - kept / total for name, (kept, total) in masks.table().items()}
    if plan.base.room == "dense":
        before = store.state(plan.base)
        after = {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}
        found["weight_change"] = weight_change({name: before[name] for name in after}, after)
    return found


def _trace(base: Job, store: Store) -> dict[str, Any]:
    return read_json(store.path(base) / "trace.json") if base.room == "dense" else store.result(base)
