"""The one pool: it runs jobs whose needs are there, here, in threads, in processes or on Ray, until none is left.

    look ─▶ claim what is ready ─▶ run ─▶ keep its result, or how it failed ─▶ look again

Each worker process looks at the same graphs and the same store, and so does a second call of the same command: a lock
on each job keeps them apart, and what a dead process had is anybody's again. A job is tried twice, when its process
died or when it raised what another try may not meet; what waits on a failed one fails with it, and says so.
"""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import takewhile
from multiprocessing import connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import torch
from filelock import FileLock

from prunus.jobs.store import Job, Store, closure
from prunus.machine import counted, give_back_memory, import_extra
from prunus.recipe import is_full
from prunus.report import progress

__all__ = ["Graph", "Workers", "failures", "finish", "own_stream", "run"]

log = logging.getLogger(__name__)
Result = dict[str, Any]
_WAIT = 0.2  # seconds between two looks
_TRIES = 2
_REPLACED = 3  # times that a worker process of one place is
# What another try would meet again: wrong values, diverged losses, missing packages, mistakes of ours.
_FINAL = (ValueError, TypeError, LookupError, ArithmeticError, ImportError, AssertionError)


class Graph(Protocol):
    """The jobs of one store; it may grow: some are known only when others have ended."""

    @property
    def store(self) -> Store: ...

    def jobs(self) -> Sequence[Job]:
        """What is asked for, as far as it is known by now: what is to begin first stands first."""
        ...

    def expected(self) -> Sequence[Job]:
        """The same, with what is likely to be asked for later: to tell how far all is."""
        ...

    def prepared(self) -> AbstractContextManager[Any]:
        """Entered once in each process, around all that runs there. Raises ValueError for inputs that are not there."""
        ...


@dataclass(frozen=True)
class Workers:
    """Who runs jobs. processes: GPUs are dealt to them in turn. threads: jobs at once in each, on CUDA streams of
    their own, or tasks of Ray that share a GPU. ray: address of a cluster, or "local". minutes: none begins later.

    Raises ValueError for numbers that make no sense.
    """

    processes: int = 1
    threads: int = 1
    ray: str | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.processes < 1 or self.threads < 1 or (self.minutes is not None and not 0 <= self.minutes < math.inf):
            raise ValueError(
                f"workers and together are at least 1, minutes at least 0; got workers={self.processes}, "
                f"together={self.threads}, minutes={self.minutes}"
            )
        if self.ray is not None and self.processes > 1:
            raise ValueError(f"Ray has workers of its own: leave out workers={self.processes}, or ray")


def run(graphs: Sequence[Graph], workers: Workers, *, name: str = "run") -> list[str]:
    """Run all jobs, those of the first graph first where both could; says what went wrong, nothing if all is done."""
    deadline = None if workers.minutes is None else time.time() + 60 * workers.minutes
    for graph in graphs:
        graph.store.forget(closure([*graph.jobs(), *graph.expected()], graph.store.finished))
        _drop_spent(graph.store, closure(graph.expected(), lambda _: False), graphs)  # of a call that was killed
    total = _left(graphs)
    if not total or (deadline is not None and time.time() >= deadline):
        return []
    with progress(name, total) as advance:
        if workers.processes > 1:
            statuses = _in_processes(graphs, workers, deadline, lambda: advance.to(total - _left(graphs)))
        else:
            statuses = _in_this(graphs, workers, deadline, lambda: advance(1))
    for graph in graphs:
        graph.store.tidy(closure(graph.expected(), lambda _: False))
    return failures(graphs) or (_lost(graphs, statuses) if deadline is None else [])


def finish(jobs: Sequence[Job], store: Store) -> None:
    """Run jobs and what they need, one after another in this thread; what one raises is raised."""
    for job in closure(jobs, store.finished):
        store.put(job, _run_seeded(job, store))


