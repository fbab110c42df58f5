"""Grids of classifier recipes: seeds, tuning by validation accuracy, shared dense trainings, the numbers of a member.

out/dense/KEY/    a dense training, done once for all members that start from it (see `dense`); or in the grid's `dense`
out/starts/, out/trainings/    what pruning, averages and trainings left, each once for all cells; kept of soups
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from prunus.jobs import METRICS, Job, Show, Store, accuracy_row, accuracy_tables
from prunus.measure import HEADLINES, headline
from prunus.recipe import ClassifierRecipe, Recipe, data_changes, digest, meant, merge, parse, said
from prunus.vision.jobs import forks_after
from prunus.vision.outcome import outcome
from prunus.vision.plan import Plan
from prunus.vision.setting import Setting, count_training
from prunus.vision.stages import operations

__all__ = ["CLASSIFIERS"]

Result = Mapping[str, Any]


class _Classifiers:
    """The task of grids over `ClassifierRecipe`; see `tasks.Task`."""

    threads = measures = True
    row, write = staticmethod(accuracy_row), staticmethod(accuracy_tables)

    def check(self, tune: Mapping[str, Any] | None, show: Show, recipes: Sequence[ClassifierRecipe]) -> None:
        if tune is not None and tune["by"] is None:
            raise ValueError("tune: classifiers are chosen by validation accuracy: by: accuracy, not text")
        strange = [column for column in show.columns if column not in METRICS]
        if strange:
            hint = meant(strange[0], METRICS) or f"there are {', '.join(METRICS)}"
            raise ValueError(f"show.columns: no number {strange[0]!r}; {hint}")

    def columns(self, recipes: Sequence[ClassifierRecipe]) -> set[str]:
        return {*HEADLINES, "dense", "pruned", "metrics", "accuracy by phase"}

    def recipe(self, raw: Mapping[str, Any], seed: int, *, tuning: bool, where: str) -> ClassifierRecipe:
        changes = {"seed": seed, **data_changes(raw, **({"measure_on": "validation"} if tuning else {}))}
        changes |= {"corruptions": None} if tuning else {}
        return cast("ClassifierRecipe", parse(merge(raw, changes), Recipe, where))

    def seeded(self, recipe: ClassifierRecipe) -> bool:
        return True

    def loss(self, result: Result, text: str | None) -> float:
        return -headline(result)[1]

    def needs(self, recipe: ClassifierRecipe) -> tuple[Job, ...]:
        """All its trainings and what they start from."""
        return Plan(recipe).jobs

    def beside(self, recipes: Sequence[ClassifierRecipe]) -> tuple[Job, ...]:
        return ()

    def order(self, recipe: ClassifierRecipe) -> tuple[Any, ...]:
        """Those that choose values first, then the longest, so that the last ones to finish are short."""
        return recipe.data.measure_on != "validation", -_epochs(recipe)

    def look(self, recipes: Sequence[ClassifierRecipe]) -> None:
        """Methods that prune while training have the steps they need; images are read by who trains on them."""
        asked = {digest(said(each, but={"seed"})): each for each in recipes if each.during is not None}
        counts = dict[str, int]()
        for each in asked.values():
            key = repr(each.data)
            counts[key] = counts.get(key) or count_training(each)
            forks_after(each, counts[key])

    @contextmanager
    def prepared(self, recipes: Sequence[ClassifierRecipe]) -> Generator[None]:
        """Read the images and count the operations of each network."""
        networks = {(str(each.data), each.model, repr(each.arguments), each.device): each for each in recipes}
        for recipe in networks.values():
            operations(Setting.anew(recipe))
        yield

    def run(self, recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
        """No model is written but dense ones, and what soups share."""
        return outcome(Plan(recipe), store, picture=False).result


CLASSIFIERS = _Classifiers()


def _epochs(recipe: ClassifierRecipe) -> float:
    """Epochs of a member's own, an estimate to order by."""
    own = recipe.train.epochs if recipe.during is not None or recipe.prune is None else 0
    asked = recipe.retrain
    if asked is None or recipe.prune is None:
        return own
    budget = asked.epochs or (asked.share or 0) * recipe.train.epochs
    members = 1 if recipe.soup is None else recipe.soup.members
    return own + members * budget * (recipe.prune.phases if asked.of == "phase" else 1)
