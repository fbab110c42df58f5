"""Run grids: what others start from, the members that choose values, then all; nothing finished is repeated.

out/members/KEY.json   a member's result (complete or absent)    out/table.*   what is made of them, in `tables`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from prunus.jobs import Job, Workers, check_inputs, check_outside, mark, pictures_of, read_results, run
from prunus.machine import json_line, write_json, write_text
from prunus.recipe import Unfinished
from prunus.run.grid import Grid, Member, final_members, likely_members, load_grid, tuning_members

__all__ = ["GridJobs", "compare", "compare_all", "load_grid", "load_grids", "tabulate"]


def compare(grid: Grid, **asked: Any) -> list[dict[str, Any]]:
    """One row a cell of one grid; all else as `compare_all`."""
    return compare_all([grid], **asked)[0]


def compare_all(
    grids: Sequence[Grid],
    *,
    workers: int = 1,
    together: int = 1,
    ray: str | None = None,
    minutes: float | None = None,
) -> list[list[dict[str, Any]]]:
    """For each grid one row a cell, as `tabulate` writes them to its folder, after every member has run.

    Members of all grids run side by side, those of the first before the others where both could: one that leaves most
    of a GPU idle has company. workers, together, ray, minutes: processes, threads, and so on of `Workers`; no workers
    run nothing, and the tables are made of what is finished.
    Raises ValueError for numbers that make no sense, grids that share a folder, and a grid whose members cannot run
    together; Unfinished at the end, after every other member ran, when members failed.
    """
    asked = Workers(workers or 1, together, ray, minutes)
    if together > 1 and ray is None and not all(grid.task.threads for grid in grids):
        raise ValueError("together: only members of a classifier grid run in threads of one process; use workers")
    folders = [Path(grid.out) for grid in grids]
    shared = next((out for place, out in enumerate(folders) if out in folders[:place]), None)
    if shared is not None:
        raise ValueError(f"two grids would be written to {shared}: give each an `out` of its own")
    for grid, out in zip(grids, folders, strict=True):
        recipes = grid.recipes(0)
        check_outside(out, recipes)
        mark(out, "grid")
        for place in {out, Path(grid.dense or out)}:
            check_inputs(place, recipes)
    jobs = [GridJobs(grid) for grid in grids] if workers else []
    for each in jobs:
        each.look()
    wrong = run(jobs, asked) if jobs else []
    rows = [tabulate(grid) for grid in grids]
    if wrong:
        raise Unfinished(wrong[0])
    return rows


def load_grids(paths: Sequence[Path], out: Path | None = None, changes: Mapping[str, Any] | None = None) -> list[Grid]:
    """The checked grids of YAML files; out: the folder of one grid, and of several the folder of their folders,
    in which they share their dense trainings. changes: dotted keys of all of them, and their values.

    Raises ValueError naming the cell and the key of the first recipe that is wrong.
    """
    if len(paths) == 1:
        return [load_grid(paths[0], out, changes=changes)]
    if out is None:
        return [load_grid(path, changes=changes) for path in paths]
    return [load_grid(path, out / path.stem, out / "dense", changes) for path in paths]


def tabulate(grid: Grid) -> list[dict[str, Any]]:
    """One row a finished cell: labels, seeds, tuned value, mean and deviation of what was measured; written too.

    A cell whose tuned value is not chosen yet is left out; so is a seed that is not finished.
    """
    out, rows = Path(grid.out), list[dict[str, Any]]()
    results = read_results(out)
    members = [member for member in final_members(grid, results) if member.key in results]
    for labels in grid.cells():
        mine = [member for member in members if member.labels == labels]
        if mine:
            head: dict[str, Any] = {**labels, "seeds": [m.seed for m in mine], "tuned": mine[0].tuned}
            rows.append(head | grid.task.row([results[m.key] for m in mine]))
    lines = [json_line({"key": key, **result}) for key, result in sorted(results.items())]
    write_text(out / "members.jsonl", "".join(line + "\n" for line in lines))
    write_json(out / "table.json", rows)
    for earlier in pictures_of(out):  # of another layout: nothing would draw them anew, and the page would show them
        earlier.unlink(missing_ok=True)
    grid.task.write(grid.layout, rows)
    return rows


class GridJobs:
    """The members of a grid that are not finished: those of a tuned cell join when all its tries have ended."""

    def __init__(self, grid: Grid) -> None:
        self.grid, self.store = grid, grid.store
        self._tries = tuning_members(grid)
        self._known = set(read_results(self.store.folder))  # packed results have no files of their own
        self._ended: set[str] | None = None
        self._jobs: list[Job] = []
        self._likely: list[Member] = []
        self._expected: list[Job] = []

    def jobs(self) -> Sequence[Job]:
        """Members by seeds, so that a killed grid is broad, and as their task orders them."""
        self._look()
        return self._jobs

    def expected(self) -> Sequence[Job]:
        """Every member that there will be; those of undecided cells with the first value that is tried for them."""
        self._look()
        return self._expected

    def look(self) -> None:
        """Raises ValueError for what its task sees in members before any work, naming the first cell of that kind."""
        self._look()
        try:
            self.grid.task.look([member.recipe for member in self._likely])
        except ValueError as error:
            raise ValueError(f"{self._place(str(error))}{error}") from None

    def prepared(self) -> AbstractContextManager[Any]:
        """What its task needs around the members."""
        self._look()
        return self.grid.task.prepared([member.recipe for member in self._likely])

    def _place(self, message: str) -> str:
        """The cell of which alone the task says the same, or nothing."""
        for member in self._likely:
            try:
                self.grid.task.look([member.recipe])
            except ValueError as error:
                if str(error) == message:
                    return f"{' / '.join(member.labels.values())}: "
        return ""

    def _look(self) -> None:
        """Choose anew, if a try has ended since."""
        ended = {member.key for member in self._tries if self._has_ended(member)}
        if ended != self._ended:
            results = read_results(self.store.folder)
            final = final_members(self.grid, results, ended=ended)
            self._likely = [*self._tries, *likely_members(self.grid, results)]
            self._ended, self._jobs = ended, self._ordered([*self._tries, *final])
            self._expected = self._ordered(self._likely)

    def _ordered(self, members: Sequence[Member]) -> list[Job]:
        task, todo = self.grid.task, {each.key: each for each in members if each.key not in self._known}
        seeds = {seed: place for place, seed in enumerate(dict.fromkeys(each.seed for each in todo.values()))}
        ordered = sorted(todo.values(), key=lambda each: (seeds[each.seed], *task.order(each.recipe)))
        begun = ordered or [each for each in members if self.store.finished(each.job)]  # not only packed
        beside = task.beside([each.recipe for each in self._likely]) if begun else ()  # of every cell, begun or not
        return [*beside, *(each.job for each in ordered)]

    def _has_ended(self, member: Member) -> bool:
        return member.key in self._known or self.store.finished(member.job) or self.store.failed(member.job)
