"""A grid of recipes: which members it has, in which order, and which value each tuned cell gets.

    base: {...}                                   a compression or a classifier recipe
    axes: {criterion: {wanda: {prune.criterion: wanda}, ...}, pattern: {...}, method: {...}}
    tune: {text: validation, axis: method,        or by: accuracy, for classifiers
           cells: {norms: {key: retrain.lr, values: [1e-4, 1e-3], at: {criterion: wanda}}}}
    seeds: [0]; more_seeds: {seeds: [1, 2], where: {pattern: ["50 %"]}}; skip: [{pattern: ["70 %"], method: [full]}]

Tuned values are chosen by the perplexity on `text`, or by the accuracy on validation images, in the cells named by
`at`, with the first seed, and used by every other cell that differs from them only along the axes of `at`. Without
`key` each value is a mapping of keys, so that several are chosen together. Nothing here runs anything.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator, model_validator

from prunus.jobs import Job, Layout, Show, Store, device_name, device_of, ran_on
from prunus.machine import json_line, json_value
from prunus.recipe import Folder, Seed, Strict, digest, merge, parse, read_yaml, said, yaml_value
from prunus.run.tasks import Task, task_of
from prunus.train import lowest

__all__ = ["Grid", "Member", "final_members", "likely_members", "load_grid", "tuning_members"]

Labels = dict[str, str]


def _plain(label: Any) -> Any:
    """A number as JSON writes it; YAML has read 60% as 0.6, and 1e-3 as 0.001, where they name no key."""
    return json.dumps(label) if isinstance(label, int | float) else label


Label = Annotated[str, BeforeValidator(_plain)]  # of an axis, which `_found` finds


class Tried(Strict):
    """One dotted recipe key and the values tried for it, in the cells that have the labels `at`.

    Without `key` each value is a mapping of dotted keys to values.
    """

    key: str | None = None
    values: list[Any] = Field(min_length=1)
    at: dict[str, Label] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Tried:
        if self.key is None and not all(isinstance(value, dict) for value in self.values):
            raise ValueError("give the key that the values belong to, or mappings of keys as values")
        return self

    def overrides(self) -> list[dict[str, Any]]:
        """What each try sets: dotted keys and their values."""
        return [dict(value) if self.key is None else {self.key: value} for value in self.values]


class Tune(Strict):
    """What is tuned for each label along `axis`, by the perplexity on `text` or by accuracy on validation images."""

    text: str | None = None
    by: Literal["accuracy"] | None = None
    axis: str
    cells: dict[str, Tried]


class MoreSeeds(Strict):
    """Further seeds for the cells whose labels are all among those listed."""

    seeds: list[Seed]
    where: dict[str, list[Label]]


class Grid(Strict):
    """A checked grid; see the module's docstring.

    dense: the folder of dense trainings of classifiers, which grids that name the same one share; default: out/dense.
    """

    base: dict[str, Any]
    axes: dict[str, Annotated[dict[str, dict[str, Any]], Field(min_length=1)]] = Field(min_length=1)
    tune: Tune | None = None
    seeds: list[Seed] = Field(default=[0], min_length=1)
    more_seeds: MoreSeeds | None = None
    skip: list[dict[str, list[Label]]] = Field(default_factory=list)
    show: Show = Show()
    out: Folder = "runs/compare"
    dense: Folder | None = None

    @field_validator("tune")
    @classmethod
    def _of_tune(cls, tune: Tune | None, known: ValidationInfo) -> Tune | None:
        cells = {} if tune is None else tune.cells
        at = {
            name: {axis: _found(each, axis, known) for axis, each in tried.at.items()} for name, tried in cells.items()
        }
        named = {name: tried.model_copy(update={"at": at[name]}) for name, tried in cells.items()}
        return tune and tune.model_copy(update={"cells": named})

    @field_validator("more_seeds")
    @classmethod
    def _of_seeds(cls, more: MoreSeeds | None, known: ValidationInfo) -> MoreSeeds | None:
        return more and more.model_copy(update={"where": _all_found(more.where, known)})

    @field_validator("skip")
    @classmethod
    def _of_skip(cls, skip: list[dict[str, list[str]]], known: ValidationInfo) -> list[dict[str, list[str]]]:
        return [_all_found(where, known) for where in skip]

    @model_validator(mode="after")
    def _check(self) -> Grid:
        named = [axis for where in self._wheres() for axis in where]
        named += [axis for axis in (self.show.across, self.show.lines) if axis is not None]
        if self.tune is not None:
            named += [self.tune.axis, *(axis for tried in self.tune.cells.values() for axis in tried.at)]
        strange = [axis for axis in named if axis not in self.axes]
        if strange:
            raise ValueError(f"{strange[0]!r} is not an axis; there are {', '.join(self.axes)}")
        self._check_labels()
        self._check_sections()
        self._check_anchors()
        recipes = self.recipes(self.seeds[0])
        if not recipes:
            raise ValueError("skip leaves no cell, so nothing would be run: leave out an entry")
        self._check_seeds(recipes)
        self.task.check(None if self.tune is None else {"text": self.tune.text, "by": self.tune.by}, self.show, recipes)
        taken = {"seeds", "tuned", *self.task.columns(recipes)}
        if axis := next((axis for axis in self.axes if axis in taken), None):
            raise ValueError(f"axes: {axis!r} is a column of the grid's table already; give the axis another name")
        tuning_members(self)
        return self

    def _check_seeds(self, recipes: Sequence[Any]) -> None:
        seeds = [*self.seeds, *(self.more_seeds.seeds if self.more_seeds else [])]
        twice = [seed for place, seed in enumerate(seeds) if seed in seeds[:place]]
        if twice:
            raise ValueError(f"seeds: {twice[0]} stands twice, and a mean would count it twice; give each once")
        if len(seeds) > 1 and not any(self.task.seeded(recipe) for recipe in recipes):
            raise ValueError(
                f"seeds: no cell trains or reconstructs, so {len(seeds)} seeds would be one run; leave them "
                "out, or draw other windows by an axis of calibrate.seed"
            )

    def _check_labels(self) -> None:
        named = [(axis, each) for where in self._wheres() for axis, labels in where.items() for each in labels]
        if self.tune is not None:
            named += [(self.tune.axis, name) for name in self.tune.cells]
            named += [pair for tried in self.tune.cells.values() for pair in tried.at.items()]
        for axis, label in named:
            if label not in self.axes[axis]:
                raise ValueError(f"{label!r} is not a label of {axis}; there are {', '.join(self.axes[axis])}")
        for axis, label in ((axis, label) for axis, labels in self.axes.items() for label in labels):
            if json_value(json_line(label)) != label:
                raise ValueError(f"axes: {axis}: {label!r} would be read as a number in tables; call it otherwise")

    def _check_sections(self) -> None:
        """A section given whole must not drop what was set in it before: cells would differ in labels alone."""
        for labels in self.cells():
            said = [(axis, key) for axis, label in labels.items() for key in self.axes[axis][label]]
            for (before, key), (axis, section) in itertools.combinations(said, 2):
                own = self.axes[axis][labels[axis]]
                if key.startswith(f"{section}.") and isinstance(own[section], dict) and not _has(merge({}, own), key):
                    raise ValueError(
                        f"axes: {axis}: {labels[axis]}: {section!r} leaves out {key!r}, which {labels[before]!r} of "
                        f"{before} sets before it; let the section come first, or give dotted keys ({section}.KEY)"
                    )

    def _check_anchors(self) -> None:
        cells = list(self.cells())
        for labels in cells:
            tried = self.tuned(labels)
            anchor = {**labels, **(tried.at if tried is not None else {})}
            if tried is not None and self.tune is not None and anchor not in cells:
                name = labels[self.tune.axis]
                raise ValueError(
                    f"{' / '.join(anchor.values())} is skipped, and {name} is tuned there; change its `at`"
                )

    def _wheres(self) -> list[dict[str, list[str]]]:
        return [*self.skip, *([self.more_seeds.where] if self.more_seeds else [])]

    @property
    def task(self) -> Task:
        """What its recipes are for."""
        return task_of(self.base)

    @property
    def store(self) -> Store:
        """Where its members are, and what they share."""
        out = Path(self.out)
        return Store(out, {"dense": Path(self.dense or out / "dense")})

    @property
    def layout(self) -> Layout:
        """What its tables are made with."""
        return Layout({axis: list(labels) for axis, labels in self.axes.items()}, self.show, Path(self.out))

    def cells(self) -> Iterator[Labels]:
        """Every combination of one label per axis, but those that an entry of `skip` names in all its axes."""
        for combination in itertools.product(*(options for options in self.axes.values())):
            labels = dict(zip(self.axes, combination, strict=True))
            if not any(_named(labels, where) for where in self.skip):
                yield labels

    def recipe(self, labels: Mapping[str, str], seed: int, tuned: Mapping[str, Any], *, tuning: bool = False) -> Any:
        """The recipe of one member; tuning: of one that chooses a value."""
        raw = self.base
        for axis, label in labels.items():
            raw = merge(raw, self.axes[axis][label])
        return self.task.recipe(merge(raw, dict(tuned)), seed, tuning=tuning, where=" / ".join(labels.values()))

    def recipes(self, seed: int) -> list[Any]:
        """Those of all cells, of a tuned one with each value that may be chosen: without any it is not run."""
        return [self.recipe(labels, seed, each) for labels in self.cells() for each in self.choices(labels)]

    def choices(self, labels: Mapping[str, str]) -> list[dict[str, Any]]:
        """What may be set in a cell: dotted keys and their values; nothing, where nothing is tuned."""
        tried = self.tuned(labels)
        return [{}] if tried is None else tried.overrides()

    def tuned(self, labels: Mapping[str, str]) -> Tried | None:
        """What is tried for a cell, or None when nothing is tuned there."""
        return self.tune.cells.get(labels[self.tune.axis]) if self.tune is not None else None

    def cell_seeds(self, labels: Mapping[str, str]) -> list[int]:
        """The seeds of a cell."""
        more = self.more_seeds
        if more is not None and _named(labels, more.where):
            return [*self.seeds, *more.seeds]
        return self.seeds


def _found(label: str, axis: str, known: ValidationInfo) -> str:
    """What an axis of the grid calls a label that YAML may have read as a number; a strange one as it is."""
    names = known.data.get("axes", {}).get(axis, {})  # none where they are wrong themselves
    return label if label in names else next((name for name in names if _plain(_read(name)) == label), label)


def _has(said: Any, dotted: str) -> bool:
    """Whether nested mappings say something of a dotted key."""
    for part in dotted.split("."):
        if not isinstance(said, dict) or part not in said:
            return False
        said = said[part]
    return True


def _all_found(where: Mapping[str, list[str]], known: ValidationInfo) -> dict[str, list[str]]:
    return {axis: [_found(each, axis, known) for each in labels] for axis, labels in where.items()}


def _read(name: str) -> Any:
    """What YAML makes of a label where it names no key: a number, or itself."""
    try:
        value = yaml_value(name, name)
    except ValueError:
        return name
    return value if isinstance(value, int | float) else name


def _named(labels: Mapping[str, str], where: Mapping[str, list[str]]) -> bool:
    return all(labels[axis] in options for axis, options in where.items())


@dataclass(frozen=True)
class Member:
    """One run of the grid."""

    labels: Labels
    seed: int
    tuned: dict[str, Any]
    recipe: Any
    task: Task

    @cached_property
    def key(self) -> str:
        """Name of the member's result file: a hash of what decides the result."""
        return digest(said(self.recipe, but={"out", "save"}))[:24]

    @cached_property
    def job(self) -> Job:
        """What it is for the pool."""
        return Job("members", self.key, self._run, self.task.needs(self.recipe), brief=self.task.measures)

    def _run(self, job: Job, store: Store) -> dict[str, Any]:
        """Its numbers, with labels, seed, tuned values and recipe."""
        needs = [store.result(need) for need in job.needs]
        where = ran_on(store.work(job), device_name(device_of(self.recipe)), needs)
        head = {"labels": self.labels, "seed": self.seed, "tuned": self.tuned}
        return head | {"recipe": self.recipe.model_dump(mode="json")} | self.task.run(self.recipe, job, store) | where


