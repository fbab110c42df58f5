"""The pool on hand-made jobs: order, failures, retries, growth, threads, processes, kills, second calls, Ray."""

from __future__ import annotations

import builtins
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prunus.jobs import pool
from prunus.jobs.pool import Workers, failures, finish, run
from prunus.jobs.store import Job, Store


def Sum(key: str, needs: tuple[Job, ...] = (), acts: tuple[str, ...] = ()) -> Job:
    """One more than the sum of what it needs. acts: what it does instead the first time, the second, and so on."""
    return Job("sums", key, partial(add, acts), needs)


def add(acts: tuple[str, ...], job: Job, store: Store) -> dict[str, Any]:
    with (store.folder / "log").open("a") as log:
        log.write(f"{job.key}\n")
    tries = (store.folder / "log").read_text().split().count(job.key)
    act = acts[tries - 1] if tries <= len(acts) else ""
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if act == "wait":
        time.sleep(0.5)
    if act == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "file")
    if act in ("ValueError", "RuntimeError", "KeyboardInterrupt"):
        raise getattr(builtins, act)(f"{job.key} is {act}")
    (store.folder_of(job) / "file").write_text(job.key)
    value = 1 + sum(store.result(need)["value"] for need in job.needs)
    return {"value": value, "drawn": torch.rand(1).item(), "process": os.getpid()}


def test_what_a_job_leaves_travels_from_wherever_it_lies(tmp_path: Path) -> None:
    job, here = Sum("a"), Store(tmp_path / "here", places={"a": tmp_path / "elsewhere"})
    here.folder.mkdir()
    finish([job], here)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["file"]
    there = Store(tmp_path / "there")
    there.unpack(job, here.pack(job))
    assert there.result(job) == here.result(job)
    assert (there.path(job) / "file").read_text() == "a"


@dataclass(frozen=True)
class Wanted:
    """Jobs, and those that are known when the first ones have ended."""

    store: Store
    first: tuple[Job, ...]
    later: tuple[Job, ...] = ()
    seen: list[int] = field(default_factory=list[int])

    def jobs(self) -> list[Job]:
        ended = all(self.store.finished(job) or self.store.failed(job) for job in self.first)
        return [*self.first, *(self.later if ended else ())]

    def expected(self) -> list[Job]:
        return [*self.first, *self.later]

    def prepared(self) -> AbstractContextManager[Any]:
        self.seen.append(1)
        return nullcontext()


def ran(folder: Path) -> list[str]:
    path = folder / "log"
    return path.read_text().split() if path.exists() else []


A = Sum("a")
B, C = Sum("b", (A,)), Sum("c", (A,))
D = Sum("d", (B, C))


@pytest.mark.parametrize("workers", [Workers(), Workers(threads=3)])
def test_what_is_needed_runs_first_and_once(tmp_path: Path, workers: Workers) -> None:
    graph = Wanted(Store(tmp_path), (D, Sum("e", (D, A))))
    assert run([graph], workers) == []
    found = ran(tmp_path)
    assert sorted(found) == ["a", "b", "c", "d", "e"]
    assert (found[0], found[-2:]) == ("a", ["d", "e"])
    assert [graph.store.result(job)["value"] for job in (A, B, D)] == [1, 2, 5]
    assert run([graph], workers) == []
    assert ran(tmp_path) == found
    assert graph.seen == [1]  # nothing is prepared where nothing is left
    left = {path.name.partition(".")[2] for path in (tmp_path / "sums").iterdir()}
    assert left == {"", "json"}  # no locks, no tries


def test_no_thread_outlives_its_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def slow_to_end() -> Iterator[None]:
        yield
        time.sleep(0.1)

    monkeypatch.setattr("prunus.jobs.pool.own_stream", slow_to_end)
    before = set(threading.enumerate())
    assert run([Wanted(Store(tmp_path), (D,))], Workers(threads=3)) == []
    assert set(threading.enumerate()) == before


def test_what_is_brief_does_not_wait_for_what_takes_long(tmp_path: Path) -> None:
    """Measuring what one training left comes before the next training; without it trainings would come first."""
    long = [Sum(name) for name in "ab"]
    measured = [replace(Sum(f"of-{each.key}", (each,)), brief=True) for each in long]
    run([Wanted(Store(tmp_path), (*measured, Sum("c", (A,))))], Workers())
    assert ran(tmp_path) == ["a", "of-a", "b", "of-b", "c"]


def test_what_is_brief_leaves_the_other_places_to_what_takes_long(tmp_path: Path) -> None:
    """Of two places one goes on with training, while what was trained is measured one by one."""
    begun = threading.Event()

    def begin(job: Job, store: Store) -> dict[str, Any]:
        begun.set()
        return {}

    def measure(job: Job, store: Store) -> dict[str, Any]:
        return {"beside": begun.wait(timeout=2)}

    measured = [Job("sums", f"measured-{place}", measure, brief=True) for place in range(3)]
    wanted = Wanted(Store(tmp_path), (*measured, Job("sums", "training", begin)))
    run([wanted], Workers(threads=2))
    assert all(wanted.store.result(job)["beside"] for job in measured)


