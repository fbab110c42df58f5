"""Run grids: what others start from, the members that choose values, then all; nothing finished is repeated.

    out/members/KEY.json   a member's result (complete or absent)    out/table.*   what is made of them, in `tables`

What is still to do is known by `agenda`; a member alone is run by its kind's bench, many at once by `workers`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prunus.run import workers as pool
from prunus.run.grid import Grid, load_grid
from prunus.run.tables import tabulate

__all__ = ["compare", "compare_all", "load_grid", "load_grids"]


def compare(grid: Grid, *, workers: int = 1, together: int = 1, minutes: float | None = None) -> list[dict[str, Any]]:
    """One row a cell of one grid; all else as `compare_all`."""
    return compare_all([grid], workers=workers, together=together, minutes=minutes)[0]


def compare_all(
    grids: Sequence[Grid], *, workers: int = 1, together: int = 1, minutes: float | None = None
) -> list[list[dict[str, Any]]]:
    """For each grid one row a cell, as `tables.tabulate` writes them to its folder, after every member has run.

    Members of all grids run side by side, those of the first before the others where both could: one that leaves most
    of a GPU idle has company.
    workers: processes that share the members; 0 runs nothing and makes the tables of what is finished.
    together: members at once in each process, in threads with CUDA streams of their own.
    minutes: no member begins later than this after the call; those that run are finished, and the tables are made.
    Raises ValueError for numbers that make no sense, grids that share a folder, and a grid whose members cannot run
    together; RuntimeError at the end, after every other member ran, when members failed.
    """
    if workers < 0 or together < 1 or (minutes is not None and minutes < 0):
        raise ValueError(f"workers and minutes are at least 0, together 1; got {workers=}, {together=}, {minutes=}")
    if together > 1 and not all(grid.kind.together for grid in grids):
        raise ValueError("together: only members of a classifier grid run in threads of one process; use workers")
    folders = [Path(grid.out) for grid in grids]
    shared = next((out for place, out in enumerate(folders) if out in folders[:place]), None)
    if shared is not None:
        raise ValueError(f"two grids would be written to {shared}: give each an `out` of its own")
    for out in folders:
        (out / "members").mkdir(parents=True, exist_ok=True)
    if workers:
        for out in folders:
            pool.clear(out)
        deadline = None if minutes is None else time.time() + 60 * minutes
        pool.run(grids, workers=workers, together=together, deadline=deadline)
    rows = [tabulate(grid) for grid in grids]
    failed = [path for out in folders for path in pool.failures(out)] if workers else []
    if failed:
        raise RuntimeError(f"{len(failed)} members failed; the first: {failed[0]}")
    return rows


def load_grids(paths: Sequence[Path], out: Path | None = None) -> list[Grid]:
    """The checked grids of YAML files; out: the folder of one grid, and of several the folder of their folders,
    in which they share their dense trainings.

    Raises ValueError naming the cell and the key of the first recipe that is wrong.
    """
    if len(paths) == 1:
        return [load_grid(paths[0], out)]
    if out is None:
        return [load_grid(path) for path in paths]
    return [load_grid(path, out / path.stem, out / "dense") for path in paths]
