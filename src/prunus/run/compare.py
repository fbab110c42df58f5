"""Run a grid: what others start from, the members that choose values, then all; nothing finished is repeated.

    out/members/KEY.json   a member's result (complete or absent)    out/table.*   what is made of them, in `tables`

A member alone is run by its kind's bench, many at once by `workers`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus.run import workers as pool
from prunus.run.grid import Grid, Member, final_members, load_grid, tuning_members
from prunus.run.tables import read_results, tabulate

__all__ = ["compare", "load_grid"]


def compare(grid: Grid, *, workers: int = 1, together: int = 1, minutes: float | None = None) -> list[dict[str, Any]]:
    """One row a cell, as `tables.tabulate` writes them to the grid's folder, after every member has run.

    workers: processes that share the members; 0 runs nothing and makes the tables of what is finished.
    together: members at once in each process, in threads with CUDA streams of their own.
    minutes: no member begins later than this after the call; those that run are finished, and the tables are made.
    Raises ValueError for numbers that make no sense, and a grid whose members cannot run together; RuntimeError at the
    end, after every other member ran, when members failed.
    """
    if workers < 0 or together < 1 or (minutes is not None and minutes < 0):
        raise ValueError(f"workers and minutes are at least 0, together 1; got {workers=}, {together=}, {minutes=}")
    if together > 1 and not grid.kind.together:
        raise ValueError("together: only members of a classifier grid run in threads of one process; use workers")
    out = Path(grid.out)
    (out / "members").mkdir(parents=True, exist_ok=True)
    if workers:
        pool.clear(out)
        deadline = None if minutes is None else time.time() + 60 * minutes

        def run(members: Sequence[Member], phase: str) -> None:
            jobs = _jobs(grid, members)
            pool.run(grid, jobs, phase, workers=workers, together=together, deadline=deadline)

        run(
            [*tuning_members(grid), *final_members(grid, read_results(out), partial=True)],
            "tune" if grid.tune else "run",
        )
        if grid.tune is not None:  # now the other values can be chosen
            run(final_members(grid, read_results(out), partial=True), "run")
    rows = tabulate(grid)
    failed = pool.failures(out) if workers else []
    if failed:
        raise RuntimeError(f"{len(failed)} members failed; the first: {failed[0]}")
    return rows


def _jobs(grid: Grid, members: Sequence[Member]) -> list[pool.Job]:
    """The members that are not finished, behind those they need; later seeds last: a killed grid is broad."""
    out = Path(grid.out)
    finished = read_results(out)
    todo = {member.key: member for member in members if member.key not in finished}
    first = grid.kind.first(list(todo.values()))
    before = {m.key: todo.get(m.key, m) for m in first.values() if not grid.kind.ready(out, m, finished)}
    seeds = {seed: place for place, seed in enumerate(dict.fromkeys(member.seed for member in todo.values()))}
    later = sorted(
        (member for key, member in todo.items() if key not in before),
        key=lambda member: (seeds[member.seed], *grid.kind.order(member)),
    )
    return [pool.Job(member) for member in before.values()] + [
        pool.Job(member, before.get(first[member.key].key) if member.key in first else None) for member in later
    ]
