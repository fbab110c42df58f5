"""Ways to run branches: one after another, in threads that share a device, in processes with a GPU each, with Ray.

A pool is given everything that can be trained now, again and again, and gives back what is finished or has failed.
A unit is a tuple of branches: one alone, or several that are trained stacked.
"""

from __future__ import annotations

import logging
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from prunus.run import lanes
from prunus.run.vision.soups.branches import Store
from prunus.run.vision.soups.units import Unit, claimed, name_of, train_unit

__all__ = ["Failure", "OneByOne", "Pool", "Processes", "Threads", "opened"]

log = logging.getLogger(__name__)
_WAIT = 0.2  # seconds between two looks


@dataclass(frozen=True)
class Failure:
    """Why a unit failed, and whether it is worth another try: wrong values and diverging losses are not."""

    text: str
    again: bool

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """The failure that an exception is."""
        again = not isinstance(error, (ValueError, FloatingPointError, ImportError))
        return cls(f"{type(error).__name__}: {error}", again)


class Pool(Protocol):
    """Runs units."""

    def some(self, wanted: Sequence[Unit]) -> list[tuple[Unit, Failure | None]]:
        """Those of the wanted units that are finished or have failed: at least one; waits for it."""
        ...


@contextmanager
def opened(store: Store, *, together: int = 1, workers: int = 1, ray: str | None = None) -> Generator[Pool]:
    """The pool that was asked for, closed at the end."""
    if ray is not None:
        from prunus.run.vision.soups.rays import Rays

        pool: Any = Rays(store, ray, together)
    elif workers > 1:
        pool = Processes(store, workers, together)
    else:
        pool = Threads(store, together) if together > 1 else OneByOne(store)
    try:
        yield pool
    finally:
        pool.close()


class OneByOne:
    """Runs the first unit that nobody else is training, in the thread that asks."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def some(self, wanted: Sequence[Unit]) -> list[tuple[Unit, Failure | None]]:
        """See `Pool`; what other threads or processes have finished meanwhile counts as well."""
        while True:
            done = [unit for unit in wanted if all(self.store.finished(branch) for branch in unit)]
            if done:
                return [(unit, None) for unit in done]
            for unit in wanted:
                with claimed(unit, self.store, patient=False) as mine:
                    if mine:
                        alone = threading.current_thread() is threading.main_thread()  # others are a grid's
                        return [(unit, _tried(unit, self.store, alone))]
            time.sleep(_WAIT)

    def close(self) -> None:
        """Nothing is open."""


class Threads:
    """Runs units in threads of this process, on a CUDA stream each."""

    def __init__(self, store: Store, together: int) -> None:
        self.store, self.together = store, together
        self.taken: set[str] = set()
        self.jobs: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
        self.done: queue.SimpleQueue[tuple[Unit, Failure | None]] = queue.SimpleQueue()
        self.cores = torch.get_num_threads()
        torch.set_num_threads(max(1, self.cores // together))  # of the threads made here
        for _ in range(together):
            threading.Thread(target=self._work, daemon=True).start()

    def some(self, wanted: Sequence[Unit]) -> list[tuple[Unit, Failure | None]]:
        """See `Pool`."""
        for unit in wanted:
            if name_of(unit) not in self.taken:
                self.taken.add(name_of(unit))
                self.jobs.put(unit)
        while True:
            try:
                unit, failure = self.done.get(timeout=_WAIT)  # bit by bit, so that Ctrl-C is heard
            except queue.Empty:
                continue
            self.taken.discard(name_of(unit))
            return [(unit, failure)]

    def close(self) -> None:
        """Let the threads end; what they train is not waited for."""
        for _ in range(self.together):
            self.jobs.put(None)
        torch.set_num_threads(self.cores)

    def _work(self) -> None:
        with lanes.own_stream():
            while (unit := self.jobs.get()) is not None:
                with claimed(unit, self.store, patient=True):
                    failure = _tried(unit, self.store, self.together == 1)
                self.done.put((unit, failure))


class Processes:
    """Runs units in processes, a GPU each in turn, `together` at once in each; a process that dies is replaced."""

    def __init__(self, store: Store, workers: int, together: int) -> None:
        self.store, self.workers, self.together = store, workers, together
        self.context = multiprocessing.get_context("spawn")
        self.running = [self._start(place) for place in range(workers)]

    def some(self, wanted: Sequence[Unit]) -> list[tuple[Unit, Failure | None]]:
        """See `Pool`. The units of a process that died have failed, and are worth another try."""
        while True:
            self._deal(wanted)
            ready = wait([each.connection for each in self.running], timeout=_WAIT)
            found = [pair for each in self.running if each.connection in ready for pair in self._read(each)]
            if found:
                return found

    def close(self) -> None:
        """End the processes."""
        for each in self.running:
            each.process.terminate()
        for each in self.running:
            each.process.join()
            each.connection.close()

    def _deal(self, wanted: Sequence[Unit]) -> None:
        """Give every worker that has room a unit that nobody has."""
        for unit in wanted:
            free = min(self.running, key=lambda each: len(each.units))
            if any(name_of(unit) in each.units for each in self.running) or len(free.units) >= self.together:
                continue
            with suppress(OSError):  # of a worker that died: its connection is read next
                free.connection.send(unit)
            free.units[name_of(unit)] = unit

    def _start(self, place: int) -> _Worker:
        here, there = self.context.Pipe()
        arguments = (there, self.store, place, self.workers, self.together)
        process = self.context.Process(target=_serve, args=arguments, daemon=True)
        process.start()
        there.close()  # so that the end of the process is the end of the connection
        return _Worker(place, process, here, {})

    def _read(self, worker: _Worker) -> list[tuple[Unit, Failure | None]]:
        try:
            name, failure = worker.connection.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            status = worker.process.exitcode
            log.warning("worker process %d ended with status %s; another takes its place", worker.place, status)
            lost = Failure(f"its worker process ended with status {status} (negative: a signal)", again=True)
            self.running[self.running.index(worker)] = self._start(worker.place)
            return [(unit, lost) for unit in worker.units.values()]
        return [(worker.units.pop(name), failure)]


@dataclass(eq=False)
class _Worker:
    place: int
    process: Any
    connection: Connection
    units: dict[str, Unit]


def _serve(connection: Connection, store: Store, place: int, workers: int, together: int) -> None:
    """A worker process: units come in, and go out when they are done."""
    lanes.begin_worker(place, workers)
    pool = Threads(store, together)
    threading.Thread(target=_answer, args=(connection, pool.done.get), daemon=True).start()
    while True:
        pool.jobs.put(connection.recv())


def _answer(connection: Connection, get: Callable[[], tuple[Unit, Failure | None]]) -> None:
    while True:
        unit, failure = get()
        connection.send((name_of(unit), failure))


def _tried(unit: Unit, store: Store, alone: bool) -> Failure | None:
    try:
        train_unit(unit, store, alone=alone)
    except Exception as error:  # a member that dies must not take the others with it; `follow` raises at the end
        log.info("training %s failed", name_of(unit), exc_info=True)
        return Failure.of(error)
    return None
