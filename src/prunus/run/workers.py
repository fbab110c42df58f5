"""Members of a grid run by threads of this process or by worker processes, a GPU each in turn; nothing runs twice.

    members/KEY.claim      taken, by the process named inside      members/KEY.error.txt   failed, and how

A member that needs what another leaves waits for it; one whose predecessor failed fails as well.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.files import write_json
from prunus.report import progress
from prunus.run import lanes
from prunus.run.grid import Grid, Member

__all__ = ["Job", "clear", "failures", "run"]

log = logging.getLogger(__name__)
_WAIT = 0.2  # seconds between two looks


@dataclass(frozen=True)
class Job:
    """A member, and the one that must have run before it."""

    member: Member
    after: Member | None = None

    @property
    def name(self) -> str:
        return self.member.key


def run(
    grid: Grid, jobs: Sequence[Job], phase: str, *, workers: int, together: int = 1, deadline: float | None = None
) -> None:
    """Run the jobs, in this order where nothing waits; no new one begins after `deadline` (seconds since 1970)."""
    if not jobs or (deadline is not None and time.time() >= deadline):
        return
    with progress(phase, len(jobs)) as advance:
        if workers == 1:
            _threads(grid, jobs, together, deadline, advance)
            return
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_process, args=(grid, jobs, place, workers, together, deadline))
            for place in range(workers)
        ]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            advance.to(sum(_done(Path(grid.out), job) for job in jobs))
        died = [process.exitcode for process in processes if process.exitcode]
    if died:
        lost = _taken(Path(grid.out), jobs)
        for job in lost:
            _write_error(Path(grid.out), job, f"its worker process ended with status {died[0]} (negative: a signal)\n")
        if not lost:
            raise RuntimeError(f"a worker process ended with status {died[0]} before it ran anything")


def clear(out: Path) -> None:
    """Forget claims and errors of an earlier call: what is not finished is tried again."""
    (out / "members").mkdir(parents=True, exist_ok=True)
    for left in [*(out / "members").glob("*.claim"), *(out / "members").glob("*.error.txt")]:
        left.unlink()


def failures(out: Path) -> list[Path]:
    """The error files, one for each member that failed."""
    return sorted((out / "members").glob("*.error.txt"))


def _process(grid: Grid, jobs: Sequence[Job], place: int, workers: int, together: int, deadline: float | None) -> None:
    """A worker process: the GPUs of the machine are dealt to the workers in turn."""
    lanes.begin_worker(place, workers)
    _threads(grid, jobs, together, deadline, None)


def _threads(grid: Grid, jobs: Sequence[Job], together: int, deadline: float | None, advance: Any) -> None:
    grid.kind.prepare([job.member for job in jobs])
    if together == 1:
        _work(grid, jobs, deadline, advance, nullcontext())
        return
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // together))  # of the threads made below
    running = [_Lane(grid, jobs, deadline, advance) for _ in range(together)]
    for lane in running:
        lane.start()
    while any(lane.is_alive() for lane in running):  # joined bit by bit, so that Ctrl-C is heard
        for lane in running:
            lane.join(_WAIT)
    torch.set_num_threads(cores)
    broken = next((lane.error for lane in running if lane.error is not None), None)
    if broken is not None:
        raise broken


class _Lane(threading.Thread):
    """A thread that runs members, on a CUDA stream of its own."""

    def __init__(self, grid: Grid, jobs: Sequence[Job], deadline: float | None, advance: Any) -> None:
        super().__init__(daemon=True)
        self.work = (grid, jobs, deadline, advance)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            _work(*self.work, lanes.own_stream())
        except BaseException as error:  # re-raised by the thread that waits
            self.error = error


def _work(
    grid: Grid, jobs: Sequence[Job], deadline: float | None, advance: Any, around: AbstractContextManager[Any]
) -> None:
    """Run every job that nobody else has taken, one after another."""
    out, bench = Path(grid.out), None
    with around:
        while (job := _take(grid, jobs, deadline)) is not None:
            try:
                if job.after is not None and not grid.kind.ready(out, job.after, {}):
                    raise RuntimeError(f"what it starts from failed: {out / 'members' / job.after.key}.error.txt")
                bench = bench or grid.kind.bench(out)
                write_json(_result(out, job.name), bench.run(job.member))
            except Exception:  # a member that fails must not take the others with it; compare() raises at the end
                log.exception("member %s failed", job.member.labels)
                _write_error(out, job, traceback.format_exc())
            if advance is not None:
                advance(1)


def _take(grid: Grid, jobs: Sequence[Job], deadline: float | None) -> Job | None:
    """The next job that nobody has taken and that waits for nothing; waits for one, None when none is left."""
    out = Path(grid.out)
    while deadline is None or time.time() < deadline:
        waiting = False
        for job in jobs:
            if _claimed(out, job.name):
                continue
            if job.after is not None and not grid.kind.ready(out, job.after, {}) and _pending(out, job.after.key):
                waiting = True
            elif _claim(out, job.name):
                return job
        if not waiting:
            return None
        time.sleep(_WAIT)
    return None


def _done(out: Path, job: Job) -> bool:
    return _result(out, job.name).exists() or _error(out, job.name).exists()


def _taken(out: Path, jobs: Sequence[Job]) -> list[Job]:
    """Jobs that were begun and left neither a result nor an error."""
    return [job for job in jobs if _claimed(out, job.name) and not _done(out, job)]


def _pending(out: Path, name: str) -> bool:
    """Whether a member may still finish: it has not failed, and its process is alive if it was begun."""
    if _error(out, name).exists():
        return False
    claim = out / "members" / f"{name}.claim"
    try:
        owner = int(claim.read_text() or 0)
        if owner:
            os.kill(owner, 0)
    except ProcessLookupError:
        return False
    except (FileNotFoundError, PermissionError):  # not begun, or another user's process
        return True
    return True


def _claim(out: Path, name: str) -> bool:
    """Whether this thread is the first to take the member of that name."""
    try:
        file = os.open(out / "members" / f"{name}.claim", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(file, str(os.getpid()).encode())
    os.close(file)
    return True


def _claimed(out: Path, name: str) -> bool:
    return (out / "members" / f"{name}.claim").exists()


def _result(out: Path, name: str) -> Path:
    return out / "members" / f"{name}.json"


def _error(out: Path, name: str) -> Path:
    return out / "members" / f"{name}.error.txt"


def _write_error(out: Path, job: Job, text: str) -> None:
    _error(out, job.name).write_text(f"{job.member}\n{text}")
