"""The table of a soup: a row for it and for each run that it is compared with, and the numbers of its phases.

Each row says what training it took in all, in epochs, and what inference costs, as a share of the dense network's
operations: the theoretical cost of a machine that skips zeros, times the networks that are asked.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from prunus.jobs import Job, Store
from prunus.masks import Masks
from prunus.measure import Ensemble, ensemble_accuracy
from prunus.recipe import averages, given
from prunus.soup import distances
from prunus.train import unrecorded
from prunus.vision import stages
from prunus.vision.jobs import Trunk, measured_of
from prunus.vision.plan import Plan, Run, before_retraining
from prunus.vision.soups.averaging import Meter, averaged, on_device

__all__ = ["Rows"]

State = Mapping[str, Tensor]


class Rows:
    """The rows of the table, each measured once."""

    def __init__(self, plan: Plan, store: Store, meter: Meter) -> None:
        self.plan, self.recipe, self.runs, self.store, self.meter = plan, plan.recipe, plan.runs, store, meter
        self.asked, self.soup = given(plan.recipe.soup), plan.runs["soup"]
        self.base, self.last = plan.base, self.soup.phases[-1]
        self.trunk = Trunk.of(plan.base, store)
        self.masks = self._masks(self.last.pruned)
        self.rows: list[dict[str, Any]] = []

    def result(self) -> dict[str, Any]:
        """Everything but the geometry of the members."""
        before = before_retraining(self.plan, self.soup, self.store)
        if "dense" in before:
            self._add("dense", "dense", self.meter.measure(self.meter.settled(self.store.state(self.base))), None, 0)
        soup = self.meter.measure(self.store.state(self.soup.state))
        taken = self.soup.steps(self.store)
        self._add("soup", f"soup, {_how(self.asked.average)}", soup, self.masks, taken)
        self._members(taken)
        self._baselines()
        steps, epoch = self.trunk.steps + taken, self.meter.setting.epoch_steps
        result: dict[str, Any] = {"accuracy": soup["top1"], **{k: v for k, v in soup.items() if k != "top1"}}
        result |= {"measured_on": self.recipe.images.measured, "stages": before | {"retrained": soup}}
        result |= {"phases": [self._phase(index) for index in range(len(self.soup.phases))]}
        result |= {"rows": self.rows, "soup": {row["name"]: row["accuracy"] for row in self.rows}}
        result |= {"sparsity": self.masks.sparsity, "steps": steps, "epochs": steps / epoch}
        result |= self._corrupted()
        result["train_seconds"] = sum(self.store.result(job)["seconds"] for job in self.soup.trainings)
        result |= stages.cost_of(self.meter.model, self.masks, self.meter.setting)
        return result | {"by_layer": {n: 1 - kept / total for n, (kept, total) in self.masks.table().items()}}

    def _masks(self, job: Job) -> Masks:
        masks = self.store.masks(job)
        assert masks is not None
        return masks

    def _members(self, taken: int) -> None:
        """What else the last phase's members give: other averages, their mean, the best of them, the ensemble."""
        states, base = [self.store.state(job) for job in self.last.members], self.store.state(self.last.pruned)
        for word, asked in self.asked.further.items():
            state, shares = averaged(asked, states, base, self.masks, self.meter)
            self._add(
                word, f"soup, last phase {word}", self.meter.measure(state) | {"shares": [*shares]}, self.masks, taken
            )
        results = [self.store.result(job) for job in self.last.members]
        singles, own = [measured_of(each) for each in results], [each["steps"] for each in results]
        keys = [key for key in singles[0] if all(isinstance(each[key], (int, float)) for each in singles)]
        mean = {key: statistics.fmean(each[key] for each in singles) for key in keys}
        self._add("mean_member", "mean member", mean, self.masks, taken - sum(own) + statistics.fmean(own))
        best = max(singles, key=lambda each: each["top1"])
        self._add("best_member", "best member", best, self.masks, taken)
        models = [copy.deepcopy(self.meter.put(state)) for state in states]
        with unrecorded():
            found = ensemble_accuracy(models, self.meter.setting.measured(), precision=self.meter.setting.precision)
        self._add("ensemble", "ensemble", asdict(found), self.masks, taken, networks=len(models))

    def _baselines(self) -> None:
        """What was asked for beside the soup."""
        single = "imp" if self.recipe.during is None else next(iter(self.recipe.during))
        labels = {"imp": single, "longer": f"{single}, {self.asked.members} times as long", "swa": ""}
        labels |= {"reprune": "IMP-RePrune", "dense_soup": "dense soup", "dense_soup_pruned": "dense soup, pruned"}
        labels |= {"dense_soup_retrained": "dense soup, retrained"}
        for name, label in labels.items():
            if name == "swa" and "swa" in self.asked.baselines:
                run = self.runs["longer"]
                mean = self.meter.settled(self.store.state(run.phases[-1].members[0], "swa"))
                self._run(name, f"SWA in that longer {single}", run, mean)
            elif name in self.runs and (name != "longer" or "longer" in self.asked.baselines):
                self._run(name, label, self.runs[name], self.store.state(self.runs[name].state))

    def _run(self, name: str, label: str, run: Run, state: State) -> None:
        masks = None if run.masks is None else self._masks(run.masks)
        self._add(name, label, self.meter.measure(state), masks, run.steps(self.store))

    def _corrupted(self) -> dict[str, Any]:
        """What the soup and what stands beside it make of corrupted images, if that is asked for."""
        if self.recipe.corruptions is None:
            return {}
        named = ["soup", *(name for name in ("imp", "longer") if name in self.asked.baselines)]
        states = {name: self.store.state(self.runs[name].state) for name in named}
        found = _on_corrupted(self.meter, self.store, states, self.last.members)
        for row in self.rows:
            if row["name"] in found:
                row["corrupted"] = found[row["name"]]["mean"]
        return {"corrupted": {**found["soup"], "rows": found}}

    def _add(
        self,
        name: str,
        label: str,
        measured: Mapping[str, Any],
        masks: Masks | None,
        steps: float,
        *,
        networks: int = 1,
    ) -> None:
        """A row. steps: of training after the dense one. inference: operations, as a share of the dense network's."""
        setting = self.meter.setting
        cost = stages.cost_of(self.meter.model, masks, setting) if masks is not None else None
        share = 1.0 if cost is None else cost["sparse_flops"] / cost["dense_flops"]
        row = {"row": label, "name": name, "accuracy": measured["top1"]}
        row |= {key: value for key, value in measured.items() if key != "top1"}
        row |= {"sparsity": 0.0 if masks is None else masks.sparsity, "networks": networks}
        row |= {"inference": networks * share, "epochs": (self.trunk.steps + steps) / setting.epoch_steps}
        self.rows.append(row)

    def _phase(self, index: int) -> dict[str, Any]:
        """One phase of the soup: its members, and what the other runs had reached by then."""
        phase, setting, store = self.soup.phases[index], self.meter.setting, self.store
        numbers = [store.result(job) for job in phase.members]
        states = on_device([store.state(job) for job in phase.members], setting.device)
        masks, steps = self._masks(phase.pruned), statistics.fmean(each["steps"] for each in numbers)
        row: dict[str, Any] = {"phase": index + 1, "sparsity": masks.sparsity}
        row |= {
            "distance": store.result(phase.pruned)["distance"],
            "share": min(1.0, steps / self.trunk.original.steps),
        }
        row |= {"steps": steps, "epochs": steps / setting.epoch_steps}
        row["initial_lr"] = statistics.fmean(each["initial_lr"] for each in numbers)
        row["members"] = [measured_of(each)["top1"] for each in numbers]
        row["soup"] = self.meter.measure(store.state(phase.average))["top1"]
        row["shares"] = store.result(phase.average)["shares"]
        with unrecorded():
            row["between"] = distances(states, list(masks)).summary() if len(states) > 1 else {}
        for name in ("imp", "longer"):
            if name in self.runs:
                row[name] = measured_of(store.result(self.runs[name].phases[index].members[0]))["top1"]
        return row