def failures(graphs: Sequence[Graph]) -> list[str]:
    """How what was asked for failed: one line, or none."""
    failed = [(graph.store, job) for graph in graphs for job in graph.jobs() if graph.store.failed(job)]
    causes = {store.path(job): (store, job) for store, job in (_cause(*each) for each in failed)}
    if not failed:
        return []
    store, job = next(iter(causes.values()))
    more = sum(store.path(job) not in causes for store, job in failed)
    count = f"{counted(len(causes), 'job')} failed" + (f", {more} for want of them" if more else "")
    return [f"{count}; the first: {store.error(job)} (see {store.path(job, '.error.txt')})"]


def own_stream() -> AbstractContextManager[Any]:
    """Context in which a thread works on a CUDA stream of its own; without a GPU it does nothing.

    >>> with own_stream():
    ...     train(model, batches, optimizer, lr, steps=10)
    """
    return torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext()


def _lost(graphs: Sequence[Graph], statuses: Sequence[int]) -> list[str]:
    left = _left(graphs)
    message = f"{counted(left, 'job')} left: worker processes ended with status {[*statuses]}; call it again"
    return [message] if left else []


def _cause(store: Store, job: Job) -> tuple[Store, Job]:
    """The job whose failure made this one fail."""
    bad = next((need for need in job.needs if store.failed(need)), None)
    return (store, job) if bad is None else _cause(store, bad)


def _left(graphs: Sequence[Graph]) -> int:
    return sum(not g.store.failed(job) for g in graphs for job in closure(g.expected(), g.store.finished))


def _drop_spent(store: Store, jobs: Iterable[Job], graphs: Sequence[Graph]) -> None:
    """Delete those that are not kept, where nothing that is still to be done needs them."""
    spent = [job for job in jobs if job.passing and store.finished(job)]
    if spent:
        todo = [job for graph in graphs for job in closure(graph.expected(), graph.store.finished)]
        wanted = {store.path(need) for job in todo for need in job.needs}
        for job in spent:
            if store.path(job) not in wanted:
                store.drop(job)


# Executors: `room` jobs at once, `submit` runs one.


class _Executor(Protocol):
    @property
    def room(self) -> int: ...

    def submit(self, job: Job, store: Store) -> Future[Result]: ...


class _Inline:
    """Runs a job in the thread that asks."""

    room = 1

    def submit(self, job: Job, store: Store) -> Future[Result]:
        done = Future[Result]()
        _fulfil(done, lambda: _run_seeded(job, store))
        return done


class _Threads:
    """Runs jobs in daemon threads: those of `concurrent.futures` are waited for when somebody presses Ctrl-C."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.tasks: SimpleQueue[tuple[Future[Result], Job, Store] | None] = SimpleQueue()
        self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(room)]
        for thread in self.threads:
            thread.start()

    def submit(self, job: Job, store: Store) -> Future[Result]:
        done = Future[Result]()
        self.tasks.put((done, job, store))
        return done

    def end(self, *, wait: bool) -> None:
        """Let each thread end when it has done its job; wait: until all of them have."""
        for _ in self.threads:
            self.tasks.put(None)
        for thread in self.threads if wait else ():
            thread.join()

    def _serve(self) -> None:
        with own_stream():
            while (task := self.tasks.get()) is not None:
                done, job, store = task
                _fulfil(done, lambda job=job, store=store: job.run(store))


class _Ray:
    """Runs jobs as tasks of a cluster. What a job needs is sent to it, and what it leaves is sent back: machines share
    no folder, only what recipes name (images, models, texts) under the same path.

    Raises ImportError without Ray, ConnectionError when there is no cluster at the address.
    """

    def __init__(self, ray: Any, sharing: int) -> None:
        self.ray, self.sharing = ray, sharing
        gpus = 1 / sharing if ray.cluster_resources().get("GPU") else 0
        self.task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_elsewhere)
        self.sent: dict[Path, Any] = {}

    @property
    def room(self) -> int:
        found: Mapping[str, float] = self.ray.cluster_resources()
        return int(found.get("GPU", 0) * self.sharing or found.get("CPU", 1))

    def submit(self, job: Job, store: Store) -> Future[Result]:
        done = Future[Result]()
        for need in job.needs:
            if store.path(need) not in self.sent:
                self.sent[store.path(need)] = self.ray.put(store.pack(need))
        files = [self.sent[store.path(need)] for need in job.needs]

        def take(reply: Future[tuple[Result, dict[str, bytes]]]) -> None:
            def kept() -> Result:
                result, left = reply.result()
                store.unpack(job, left)
                return result

            _fulfil(done, kept)

        self.task.remote(job, *files).future().add_done_callback(take)
        return done


def _elsewhere(job: Job, *needs: Mapping[str, bytes]) -> tuple[Result, dict[str, bytes]]:
    """What a task does, on a machine of the cluster."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for need, files in zip(job.needs, needs, strict=True):
            store.unpack(need, files)
        result = _run_seeded(job, store)
        return result, store.pack(job)