def test_a_graph_grows_and_the_first_graph_goes_first(tmp_path: Path) -> None:
    one = Wanted(Store(tmp_path), (A, B), (Sum("x", (C,)),))
    other = Wanted(Store(tmp_path), (Sum("y"), Sum("z")))
    run([one, other], Workers())
    assert ran(tmp_path) == ["a", "b", "c", "x", "y", "z"]


def test_what_draws_draws_the_same_alone_and_leaves_the_generator(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    drawn = []
    for name in ("one", "two"):
        run([Wanted(Store(tmp_path / name), (B,))], Workers())
        drawn.append([Store(tmp_path / name).result(job)["drawn"] for job in (A, B)])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1]
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("workers", [Workers(), Workers(threads=2)])
def test_what_waits_on_a_failed_job_says_so_and_no_other_is_lost(tmp_path: Path, workers: Workers) -> None:
    bad = Sum("bad", (), ("ValueError",))
    after, later = Sum("after", (bad, A)), Sum("other", (A,))
    graph = Wanted(Store(tmp_path), (Sum("last", (after,)), later))
    (message,) = run([graph], workers)
    assert message.startswith(
        f"1 job failed, 1 for want of them; the first: ValueError: bad is ValueError (see {tmp_path}"
    )
    assert graph.store.error(after).startswith("what it starts from failed")
    assert graph.store.finished(later)
    assert ran(tmp_path).count("bad") == 1  # wrong values stay wrong
    assert run([graph], workers) == []  # a new call tries again, and only what failed
    assert sorted(ran(tmp_path)) == sorted(["bad", "a", "other", "bad", "after", "last"])


def test_what_another_try_may_not_meet_is_tried_twice(tmp_path: Path) -> None:
    once = Sum("once", (), ("RuntimeError",))
    twice = Sum("twice", (), ("RuntimeError",) * 3)
    graph = Wanted(Store(tmp_path), (once, twice))
    assert "RuntimeError: twice is RuntimeError" in run([graph], Workers())[0]
    assert sorted(ran(tmp_path)) == ["once", "once", "twice", "twice"]
    assert run([graph], Workers()) == []
    assert ran(tmp_path).count("twice") == 4


def test_a_full_disk_ends_the_call_and_marks_no_job(tmp_path: Path) -> None:
    graph = Wanted(Store(tmp_path), (Sum("once", (), ("full",)), A))
    with pytest.raises(OSError, match="No space left"):
        run([graph], Workers())
    assert ran(tmp_path) == ["once"]
    assert run([graph], Workers()) == []
    assert ran(tmp_path) == ["once", "once", "a"]


def test_after_the_minutes_nothing_begins(tmp_path: Path) -> None:
    assert run([Wanted(Store(tmp_path), (A,))], Workers(minutes=0)) == []
    slow = Sum("slow", (), ("wait",))
    assert run([Wanted(Store(tmp_path), (slow, A))], Workers(minutes=0.3 / 60)) == []
    assert ran(tmp_path) == ["slow"]
    assert Store(tmp_path).finished(slow)


def test_numbers_of_workers_make_sense() -> None:
    wrong: dict[str, Any]
    for wrong in ({"processes": 0}, {"threads": 0}, {"minutes": -1.0}, {"ray": "local", "processes": 2}):
        with pytest.raises(ValueError, match="workers"):
            Workers(**wrong)


def test_a_second_call_leaves_alone_what_a_living_one_has_and_shares_the_rest(tmp_path: Path) -> None:
    slow = Sum("slow", (), ("wait",))
    graphs = [Wanted(Store(tmp_path), (slow, A, B, C)) for _ in range(2)]
    calls = [threading.Thread(target=run, args=([graph], Workers())) for graph in graphs]
    for call in calls:
        call.start()
        time.sleep(0.1)
    for call in calls:
        call.join()
    assert sorted(ran(tmp_path)) == ["a", "b", "c", "slow"]


@pytest.mark.parametrize("threads", [1, 2])
def test_no_memory_of_a_gpu_is_kept_for_later_when_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int
) -> None:
    ended: list[list[str]] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: ended.append(sorted(ran(tmp_path))))
    assert run([Wanted(Store(tmp_path), (A, Sum("slow", (), ("wait",))))], Workers(threads=threads)) == []
    assert ended[-1] == ["a", "slow"]
    assert len(ended) == (2 if threads == 1 else 1)  # another thread may be recording


def test_what_a_dead_process_had_is_taken_over_at_once(tmp_path: Path) -> None:
    """Its lock is free, its try counts only in the call in which it died."""
    job, store = Sum("x", (), ("die",)), Store(tmp_path)
    process = multiprocessing.get_context("spawn").Process(
        target=run, args=([Wanted(store, (job,))], Workers()), daemon=True
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "sums" / "x.tries").read_text() == "1"
    started = time.monotonic()
    assert run([Wanted(store, (job,))], Workers()) == []
    assert time.monotonic() - started < 5
    assert ran(tmp_path) == ["x", "x"]


