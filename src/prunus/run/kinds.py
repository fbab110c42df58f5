"""What a grid must know of the recipes it varies: the one place where compression and classifier grids differ.

A kind reads its recipes, says what tuning minimises and what must run first, runs a member, and draws the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prunus.run.grid import Grid, Member, Tune

__all__ = ["Bench", "Kind", "kind_of"]

Result = Mapping[str, Any]


class Bench(Protocol):
    """Runs members, one after another, and keeps between them what they share."""

    def run(self, member: Member) -> dict[str, Any]:
        """A member's numbers."""
        ...


class Kind(Protocol):
    """What differs between kinds of recipes."""

    @property
    def together(self) -> bool:
        """Whether members may run at once in threads of one process."""
        ...

    def check(self, grid: Grid) -> None:
        """Raise ValueError for a section of the grid that does not go with this kind."""
        ...

    def recipe(self, raw: Mapping[str, Any], seed: int, *, tuning: bool, where: str) -> Any:
        """The checked recipe of a member; tuning: of one that chooses a value."""
        ...

    def seeded(self, recipe: Any) -> bool:
        """Whether the result depends on the seed."""
        ...

    def loss(self, result: Result, tune: Tune) -> float:
        """What the chosen value makes smallest."""
        ...

    def first(self, members: Sequence[Member]) -> dict[str, Member]:
        """Member key -> the member that must run before it, because others share what it leaves."""
        ...

    def ready(self, grid: Grid, first: Member, finished: Mapping[str, Result]) -> bool:
        """Whether a member that runs first has left what others need; finished: results known already."""
        ...

    def order(self, member: Member) -> tuple[Any, ...]:
        """Members of one seed run in this order."""
        ...

    def prepare(self, members: Sequence[Member]) -> None:
        """Called once in each process, before any thread runs members. Raises for inputs that are not there."""
        ...

    def bench(self, grid: Grid) -> Bench:
        """What runs the members of one thread."""
        ...

    def row(self, results: Sequence[Result]) -> dict[str, Any]:
        """What a table says of one cell, from the results of its seeds; {"mean", "std"} for what is averaged."""
        ...

    def write(self, grid: Grid, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Result]) -> None:
        """Write table.md and the pictures of the rows into the grid's folder."""
        ...


def kind_of(base: Mapping[str, Any]) -> Kind:
    """The kind of a base recipe: with the key `images` it is a classifier's."""
    if "images" in base:
        from prunus.run.vision.grid import CLASSIFIERS

        return CLASSIFIERS
    from prunus.run.texts import TEXTS

    return TEXTS