def tuning_members(grid: Grid) -> list[Member]:
    """The members that choose tuned values: anchor cells, first seed, every value."""
    members: list[Member] = []
    for labels in grid.cells():
        tried = grid.tuned(labels)
        if tried is not None and {**labels, **tried.at} == labels:
            members += [_trial(grid, labels, overrides) for overrides in tried.overrides()]
    return members


def final_members(
    grid: Grid,
    results: Mapping[str, Mapping[str, Any]],
    *,
    ended: Collection[str] | None = None,
) -> list[Member]:
    """Every cell and seed with its chosen value; cells whose value cannot be chosen yet are left out.

    results: member key -> result, of the tuning members too. ended: keys of tuning members; a cell with a try that is
    not among them is left out, whatever results it has.
    """
    members: list[Member] = []
    for labels in grid.cells():
        tries = _tries(grid, labels)
        if ended is not None and not all(key in ended for key, _ in tries):
            continue
        tuned = _chosen(grid, tries, results)
        if tuned is not None:
            members += _seeded(grid, labels, tuned)
    return members


def likely_members(grid: Grid, results: Mapping[str, Mapping[str, Any]]) -> list[Member]:
    """Every cell and seed, with the best value known so far, or the first that will be tried."""
    members: list[Member] = []
    for labels in grid.cells():
        tries = _tries(grid, labels)
        tuned = _chosen(grid, tries, results)
        members += _seeded(grid, labels, tries[0][1] if tuned is None else tuned)
    return members


