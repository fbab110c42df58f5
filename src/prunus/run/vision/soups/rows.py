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

from torch import Tensor

from prunus.masks import Masks
from prunus.measure import ensemble_accuracy
from prunus.run.vision import stages
from prunus.run.vision.soups.begin import Begin
from prunus.run.vision.soups.branches import on_device
from prunus.run.vision.soups.chains import Cooked, Phase
from prunus.run.vision.soups.mixing import mixer
from prunus.run.vision.soups.outside import outside
from prunus.soup import distances
from prunus.train import alone

__all__ = ["Rows"]

State = Mapping[str, Tensor]


class Rows:
    """The rows of the table, each measured once."""

    def __init__(self, begin: Begin, found: Mapping[str, Any]) -> None:
        self.begin, self.found, self.asked = begin, found, begin.recipe.soup
        self.soup: Cooked = found["soup"]
        self.last: Phase = self.soup.phases[-1]
        self.rows: list[dict[str, Any]] = []
        self.networks: dict[str, State] = {"soup": self.soup.state}  # of which corruptions are measured, too

    def result(self) -> dict[str, Any]:
        """Everything but what lies between members."""
        begin = self.begin
        before = {**begin.measured, **(self._pruned() if begin.masks is None else {})}
        if "dense" in before:
            self._add("dense", begin.measure(begin.settled(begin.state)), None, 0)
        soup = begin.measure(self.soup.state)
        self._add(f"soup, {_how(self.asked.average)}", soup, self.soup.masks, self.soup.steps, "soup")
        self._members()
        self._baselines()
        own = {key: value for key, value in soup.items() if key != "top1"}
        cost = stages.cost_of(begin.model, self.soup.masks, begin.setting)
        steps = begin.steps + self.soup.steps
        result: dict[str, Any] = {"accuracy": soup["top1"], **own}
        result |= {"measured_on": begin.recipe.images.measured, "stages": before | {"retrained": soup}}
        result |= {"phases": [self._phase(index) for index in range(len(self.soup.phases))]}
        result |= {"rows": self.rows, "soup": {row["name"]: row["accuracy"] for row in self.rows}}
        result |= {"sparsity": self.soup.masks.sparsity, "steps": steps, "epochs": steps / begin.setting.epoch_steps}
        result |= self._corrupted()
        trained = sum(begin.store.numbers(branch)["seconds"] for branch in self.soup.members)
        result |= {"train_seconds": trained, **cost}
        return result | {"by_layer": {n: 1 - kept / total for n, (kept, total) in self.soup.masks.table().items()}}

    def _pruned(self) -> dict[str, Any]:
        """The network that the last phase's members start from, as pruning left it and with BatchNorm settled."""
        before = self.soup.phases[-2].mixed.state if len(self.soup.phases) > 1 else self.begin.state
        self.last.masks.apply_(self.begin.put(before))
        found = {"pruned": stages.measure(self.begin.model, self.begin.setting)}
        if self.begin.recipe.recalibrate and stages.has_batchnorm(self.begin.model):
            found["recalibrated"] = self.begin.measure(self.begin.store.start(self.last.branches[0].start)[0])
        return found

    def _members(self) -> None:
        """What else the last phase's members give: other averages, their mean, the best of them, the ensemble."""
        begin, masks, steps = self.begin, self.last.masks, self.soup.steps
        for word in self.asked.also:
            mixed = mixer(word, begin.setting, begin.model)(begin.store, self.last.branches, masks)
            found = begin.measure(mixed.state) | {"shares": list(mixed.shares)}
            self._add(f"soup, last phase {word}", found, masks, steps, word)
        singles = [begin.store.numbers(branch)["measured"] for branch in self.last.branches]
        own = [branch.steps for branch in self.last.branches]
        mean = {
            key: statistics.fmean(each[key] for each in singles) for key in singles[0] if _all_numbers(singles, key)
        }
        best = max(singles, key=lambda each: each["top1"])
        self._add("mean member", mean, masks, steps - sum(own) + statistics.fmean(own), "mean_member")
        self._add("best member", best, masks, steps, "best_member")
        models = [copy.deepcopy(begin.put(begin.store.state(branch))) for branch in self.last.branches]
        with alone():
            together = ensemble_accuracy(models, begin.setting.measured(), precision=begin.setting.precision)
        self._add("ensemble", asdict(together), masks, steps, "ensemble", networks=len(models))

    def _baselines(self) -> None:
        """What was asked for beside the soup."""
        begin, found = self.begin, self.found
        if "imp" in found:
            self._cooked(self._single(), "imp")
        if "longer" in found:
            if "longer" in self.asked.baselines:
                self._cooked(f"{self._single()}, {self.asked.members} times as long", "longer")
            if "swa" in self.asked.baselines:
                run: Cooked = found["longer"]
                mean = begin.settled(begin.store.mean(run.phases[-1].branches[0]))
                self._add(f"SWA in that longer {self._single()}", begin.measure(mean), run.masks, run.steps, "swa")
        if "reprune" in found:
            self._cooked("IMP-RePrune", "reprune")
        if "dense" in found:
            mean, shot, again = found["dense"]
            steps = shot.steps
            self._add("dense soup", begin.measure(mean), None, steps, "dense_soup")
            self._add("dense soup, pruned", begin.measure(shot.state), shot.masks, steps, "dense_soup_pruned")
            name = "dense soup, retrained"
            self._add(name, begin.measure(again.state), again.masks, again.steps, "dense_soup_retrained")

    def _single(self) -> str:
        """What a run without members is called."""
        return "imp" if self.begin.recipe.during is None else next(iter(self.begin.recipe.during))

    def _cooked(self, label: str, name: str) -> None:
        run: Cooked = self.found[name]
        self._add(label, self.begin.measure(run.state), run.masks, run.steps, name)
        if name in ("imp", "longer"):
            self.networks[name] = run.state

    def _corrupted(self) -> dict[str, Any]:
        """What the soup and what stands beside it make of corrupted images, if that is asked for; see `outside`."""
        if self.begin.recipe.corruptions is None:
            return {}
        found = outside(self.begin, self.networks, self.last.branches)
        for row in self.rows:
            if row["name"] in found:
                row["corrupted"] = found[row["name"]]["mean"]
        return {"corrupted": {**found["soup"], "rows": found}}

    def _add(
        self,
        label: str,
        measured: Mapping[str, Any],
        masks: Masks | None,
        steps: float,
        name: str = "dense",
        *,
        networks: int = 1,
    ) -> None:
        """A row. steps: of training after the dense one. inference: operations, as a share of the dense network's."""
        begin = self.begin
        cost = stages.cost_of(begin.model, masks, begin.setting) if masks is not None else None
        share = 1.0 if cost is None else cost["sparse_flops"] / cost["dense_flops"]
        row = {
            "row": label,
            "name": name,
            "accuracy": measured["top1"],
            **{k: v for k, v in measured.items() if k != "top1"},
        }
        row |= {
            "sparsity": 0.0 if masks is None else masks.sparsity,
            "networks": networks,
            "inference": networks * share,
        }
        self.rows.append(row | {"epochs": (begin.steps + steps) / begin.setting.epoch_steps})

    def _phase(self, index: int) -> dict[str, Any]:
        """One phase of the soup: its members, and what the other runs had reached by then."""
        begin, phase = self.begin, self.soup.phases[index]
        numbers = [begin.store.numbers(branch) for branch in phase.branches]
        accuracies = [each["measured"]["top1"] for each in numbers]
        states = on_device([begin.store.state(branch) for branch in phase.branches], begin.setting.device)
        row: dict[str, Any] = {"phase": index + 1, "sparsity": phase.masks.sparsity, "distance": phase.distance}
        steps = statistics.fmean(branch.steps for branch in phase.branches)
        row |= {
            "share": min(1.0, steps / begin.original.steps),
            "steps": steps,
            "epochs": steps / begin.setting.epoch_steps,
        }
        row |= {"initial_lr": statistics.fmean(each["initial_lr"] for each in numbers), "members": accuracies}
        row |= {"soup": begin.measure(phase.mixed.state)["top1"], "shares": list(phase.mixed.shares)}
        with alone():
            row |= {"between": distances(states, list(phase.masks)).summary() if len(states) > 1 else {}}
        for name in ("imp", "longer"):
            if name in self.found:
                row[name] = begin.store.numbers(self.found[name].phases[index].branches[0])["measured"]["top1"]
        return row


def _how(average: Any) -> str:
    return average if isinstance(average, str) else "given weights"


def _all_numbers(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    return all(isinstance(row[key], (int, float)) for row in rows)
