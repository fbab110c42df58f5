"""Members of grids run by threads of this process or by worker processes, a GPU each in turn; nothing runs twice.

    members/KEY.claim      taken, by the process named inside      members/KEY.error.txt   failed, and how

A member that needs what another leaves waits for it; one whose predecessor failed fails as well. A second call on the
same folder leaves alone what a living process has taken, and shares the rest. What a dead one took is tried once more.
"""

from __future__ import annotations

import fcntl
import logging
import multiprocessing
import os
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch

from prunus.machine import write_json
from prunus.report import progress
from prunus.run import lanes
from prunus.run.agenda import Agenda, Job, error_file, has_ended, result_file
from prunus.run.grid import Grid
from prunus.run.kinds import Bench

__all__ = ["clear", "failures", "run"]

log = logging.getLogger(__name__)
_WAIT = 0.2  # seconds between two looks
_AGAIN = " again"
_WRITING = 60.0  # seconds that a claim may be empty


def run(grids: Sequence[Grid], *, workers: int, together: int = 1, deadline: float | None = None) -> None:
    """Run all members, in the grids' order where nothing waits; none begins after `deadline` (seconds since 1970)."""
    agendas = [Agenda(grid) for grid in grids]
    total = sum(agenda.total() for agenda in agendas)
    if not total or (deadline is not None and time.time() >= deadline):
        return
    with progress("run", total) as advance:
        if workers == 1:
            _threads(agendas, together, deadline, advance)
            return
        context = multiprocessing.get_context("spawn")
        processes = [
            context.Process(target=_process, args=(grids, place, workers, together, deadline))
            for place in range(workers)
        ]
        begun = sum(_ended(agenda.out) for agenda in agendas)
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            advance.to(sum(_ended(agenda.out) for agenda in agendas) - begun)
        died = [process.exitcode for process in processes if process.exitcode]
    if died:
        lost = [(agenda.out, name) for agenda in agendas for name in _lost(agenda.out)]
        for out, name in lost:
            error_file(out, name).write_text(f"its worker process ended with status {died[0]} (negative: a signal)\n")
        if not lost:
            raise RuntimeError(f"a worker process ended with status {died[0]} before it ran anything")


def clear(out: Path) -> None:
    """Forget claims and errors of earlier calls, so that what is not finished is tried again; not those of other living
    processes."""
    (out / "members").mkdir(parents=True, exist_ok=True)
    for claim in (out / "members").glob("*.claim"):
        owner = _owner(claim)
        if owner is None or owner == os.getpid():
            claim.unlink(missing_ok=True)
            error_file(out, claim.stem).unlink(missing_ok=True)
    for error in failures(out):
        if not (out / "members" / error.name.replace(".error.txt", ".claim")).exists():
            error.unlink(missing_ok=True)


def failures(out: Path) -> list[Path]:
    """The error files, one for each member that failed."""
    return sorted((out / "members").glob("*.error.txt"))


def _process(grids: Sequence[Grid], place: int, workers: int, together: int, deadline: float | None) -> None:
    """A worker process: the GPUs of the machine are dealt to the workers in turn."""
    lanes.begin_worker(place, workers)
    _threads([Agenda(grid) for grid in grids], together, deadline, None)


def _threads(agendas: Sequence[Agenda], together: int, deadline: float | None, advance: Any) -> None:
    for agenda in agendas:
        agenda.grid.kind.prepare(agenda.members())
    if together == 1:
        _work(agendas, deadline, advance, nullcontext())
        return
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // together))  # of the threads made below
    running = [_Lane(agendas, deadline, advance) for _ in range(together)]
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

    def __init__(self, agendas: Sequence[Agenda], deadline: float | None, advance: Any) -> None:
        super().__init__(daemon=True)
        self.work = (agendas, deadline, advance)
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            _work(*self.work, lanes.own_stream())
        except BaseException as error:  # re-raised by the thread that waits
            self.error = error