@contextmanager
def _executor(workers: Workers) -> Generator[_Executor]:
    if workers.ray is not None:
        with _cluster(workers.ray) as ray:
            yield _Ray(ray, workers.threads)
    elif workers.threads == 1:
        yield _Inline()
    else:
        cores = torch.get_num_threads()
        torch.set_num_threads(max(1, cores // workers.threads))  # of the threads made now
        threads = _Threads(workers.threads)
        try:
            yield threads
        except BaseException:
            threads.end(wait=False)
            raise
        else:  # nothing of theirs, such as what torch keeps of a thread, ends while the caller goes on
            threads.end(wait=True)
        finally:
            torch.set_num_threads(cores)


@contextmanager
def _cluster(address: str) -> Generator[Any]:
    """Ray, on a cluster that is ended if it was started here."""
    ray = import_extra("ray", "ray", "jobs on a cluster need Ray")
    own = not ray.is_initialized()
    if own:
        ray.init(address=None if address == "local" else address, include_dashboard=False, log_to_driver=False)
    try:
        yield ray
    finally:
        if own:
            ray.shutdown()


def _run_seeded(job: Job, store: Store) -> Result:
    """Run a job with torch's own generators (dropout) at a place of its key's own; they are as before afterwards.

    They are the process's, so this is for a job that runs alone in it.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
        torch.manual_seed(int(hashlib.sha256(job.key.encode()).hexdigest()[:12], 16))
        return job.run(store)


def _fulfil(done: Future[Result], work: Callable[[], Result]) -> None:
    try:
        done.set_result(work())
    except Exception as error:  # a job that fails must not take the others with it
        done.set_exception(error)


# The loop, in this process and in others.


def _in_this(
    graphs: Sequence[Graph], workers: Workers, deadline: float | None, on_end: Callable[[], None]
) -> list[int]:
    with ExitStack() as stack:
        for graph in graphs:
            stack.enter_context(graph.prepared())
        _Loop(graphs, stack.enter_context(_executor(workers)), deadline, on_end).run()
    return []


def _in_processes(
    graphs: Sequence[Graph], workers: Workers, deadline: float | None, on_look: Callable[[], None]
) -> list[int]:
    """Run the loop in each of some processes; one that was killed is replaced. How those that are no more ended."""
    context = multiprocessing.get_context("spawn")

    def start(place: int) -> Any:
        process = context.Process(target=_serve, args=(graphs, workers, place, deadline))
        process.start()
        return process

    running, statuses, spare = {place: start(place) for place in range(workers.processes)}, list[int](), _REPLACED
    spare *= workers.processes
    try:
        while running:
            connection.wait([process.sentinel for process in running.values()], timeout=10 * _WAIT)
            on_look()
            for place, status in [(place, each.exitcode) for place, each in running.items()]:
                if status is not None:
                    del running[place]
                    statuses += [status] if status else []
                    if status < 0 and spare and _left(graphs):
                        log.warning("worker process %d was ended by signal %d; another takes its place", place, -status)
                        running[place], spare = start(place), spare - 1
    finally:
        for process in running.values():
            process.terminate()
    return statuses


def _serve(graphs: Sequence[Graph], workers: Workers, place: int, deadline: float | None) -> None:
    """A worker process, which has not touched a GPU yet."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    torch.set_num_threads(max(1, torch.get_num_threads() // workers.processes))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the call that started this process ends it
    _in_this(graphs, replace(workers, processes=1), deadline, lambda: None)


def _end_with_parent() -> None:
    """A killed call must not go on in its workers: the next one would do the same work beside them."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@dataclass(frozen=True)
class _Running:
    store: Store
    job: Job
    lock: FileLock
    tries: int


def _by_need(graph: Graph) -> list[Job]:
    """What is left of a graph: what others wait for first; what they delete again, when they are next."""
    todo = list(closure(graph.jobs(), graph.store.finished))
    needed = {graph.store.path(need) for job in todo for need in job.needs}
    return sorted(todo, key=lambda job: job.passing or graph.store.path(job) not in needed)


class _Loop:
    """Runs what is ready until nothing is left that this process may run or has to wait for."""

    def __init__(
        self, graphs: Sequence[Graph], executor: _Executor, deadline: float | None, on_end: Callable[[], None]
    ) -> None:
        self.graphs, self.executor, self.deadline, self.on_end = graphs, executor, deadline, on_end
        self.running: dict[Future[Result], _Running] = {}

    def run(self) -> None:
        try:
            while True:
                waiting = self._look()
                if self.running:
                    self._collect()
                elif waiting:
                    time.sleep(_WAIT)
                else:
                    return
        finally:
            for each in self.running.values():
                each.store.release(each.job, each.lock)

    def _look(self) -> bool:
        """Begin what is ready. Whether somebody else runs what is wanted here."""
        waiting = False
        for store, job in self._order():
            if self.deadline is not None and time.time() >= self.deadline:
                return False
            if not store.failed(job):
                waiting |= self._try(store, job)
        return waiting

    def _order(self) -> Iterator[tuple[Store, Job]]:
        """One that is brief, if none of them runs; those that take long; the others that are brief."""
        todo = [(graph.store, job) for graph in self.graphs for job in _by_need(graph)]
        brief = [each for each in todo if each[1].brief]
        yield from takewhile(lambda _: not any(each.job.brief for each in self.running.values()), brief)
        yield from (each for each in todo if not each[1].brief)
        yield from brief

    def _try(self, store: Store, job: Job) -> bool:
        """Begin a job if it is ready. Whether somebody else has it."""
        bad = next((need for need in job.needs if store.failed(need)), None)
        full = len(self.running) >= self.executor.room
        if bad is None and (full or not all(store.finished(need) for need in job.needs)):
            return False
        if store.path(job) in {each.store.path(each.job) for each in self.running.values()}:
            return False
        lock = store.claim(job)
        if lock is None:
            return True
        if not store.finished(job) and not store.failed(job):
            if bad is not None:
                store.fail(job, f"what it starts from failed: {store.path(bad, '.error.txt')}\n")
            elif (tries := store.begin(job)) <= _TRIES:
                try:
                    self.running[self.executor.submit(job, store)] = _Running(store, job, lock, tries)
                except BaseException:  # Ctrl-C in a job that runs here
                    store.release(job, lock)
                    raise
                return False
            else:
                store.fail(job, f"{job}\nits process died, {_TRIES} times: killed, or out of memory\n")
        store.release(job, lock)
        return True  # there is news: look again

    def _collect(self) -> None:
        done, _ = wait(self.running, timeout=_WAIT, return_when=FIRST_COMPLETED)
        for future in done:
            each, error = self.running.pop(future), future.exception()
            try:
                if error is None:
                    each.store.put(each.job, future.result())
                    _drop_spent(each.store, each.job.needs, self.graphs)
                elif is_full(error):
                    raise error  # which every other job would meet
                else:
                    self._failed(each, error)
            finally:
                each.store.release(each.job, each.lock)
            self.on_end()
        if done and not self.running:  # other processes of ours want it; nothing may go back while a thread records
            give_back_memory()

    def _failed(self, each: _Running, error: BaseException) -> None:
        text = "".join(traceback.format_exception(error))
        again = each.tries < _TRIES and not isinstance(error, _FINAL)
        log.warning("job %s failed%s: %s", each.store.path(each.job), ", and is tried again" if again else "", text)
        if not again:
            each.store.fail(each.job, f"{each.job}\n{text}")
