"""Members of grids run by threads of this process or by worker processes, a GPU each in turn; nothing runs twice.

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
from pathlib import Path
from typing import Any

import torch

from prunus.files import write_json
from prunus.report import progress
from prunus.run.agenda import Agenda, Job, error_file, has_ended, result_file
from prunus.run.grid import Grid
from prunus.run.kinds import Bench

__all__ = ["clear", "failures", "run"]

log = logging.getLogger(__name__)
_WAIT = 0.2  # seconds between two looks


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
    """Forget claims and errors of an earlier call: what is not finished is tried again."""
    (out / "members").mkdir(parents=True, exist_ok=True)
    for left in [*(out / "members").glob("*.claim"), *(out / "members").glob("*.error.txt")]:
        left.unlink()


def failures(out: Path) -> list[Path]:
    """The error files, one for each member that failed."""
    return sorted((out / "members").glob("*.error.txt"))


def _process(grids: Sequence[Grid], place: int, workers: int, together: int, deadline: float | None) -> None:
    """A worker process: the GPUs of the machine are dealt to the workers in turn."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _threads([Agenda(grid) for grid in grids], together, deadline, None)


def _end_with_parent() -> None:
    """A killed grid must not go on in its workers: the next call would run the same members beside them."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _threads(agendas: Sequence[Agenda], together: int, deadline: float | None, advance: Any) -> None:
    for agenda in agendas:
        agenda.grid.kind.prepare(agenda.members())
    if together == 1:
        _work(agendas, deadline, advance, nullcontext())
        return
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // together))  # of the threads made below
    lanes = [_Lane(agendas, deadline, advance) for _ in range(together)]
    for lane in lanes:
        lane.start()
    while any(lane.is_alive() for lane in lanes):  # joined bit by bit, so that Ctrl-C is heard
        for lane in lanes:
            lane.join(_WAIT)
    torch.set_num_threads(cores)
    broken = next((lane.error for lane in lanes if lane.error is not None), None)
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
            stream: AbstractContextManager[Any] = nullcontext()
            if torch.cuda.is_available():
                stream = torch.cuda.stream(torch.cuda.Stream())
            _work(*self.work, stream)
        except BaseException as error:  # re-raised by the thread that waits
            self.error = error


def _work(agendas: Sequence[Agenda], deadline: float | None, advance: Any, around: AbstractContextManager[Any]) -> None:
    """Run every job that nobody else has taken, one after another."""
    benches: dict[Path, Bench] = {}
    with around:
        while (job := _take(agendas, deadline)) is not None:
            out = job.out
            try:
                if job.after is not None and not job.grid.kind.ready(out, job.after, {}):
                    raise RuntimeError(f"what it starts from failed: {error_file(out, job.after.key)}")
                if out not in benches:
                    benches[out] = job.grid.kind.bench(out)
                write_json(result_file(out, job.name), benches[out].run(job.member))
            except Exception:  # a member that fails must not take the others with it; compare() raises at the end
                log.exception("member %s failed", job.member.labels)
                error_file(out, job.name).write_text(f"{job.member}\n{traceback.format_exc()}")
            if advance is not None:
                advance(1)


def _take(agendas: Sequence[Agenda], deadline: float | None) -> Job | None:
    """The next job that nobody has taken and that waits for nothing; waits for one, None when none is left."""
    while deadline is None or time.time() < deadline:
        waiting = False
        for agenda in agendas:
            for job in agenda.look():
                if _claimed(agenda.out, job.name):
                    continue
                if _waits(job) and job.after is not None and _pending(agenda.out, job.after.key):
                    waiting = True
                elif _claim(agenda.out, job.name):
                    return job
            waiting = waiting or any(_pending(agenda.out, name) for name in agenda.undecided)
        if not waiting:
            return None
        time.sleep(_WAIT)
    return None


def _waits(job: Job) -> bool:
    return job.after is not None and not job.grid.kind.ready(job.out, job.after, {})


def _ended(out: Path) -> int:
    """How many members left a result or an error."""
    return sum(1 for _ in (out / "members").glob("*.json")) + len(failures(out))


def _lost(out: Path) -> list[str]:
    """Members that were begun and left neither a result nor an error."""
    begun = [path.stem for path in sorted((out / "members").glob("*.claim"))]
    return [name for name in begun if not has_ended(out, name)]


def _pending(out: Path, name: str) -> bool:
    """Whether a member may still end well: it has not failed, and its process is alive if it was begun."""
    if error_file(out, name).exists():
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