def _work(agendas: Sequence[Agenda], deadline: float | None, advance: Any, around: AbstractContextManager[Any]) -> None:
    """Run every job that nobody else has taken, one after another."""
    benches: dict[Path, Bench] = {}
    with around:
        while (job := _take(agendas, deadline)) is not None:
            out = job.out
            try:
                if job.after is not None and not job.grid.kind.ready(job.grid, job.after, {}):
                    raise RuntimeError(f"what it starts from failed: {error_file(out, job.after.key)}")
                if out not in benches:
                    benches[out] = job.grid.kind.bench(job.grid)
                write_json(result_file(out, job.name), benches[out].run(job.member))
            except Exception:  # a member that fails must not take the others with it; compare() raises at the end
                log.exception("member %s failed", job.member.labels)
                error_file(out, job.name).write_text(f"{job.member}\n{traceback.format_exc()}")
            if advance is not None:
                advance(1)


def _take(agendas: Sequence[Agenda], deadline: float | None) -> Job | None:
    """The next job that nobody has taken and that waits for nothing; waits for one, None when none can come."""
    while deadline is None or time.time() < deadline:
        waiting = False
        for agenda in agendas:
            for job in agenda.look():
                if has_ended(agenda.out, job.name):
                    continue
                if _claimed(agenda.out, job.name):
                    if _take_over(agenda.out, job.name):
                        return job
                    waiting = waiting or _pending(agenda.out, job.name)
                elif _waits(job) and job.after is not None and _pending(agenda.out, job.after.key):
                    waiting = True
                elif _claim(agenda.out, job.name):
                    return job
            waiting = waiting or any(_pending(agenda.out, name) for name in agenda.undecided)
        if not waiting:
            return None
        time.sleep(_WAIT)
    return None


def _waits(job: Job) -> bool:
    return job.after is not None and not job.grid.kind.ready(job.grid, job.after, {})


def _ended(out: Path) -> int:
    """How many members left a result or an error."""
    return sum(1 for _ in (out / "members").glob("*.json")) + len(failures(out))


def _lost(out: Path) -> list[str]:
    """Members that were begun and left neither a result nor an error."""
    begun = [path.stem for path in sorted((out / "members").glob("*.claim"))]
    return [name for name in begun if not has_ended(out, name)]


def _pending(out: Path, name: str) -> bool:
    """Whether a member may still end well: it has not failed, and its process is alive if it was begun."""
    claim = _claim_file(out, name)
    return not error_file(out, name).exists() and (not claim.exists() or _owner(claim) is not None or _once(claim))


def _owner(claim: Path) -> int | None:
    """The process that has taken a member, if it is still alive; a later one with the same number is another."""
    try:
        number, started = [*claim.read_text(encoding="utf-8").split(), "", ""][:2]
        if not started:  # somebody is just writing it, or was killed there
            return -1 if time.time() - claim.stat().st_mtime < _WRITING else None
        return int(number) if abs(psutil.Process(int(number)).create_time() - float(started)) < 1 else None
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None


def _once(claim: Path) -> bool:
    """Whether it was taken once only, so that another try is left."""
    try:
        return not claim.read_text(encoding="utf-8").endswith(_AGAIN)
    except FileNotFoundError:
        return True


def _claim(out: Path, name: str, again: str = "") -> bool:
    """Whether this thread is the first to take the member of that name."""
    try:
        file = os.open(_claim_file(out, name), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    os.write(file, f"{os.getpid()} {psutil.Process().create_time()}{again}".encode())
    os.close(file)
    return True


def _take_over(out: Path, name: str) -> bool:
    """Whether this thread got a member whose process died over its first try: a second may have better luck."""
    claim = _claim_file(out, name)
    if _owner(claim) is not None or not _once(claim):
        return False
    with (out / "members" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _owner(claim) is not None or not _once(claim) or has_ended(out, name):
            return False
        claim.unlink(missing_ok=True)
        return _claim(out, name, _AGAIN)


def _claim_file(out: Path, name: str) -> Path:
    return out / "members" / f"{name}.claim"


def _claimed(out: Path, name: str) -> bool:
    return _claim_file(out, name).exists()