def _seeded(grid: Grid, labels: Labels, tuned: dict[str, Any]) -> list[Member]:
    seeds = grid.cell_seeds(labels) if _random(grid, labels) else grid.seeds[:1]
    return [_member(grid, labels, seed, tuned) for seed in seeds]


def _tries(grid: Grid, labels: Labels) -> list[tuple[str, dict[str, Any]]]:
    """Key and values of each member that chooses for a cell; none for a cell that is not tuned."""
    tried = grid.tuned(labels)
    if tried is None:
        return []
    anchor = {**labels, **tried.at}
    return [(_trial(grid, anchor, overrides).key, overrides) for overrides in tried.overrides()]


def _chosen(
    grid: Grid, tries: Sequence[tuple[str, dict[str, Any]]], results: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The best of the tried values, nothing for a cell that is not tuned, None when no try is finished."""
    if not tries or grid.tune is None:
        return {}
    ended = [(key, overrides) for key, overrides in tries if key in results]
    losses = [grid.task.loss(results[key], grid.tune.text) for key, _ in ended]
    return ended[lowest(losses)][1] if losses else None


def _random(grid: Grid, labels: Labels) -> bool:
    """Whether a cell's result depends on the seed: pruning alone does not."""
    return grid.task.seeded(grid.recipe(labels, 0, grid.choices(labels)[0]))


def _member(grid: Grid, labels: Labels, seed: int, tuned: dict[str, Any]) -> Member:
    return Member(dict(labels), seed, tuned, grid.recipe(labels, seed, tuned), grid.task)


def _trial(grid: Grid, labels: Labels, tuned: dict[str, Any]) -> Member:
    return Member(dict(labels), grid.seeds[0], tuned, grid.recipe(labels, grid.seeds[0], tuned, tuning=True), grid.task)


def load_grid(
    path: Path, out: Path | None = None, dense: Path | None = None, changes: Mapping[str, Any] | None = None
) -> Grid:
    """The checked grid of a YAML file; every member's recipe is checked too. dense: unless the file names a folder.
    changes: dotted keys and their values.

    Raises ValueError naming the cell and the key of the first recipe that is wrong.
    """
    raw = _changed(read_yaml(path), changes or {})
    return parse(({"dense": str(dense)} if dense else {}) | raw | ({"out": str(out)} if out else {}), Grid, str(path))


def _changed(raw: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The grid with dotted keys set; those of a label stay dotted, or a new section would replace what it says."""
    for dotted, value in changes.items():
        path = dotted.split(".", 3)
        if len(path) < 4 or path[0] != "axes":
            raw = merge(raw, {dotted: value})
            continue
        said: Any = raw
        for part in path[:3]:
            said = said.get(part) if isinstance(said, dict) else None
        raw = merge(raw, {".".join(path[:3]): {**(said if isinstance(said, dict) else {}), path[3]: value}})
    return raw
