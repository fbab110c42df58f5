"""What a grid must know of the recipes it varies: the one place where language models and classifiers differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from prunus.jobs import Job, Layout, Show, Store
from prunus.recipe import data_key

__all__ = ["Task", "task_of"]

Result = Mapping[str, Any]


class Task(Protocol):
    """What differs between kinds of recipes."""

    @property
    def threads(self) -> bool:
        """Whether members may run at once in threads of one process."""
        ...

    @property
    def measures(self) -> bool:
        """Whether a member's own job only measures what others that it needs have trained."""
        ...

    def check(self, tune: Mapping[str, Any] | None, show: Show, recipes: Sequence[Any]) -> None:
        """Raise ValueError for what does not go with this task. tune: the `text` or the word `by` that it goes by;
        recipes: of all cells."""
        ...

    def columns(self, recipes: Sequence[Any]) -> set[str]:
        """What `row` says beside the labels, of any of these recipes."""
        ...

    def recipe(self, raw: Mapping[str, Any], seed: int, *, tuning: bool, where: str) -> Any:
        """The checked recipe of a member; tuning: of one that chooses a value."""
        ...

    def seeded(self, recipe: Any) -> bool:
        """Whether the result depends on the seed."""
        ...

    def loss(self, result: Result, text: str | None) -> float:
        """What the chosen value makes smallest."""
        ...

    def needs(self, recipe: Any) -> tuple[Job, ...]:
        """What a member starts from, which others share."""
        ...

    def beside(self, recipes: Sequence[Any]) -> tuple[Job, ...]:
        """What is done once for a whole grid."""
        ...

    def order(self, recipe: Any) -> tuple[Any, ...]:
        """Members of one seed begin in this order."""
        ...

    def run(self, recipe: Any, job: Job, store: Store) -> dict[str, Any]:
        """A member's numbers."""
        ...

    def look(self, recipes: Sequence[Any]) -> None:
        """Raise ValueError, before any job, for what recipes name that can be seen not to be what it should."""
        ...

    def prepared(self, recipes: Sequence[Any]) -> AbstractContextManager[Any]:
        """Entered once in each process around its members. Raises for inputs that are not there."""
        ...

    def row(self, results: Sequence[Result]) -> dict[str, Any]:
        """What a table says of one cell, from the results of its seeds; {"mean", "std"} for what is averaged."""
        ...

    def write(self, layout: Layout, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write table.md and the pictures of the rows into the grid's folder."""
        ...


def task_of(base: Mapping[str, Any]) -> Task:
    """The task of a base recipe: with the key `images` or `texts` it is a classifier's."""
    if data_key(base) is not None:
        from prunus.vision import CLASSIFIERS

        return CLASSIFIERS
    from prunus.language import LANGUAGE

    return LANGUAGE