def test_an_empty_claim_is_nobodys_and_files_of_others_stay(tmp_path: Path) -> None:
    job, graph = Sum("x", (), ("ValueError",)), Wanted(Store(tmp_path), (Sum("x"),))
    (tmp_path / "sums" / "mine").mkdir(parents=True)
    mine = [tmp_path / "sums" / name for name in ("y.error.txt", "mine/x.error.txt", "mine/x.tries")]
    for path in (*mine, tmp_path / "sums" / "x.claim"):
        path.touch()
    started = time.monotonic()
    assert run([Wanted(graph.store, (job,))], Workers())
    assert run([graph], Workers()) == []
    assert time.monotonic() - started < 5
    assert all(path.exists() for path in mine)


@pytest.mark.slow
def test_processes_share_the_work_and_one_that_is_killed_is_replaced(tmp_path: Path) -> None:
    """One job kills its process once and ends well, one does so for good; all others are done, each once."""
    once, always = Sum("once", (), ("die",)), Sum("always", (), ("die",) * 9)
    others = tuple(Sum(f"n{number}", (), ("wait",)) for number in range(4))
    graph = Wanted(Store(tmp_path), (once, always, Sum("after", (always,)), *others))
    (message,) = run([graph], Workers(processes=2))
    assert message.startswith("1 job failed, 1 for want of them; the first: its process died, 2 times")
    found = ran(tmp_path)
    assert [found.count(name) for name in ("once", "always", "after")] == [2, 2, 0]
    assert all(found.count(job.key) == 1 for job in others)
    assert os.getpid() not in {graph.store.result(job)["process"] for job in (once, *others)}


def test_ctrl_c_leaves_nothing_claimed(tmp_path: Path) -> None:
    job, graph = Sum("x", (), ("KeyboardInterrupt",)), Wanted(Store(tmp_path), (B,))
    with pytest.raises(KeyboardInterrupt) as caught:
        run([Wanted(graph.store, (job,))], Workers())
    assert run([Wanted(graph.store, (job,))], Workers()) == []
    assert caught is not None  # with all that it holds on to


def test_what_passes_goes_when_nothing_that_is_left_needs_it(tmp_path: Path) -> None:
    passing = Job("sums", "p", partial(add, ()), (), passing=True)
    one, two = Sum("one", (passing,)), Sum("two", (passing,), ("ValueError",))
    graph = Wanted(Store(tmp_path), (one, two))
    assert run([graph], Workers())
    assert graph.store.finished(passing)
    assert run([graph], Workers()) == []
    assert not graph.store.finished(passing)
    assert not graph.store.path(passing).exists()
    assert ran(tmp_path) == ["p", "one", "two", "two"]


def test_a_store_drops_what_nothing_needs(tmp_path: Path) -> None:
    store = Store(tmp_path, {"sums": tmp_path / "elsewhere"})
    run([Wanted(store, (B,))], Workers())
    assert (tmp_path / "elsewhere" / "a.json").exists()
    store.drop(A)
    assert not store.finished(A)
    assert not store.path(A).exists()
    run([Wanted(store, (B,))], Workers())
    assert ran(tmp_path) == ["a", "b"]  # what is finished needs nothing


class Pretended:
    """What the pool uses of Ray, in this process: tasks see copies, and a folder of their own."""

    def __init__(self) -> None:
        self.tasks = 0

    def is_initialized(self) -> bool:
        return False

    def init(self, **options: Any) -> None:
        assert options["address"] is None

    def shutdown(self) -> None:
        self.ended = True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 2.0}

    def put(self, value: Any) -> Any:
        return dict(value)

    def remote(self, **options: Any) -> Any:
        assert options["max_retries"] == 0
        return lambda function: type("Task", (), {"remote": lambda _, *args: self._reply(function, args)})()

    def _reply(self, function: Any, args: Any) -> Any:
        self.tasks += 1
        future: Any = pool.Future()
        try:
            future.set_result(function(*args))
        except Exception as error:
            future.set_exception(error)
        return type("Reference", (), {"future": lambda _: future})()


def test_tasks_of_a_cluster_get_what_they_need_and_give_back_what_they_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = Pretended()
    monkeypatch.setitem(sys.modules, "ray", ray)
    bad = Sum("bad", (A,), ("ValueError",) * 2)
    graph = Wanted(Store(tmp_path), (D, bad, Sum("after", (bad,))))
    (message,) = run([graph], Workers(ray="local"))
    assert "ValueError: bad is ValueError" in message
    assert ran(tmp_path) == []  # everything ran in folders that are no more
    assert graph.store.result(D)["value"] == 5
    assert (graph.store.path(D) / "file").read_text() == "d"
    assert (ray.tasks, ray.ended) == (5, True)
    assert failures([graph]) == [message]


@pytest.mark.slow
def test_a_ray_run_on_local_workers_is_the_one_here(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    found = []
    for name, workers in (("here", Workers()), ("ray", Workers(ray="local"))):
        run([Wanted(Store(tmp_path / name), (D,))], workers)
        results = [Store(tmp_path / name).result(job) for job in (A, B, C, D)]
        found.append([(each["value"], each["drawn"]) for each in results])
    assert found[0] == found[1]
