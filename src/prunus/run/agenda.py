"""What a grid has still to run, as it becomes known: the members of a tuned cell join when its values have been tried.

    tuning members, cells that are not tuned  ─▶  cells whose tries have all ended  ─▶  nothing

Many processes and threads work one grid off: each looks at the files that the others leave.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prunus.run.grid import Grid, Member, final_members, likely_members, tuning_members
from prunus.run.tables import read_results

__all__ = ["Agenda", "Job", "error_file", "has_ended", "result_file"]


@dataclass(frozen=True)
class Job:
    """A member of a grid, and the one that must have run before it."""

    grid: Grid
    member: Member
    after: Member | None = None

    @property
    def name(self) -> str:
        """The stem of the files that it leaves."""
        return self.member.key

    @property
    def out(self) -> Path:
        """The grid's folder."""
        return Path(self.grid.out)


class Agenda:
    """The unfinished jobs of one grid. `look` brings it up to date; threads may share it."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.out = Path(grid.out)
        self.jobs: list[Job] = []
        self._tries = {member.key for member in tuning_members(grid)}
        self._known = set(read_results(self.out))  # packed results have no files of their own
        self._seen: set[str] | None = None
        self._lock = threading.Lock()

    def look(self) -> list[Job]:
        """The unfinished jobs that are known by now: what others start from first, then by seeds, longest first."""
        with self._lock:
            ended = {name for name in self._tries if name in self._known or has_ended(self.out, name)}
            if ended != self._seen:
                results = read_results(self.out)
                final = final_members(self.grid, results, partial=True, ended=ended)
                self.jobs = _jobs(self.grid, [*tuning_members(self.grid), *final], set(results))
                self._seen = ended
            return self.jobs

    @property
    def undecided(self) -> set[str]:
        """Names of the tries that had not ended when it last looked."""
        return self._tries - (self._seen or set())

    def members(self) -> list[Member]:
        """Every member that there will be; those of undecided cells with the first value that is tried for them."""
        return [*tuning_members(self.grid), *likely_members(self.grid, read_results(self.out))]

    def total(self) -> int:
        """How many jobs there are from now on."""
        return len(_jobs(self.grid, self.members(), set(read_results(self.out))))


def result_file(out: Path, name: str) -> Path:
    """A member's numbers: complete or absent."""
    return out / "members" / f"{name}.json"


def error_file(out: Path, name: str) -> Path:
    """How a member failed."""
    return out / "members" / f"{name}.error.txt"


def has_ended(out: Path, name: str) -> bool:
    """Whether a member left a result or an error."""
    return result_file(out, name).exists() or error_file(out, name).exists()


def _jobs(grid: Grid, members: Sequence[Member], finished: set[str]) -> list[Job]:
    """The members that are not finished, behind those they need; later seeds last: a killed grid is broad."""
    todo = {member.key: member for member in members if member.key not in finished}
    first = grid.kind.first(list(todo.values()))
    done = {name: {} for name in finished}
    before = {m.key: todo.get(m.key, m) for m in first.values() if not grid.kind.ready(grid, m, done)}
    seeds = {seed: place for place, seed in enumerate(dict.fromkeys(member.seed for member in todo.values()))}
    later = sorted(
        (member for key, member in todo.items() if key not in before),
        key=lambda member: (seeds[member.seed], *grid.kind.order(member)),
    )
    return [Job(grid, member) for member in before.values()] + [
        Job(grid, member, before.get(first[member.key].key) if member.key in first else None) for member in later
    ]