def _how(average: Any) -> str:
    return "given weights" if isinstance(average, tuple) else averages.name(average)


def _on_corrupted(
    meter: Meter, store: Store, states: Mapping[str, Mapping[str, Tensor]], members: Sequence[Job]
) -> dict[str, Any]:
    """Name -> {"mean", "by_severity", "by_name"} over all corrupted sets, of each state and of what members give.

    The best member is that of the highest accuracy on images as they are. All networks are measured on a set before the
    next one is made or read.
    """
    asked = meter.setting.recipe.corruptions
    assert asked is not None
    networks: dict[str, nn.Module] = {name: copy.deepcopy(meter.put(state)) for name, state in states.items()}
    singles = [copy.deepcopy(meter.put(store.state(member))) for member in members]
    networks |= {f"member {place}": single for place, single in enumerate(singles)} | {"ensemble": Ensemble(singles)}
    whole = stages.all_corrupted(networks, meter.setting, asked)
    found = {name: {key: value for key, value in each.items() if key != "sets"} for name, each in whole.items()}
    each = [found.pop(f"member {place}") for place in range(len(members))]
    clean = [measured_of(store.result(member))["top1"] for member in members]
    return found | {"mean_member": _mean(each), "best_member": each[max(range(len(each)), key=clean.__getitem__)]}


def _mean(found: Sequence[Any]) -> Any:
    """The mean of numbers at the leaves of equal mappings."""
    if not isinstance(found[0], Mapping):
        return statistics.fmean(found)
    return {key: _mean([each[key] for each in found]) for key in found[0]}
