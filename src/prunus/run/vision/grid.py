"""Grids of classifier recipes: seeds, tuning by validation accuracy, shared dense trainings, the bench of a member.

out/dense/KEY/    a dense training, done once for all members that start from it (see `dense`); or in the grid's `dense`
out/work/KEY/     a member that is being run, or was killed: it goes on from there
out/soups/        the members of soups, and what they start from, each once for all cells (see `soups.branches`)
"""

from __future__ import annotations

import difflib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.run.kinds import Bench, Result
from prunus.run.recipe import merge, parse
from prunus.run.vision.recipe import ClassifierRecipe, dense_key, dense_of
from prunus.run.vision.soups.recipe import SoupRecipe, class_of

if TYPE_CHECKING:
    from prunus.run.grid import Grid, Member, Tune
    from prunus.run.vision.setting import Setting

__all__ = ["CLASSIFIERS"]


class _Classifiers:
    """The kind of grids over `ClassifierRecipe`; see `kinds.Kind`."""

    together = True

    def check(self, grid: Grid) -> None:
        from prunus.run.vision.tables import METRICS

        if grid.tune is not None and grid.tune.by is None:
            raise ValueError("tune: classifiers are chosen by validation accuracy: by: accuracy, not text")
        strange = [column for column in grid.show.columns if column not in METRICS]
        if strange:
            close = difflib.get_close_matches(strange[0], METRICS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(METRICS)}"
            raise ValueError(f"show.columns: no number {strange[0]!r}; {hint}")

    def recipe(self, raw: Mapping[str, Any], seed: int, *, tuning: bool, where: str) -> ClassifierRecipe:
        changes: dict[str, Any] = {"seed": seed}
        if isinstance(raw.get("images"), str):
            changes["images.source"] = raw["images"]
        if tuning:
            changes |= {"images.measure_on": "validation", "corruptions": None}
        merged = merge(dict(raw), changes)
        return parse(merged, class_of(merged), where)

    def seeded(self, recipe: ClassifierRecipe) -> bool:
        return True

    def loss(self, result: Result, tune: Tune) -> float:
        return -float(result["accuracy"])

    def first(self, members: Sequence[Member]) -> dict[str, Member]:
        """The dense training that a member starts from; methods that prune during training start from none."""
        from prunus.run.grid import Member

        plain = [member for member in members if member.recipe.prune is None]
        alone = {dense_key(member.recipe): member for member in reversed(plain)}
        found: dict[str, Member] = {}
        for member in members:
            if member.recipe.during is None:
                own = Member(member.labels, member.seed, {}, dense_of(member.recipe))
                before = alone.setdefault(dense_key(member.recipe), own)
                if before.key != member.key:
                    found[member.key] = before
        return found

    def ready(self, grid: Grid, first: Member, finished: Mapping[str, Result]) -> bool:
        return (_dense_folder(grid, first.recipe) / "metrics.json").exists()

    def order(self, member: Member) -> tuple[Any, ...]:
        """Those that choose values first, then the longest, so that the last ones to finish are short."""
        return member.recipe.images.measure_on != "validation", -_epochs(member.recipe)

    def prepare(self, members: Sequence[Member]) -> None:
        """Read the images and count the operations of each network."""
        from prunus.run.vision.setting import Setting
        from prunus.run.vision.stages import operations

        recipes = {(str(m.recipe.images), m.recipe.model, m.recipe.device): m.recipe for m in members}
        for recipe in recipes.values():
            operations(Setting.of(recipe))

    def bench(self, grid: Grid) -> Bench:
        return _Bench(grid)

    def row(self, results: Sequence[Result]) -> dict[str, Any]:
        from prunus.run.vision.tables import row

        return row(results)

    def write(self, grid: Grid, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Result]) -> None:
        from prunus.run.vision.tables import write

        write(grid, rows)


CLASSIFIERS = _Classifiers()


class _Bench:
    """Runs members; images and dense networks are kept by the process, so that its threads share them."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.out = grid, Path(grid.out)

    def run(self, member: Member) -> dict[str, Any]:
        """A member's numbers; no model is written but dense ones, and what soups share."""
        from prunus.run.vision.experiment import experiment
        from prunus.run.vision.setting import Setting

        setting, work = Setting.of(member.recipe), self.out / "work" / member.key
        folder = _dense_folder(self.grid, member.recipe)
        of_soup = isinstance(member.recipe, SoupRecipe)
        found = self._soup(setting, folder) if of_soup else experiment(setting, folder, work=work).result
        shutil.rmtree(work, ignore_errors=True)
        head: dict[str, Any] = {"labels": member.labels, "seed": member.seed, "tuned": member.tuned}
        return {**head, **found, "device": setting.name, "recipe": member.recipe.model_dump(mode="json")}

    def _soup(self, setting: Setting, folder: Path) -> dict[str, Any]:
        """A soup's numbers; its members are trained once for all soups of the grid, whoever needs one first."""
        from prunus.run.vision.soups.branches import Store
        from prunus.run.vision.soups.experiment import soup_experiment
        from prunus.run.vision.soups.pools import OneByOne

        store = Store(self.out / "soups")
        return soup_experiment(setting, folder, store, OneByOne(store), picture=False).result


def _dense_folder(grid: Grid, recipe: ClassifierRecipe) -> Path:
    return Path(grid.dense or Path(grid.out) / "dense") / dense_key(recipe)


def _epochs(recipe: ClassifierRecipe) -> float:
    """Epochs of a member's own, an estimate to order by."""
    own = recipe.train.epochs if recipe.during is not None or recipe.prune is None else 0
    asked = recipe.retrain
    if asked is None or recipe.prune is None:
        return own
    budget = asked.epochs or (asked.share or 0) * recipe.train.epochs
    members = recipe.soup.members if isinstance(recipe, SoupRecipe) else 1
    return own + members * budget * (recipe.prune.phases if asked.of == "phase" else 1)
