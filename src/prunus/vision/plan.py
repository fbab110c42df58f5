"""A run of a classifier as a graph of jobs: a soup and what it is compared with, or one member and nothing beside it.

    base ─┬─ soup: prune ─▶ members ─▶ average, * phases        longer, imp: the same with one member
          ├─ reprune: m runs of imp ─▶ mean ─▶ prune again
          └─ dense: m dense members ─▶ mean ─▶ prune ─▶ retrain

The loop is `prunus.soup.sms` over jobs: it says what is made of what, and the pool makes whatever is ready. After a
method that prunes during training there is one phase, under its masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prunus.jobs import Job, Store
from prunus.recipe import ClassifierRecipe, given
from prunus.soup import Souped, sms
from prunus.vision.jobs import (
    Training,
    Trunk,
    averaged_job,
    base_job,
    mean_job,
    pruned_job,
    repruned_job,
    trained_job,
)
from prunus.vision.soups.averaging import Meter

__all__ = ["Plan", "Run", "before_retraining"]

Phase = Souped[Job, Job, Job]
Average = Callable[[Job, tuple[Job, ...]], Job]


@dataclass(frozen=True)
class Run:
    """What a run ends with, a network and the job that left its masks; its trainings; its phases, if it has any."""

    state: Job
    masks: Job | None
    trainings: tuple[Job, ...]
    phases: tuple[Phase, ...] = ()

    @property
    def jobs(self) -> list[Job]:
        """All of them, in the order in which they are wanted."""
        phases = [job for each in self.phases for job in (each.pruned, *each.members, each.average)]
        return [*phases, *self.trainings, *([] if self.masks is None else [self.masks]), self.state]

    def steps(self, store: Store) -> int:
        """Training steps after the dense training, each training once."""
        return sum(store.result(job)["steps"] for job in {job.key: job for job in self.trainings}.values())


@dataclass(frozen=True)
class Plan:
    """The runs that a recipe asks for, by the names of their rows; `single` is one without members."""

    recipe: ClassifierRecipe

    @cached_property
    def base(self) -> Job:
        """What all begin with."""
        return base_job(self.recipe)

    @cached_property
    def runs(self) -> dict[str, Run]:
        """The soup and its baselines; a longer run also takes the snapshots of stochastic weight averaging.

        After a method that pruned there is neither another mask to average over nor a dense network.
        """
        if self.recipe.soup is None:
            return {"single": self._run([None], _single)}
        asked, dense = self.recipe.soup, self.recipe.during is None
        runs = {"soup": self._run(range(asked.members), lambda *phase: averaged_job(self.recipe, *phase))}
        if "imp" in asked.baselines:
            runs["imp"] = self._run([None], _single)
        if "reprune" in asked.baselines and dense:
            runs["reprune"] = self._repruned()
        if "dense" in asked.baselines and dense:
            runs |= self._dense()
        if "longer" in asked.baselines or "swa" in asked.baselines:
            swa = asked.swa if "swa" in asked.baselines else None
            runs["longer"] = self._run([None], _single, slower=asked.members, swa=swa)
        return runs

    @cached_property
    def jobs(self) -> tuple[Job, ...]:
        """All jobs, each once, in the order in which they are wanted."""
        return tuple(
            {job.key: job for job in (self.base, *(j for run in self.runs.values() for j in run.jobs))}.values()
        )

    def _run(self, places: Sequence[int | None], average: Average, *, slower: int = 1, swa: float | None = None) -> Run:
        """The loop. places: the members of each phase; [None] is one run as the recipe itself says it, which is imp."""
        recipe, base = self.recipe, self.base
        if recipe.prune is None:
            return Run(base, None, ())
        count = recipe.prune.phases

        def prune(state: Job, phase: int, before: Job | None) -> Job:
            if recipe.during is not None:
                return state
            return pruned_job(recipe, state, phase, before, base=None if state is base else base)

        def retrain(start: Job, phase: int, member: int) -> Job:
            if recipe.retrain is None and recipe.soup is None:
                return start
            last = phase + 1 == count
            return trained_job(Training(recipe, places[member], phase, slower, swa=swa if last else None), start, base)

        phases = sms(base, phases=count, members=len(places), prune=prune, retrain=retrain, average=average)
        trainings = tuple(job for phase in phases for job in phase.members if job is not phase.pruned)
        return Run(phases[-1].average, phases[-1].pruned, trainings, tuple(phases))

    def _repruned(self) -> Run:
        """As many runs of imp as members, averaged and pruned again; in one phase this is the uniform soup."""
        runs = [self._run([place], _single) for place in range(given(self.recipe.soup).members)]
        pairs = [(run.phases[-1].pruned, run.state) for run in runs]
        state = repruned_job(self.recipe, pairs)
        return Run(state, state, tuple(job for run in runs for job in run.trainings))

    def _dense(self) -> dict[str, Run]:
        """An average of dense members; pruned in one shot; and that retrained once, as a member of the soup is.

        Each dense member is trained on, without masks, for as long as a member of the soup is in all phases together.
        """
        recipe = self.recipe
        assert recipe.prune is not None
        asked = [Training(recipe, place, 0, whole=True) for place in range(given(recipe.soup).members)]
        members = tuple(trained_job(each, self.base, self.base) for each in asked)
        mean = mean_job(recipe, members)
        shot = pruned_job(recipe, mean, 0, None, phases=1)
        again = trained_job(Training(recipe, None, recipe.prune.phases - 1), shot, self.base)
        return {
            "dense_soup": Run(mean, None, members),
            "dense_soup_pruned": Run(shot, shot, members),
            "dense_soup_retrained": Run(again, shot, (*members, again)),
        }


def _single(_: Job, members: tuple[Job, ...]) -> Job:
    """The one member, as its training left it."""
    return members[0]


def before_retraining(plan: Plan, run: Run, store: Store) -> dict[str, Any]:
    """Stage -> what was measured of the network that all begin with, and of what the last phase pruned.

    A dense network is measured anew if it was measured on other images than this recipe is.
    """
    found, measured = dict(Trunk.of(plan.base, store).measured), plan.recipe.data.measured
    dense = found.get("dense")
    if dense is not None:
        if dense.get("measured_on", measured) != measured:
            own = Meter.of(plan.recipe).measure(store.state(plan.base))
            dense = {**dense, **own, "measured_on": measured}
        found["dense"] = {key: value for key, value in dense.items() if key not in ("key", "seconds")}
    return found | ({} if run.masks is None else store.result(run.masks)["measured"])
