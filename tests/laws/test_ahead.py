"""Loading, computing and writing overlap: proved by what must have begun before what may end, not by a clock."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from prunus.patterns import Unstructured
from prunus.score.criteria import magnitude
from prunus.stream.sources import ahead
from prunus.stream.stream import stream
from prunus.stream.work import Work
from tests.conftest import VOCABULARY, tiny_llama

CPU = torch.device("cpu")
NAMES = ["0", "1", "2", "3", "4"]
PATIENCE = 20.0  # seconds until a test that would wait for ever fails


class Slow:
    """A source that notes what it does, and does what a test hooks into it."""

    def __init__(self) -> None:
        self.model = nn.Sequential(*(nn.Linear(2, 2) for _ in NAMES))
        self.began: dict[str, threading.Event] = defaultdict(threading.Event)
        self.log: list[str] = []
        self.held = self.most = 0
        self.on_load: Callable[[str], None] = lambda name: None

    def load(self, name: str, device: torch.device) -> nn.Module:
        self.note(f"load {name}")
        self.held += 1
        self.most = max(self.most, self.held)
        self.on_load(name)
        return self.model.get_submodule(name)

    def release(self, name: str) -> None:
        self.held -= 1
        self.note(f"release {name}")

    @contextmanager
    def outside(self, device: torch.device) -> Generator[None]:
        self.note("outside")
        yield

    def note(self, what: str) -> None:
        self.log.append(what)
        self.began[what].set()

    def needs(self, what: str) -> None:
        """Go on only after something else has begun: if it waits for this, nothing ever does."""
        assert self.began[what].wait(PATIENCE), f"{what} did not begin meanwhile: {self.log}"


def work(source: Slow, save: Callable[[str], None], compute: Callable[[str], object] = lambda name: None) -> None:
    with ahead(source, NAMES, CPU) as moving:
        for name in NAMES:
            moving.load(name, CPU)
            compute(name)
            moving.release(name, partial(save, name))


def test_all_three_go_on_at_once_and_in_order() -> None:
    """Block k is computed only while k + 1 is brought, and k - 1 is saved only while k is computed."""
    source = Slow()

    def save(name: str, following: str | None) -> None:
        source.note(f"save {name}")
        if following is not None:
            source.needs(f"compute {following}")
        source.note(f"saved {name}")

    with ahead(source, NAMES, CPU) as moving:
        for name, following in zip(NAMES, [*NAMES[1:], None], strict=True):
            assert moving.load(name, CPU) is source.model.get_submodule(name)
            source.note(f"compute {name}")
            if following is not None:
                source.needs(f"load {following}")
            moving.release(name, lambda name=name, following=following: save(name, following))
    place = {what: index for index, what in enumerate(source.log)}
    for name in NAMES:
        stages = [place[f"{stage} {name}"] for stage in ("load", "compute", "save", "saved", "release")]
        assert stages == sorted(stages)
    assert [what for what in source.log if what.startswith("load")] == [f"load {name}" for name in NAMES]
    assert source.held == 0
    assert source.most <= 3


def test_a_slow_writer_holds_the_others_up_before_memory_runs_out() -> None:
    source = Slow()
    gate = threading.Event()
    reached: list[str] = []

    def compute() -> None:
        with ahead(source, NAMES, CPU) as moving:
            for name in NAMES:
                moving.load(name, CPU)
                reached.append(name)
                moving.release(name, lambda: gate.wait(PATIENCE) and None)

    thread = threading.Thread(target=compute)
    thread.start()
    source.needs("load 2")
    thread.join(0.2)  # would be long done
    assert reached == ["0", "1"]
    gate.set()
    thread.join(PATIENCE)
    assert reached == NAMES
    assert source.most <= 3


def test_an_error_while_loading_comes_when_that_block_is_asked_for() -> None:
    source = Slow()

    def fail(name: str) -> None:
        if name == "2":
            raise OSError("shard 2 is damaged")

    source.on_load = fail
    computed: list[str] = []
    with pytest.raises(OSError, match="shard 2"):
        work(source, lambda name: None, computed.append)
    assert computed == ["0", "1"]
    assert "load 3" not in source.log


@pytest.mark.parametrize("last", [False, True])
def test_an_error_while_saving_is_raised(last: bool) -> None:
    source = Slow()
    bad = NAMES[-1] if last else "1"

    def save(name: str) -> None:
        if name == bad:
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        work(source, save)
    assert ("load 4" in source.log) == last


def test_an_error_of_the_work_ends_it_with_what_is_done_saved_and_what_was_brought_released() -> None:
    source = Slow()

    def compute(name: str) -> None:
        if name == "1":
            raise KeyError(name)

    with pytest.raises(KeyError):
        work(source, lambda name: source.note(f"save {name}"), compute)
    assert source.held == 1, "block 1, on which the work stopped; block 2, which had been brought, is released"
    assert "save 0" in source.log
    assert "release 2" in source.log


def test_nothing_is_in_the_background_while_the_outside_is_used() -> None:
    source = Slow()
    with ahead(source, NAMES[:1], CPU) as moving:
        moving.load("0", CPU)
        moving.release("0", lambda: source.note("save 0"))
        with moving.outside(CPU):
            assert source.log[-3:] == ["save 0", "release 0", "outside"]


def test_a_block_that_shares_weights_with_the_one_before_is_not_moved_early() -> None:
    source = Slow()
    source.model[1].weight = source.model[0].weight
    with ahead(source, NAMES, CPU) as moving:
        moving.load("0", CPU)
        assert "load 1" not in source.log
        moving.release("0")
        moving.load("1", CPU)
        source.needs("load 2")
        moving.release("1")


class Refusing(Work):
    def save(self, name: str, *rest: object) -> None:
        raise OSError(f"no space for {name}")


def test_a_block_is_brought_after_one_that_shares_its_weights_is_released() -> None:
    source = Slow()
    source.model[3].weight = source.model[1].weight
    late = threading.Event()

    def save(name: str) -> None:
        if name == "1":
            late.wait(0.05)

    work(source, save)
    assert source.log.index("release 1") < source.log.index("load 3")


def test_a_full_disk_ends_a_pruning(tmp_path: Path) -> None:
    tokens = torch.randint(VOCABULARY, (4, 8), generator=torch.Generator().manual_seed(1))
    work = Refusing(tmp_path, "key").open()
    with pytest.raises(OSError, match=r"no space for model\.layers\.0"):
        stream(tiny_llama(), magnitude, Unstructured("row"), 0.5, tokens=tokens, work=work)
    assert not list(tmp_path.glob("model*"))
