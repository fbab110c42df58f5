"""Progress bars with time estimates on a terminal; elsewhere a line in the log now and then."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["Advance", "progress"]

log = logging.getLogger(__name__)

_LOG_EVERY = 30.0  # seconds


class Advance(Protocol):
    """Says how far the work is: `advance(n)` by n more, `advance.to(done)` to an absolute count."""

    def __call__(self, steps: float = 1) -> None:
        """`steps` more are done."""
        ...

    def to(self, done: float) -> None:
        """`done` in all are done, counted from the beginning."""
        ...


@contextmanager
def progress(description: str, total: float | None, *, console: Console | None = None) -> Generator[Advance]:
    """A bar of `total` steps (None: unknown, the bar pulses) on stderr while the block runs.

    Without a terminal nothing is drawn; the start, the end and every half minute between are logged at INFO.

    >>> with progress("prune", 12) as advance:
    ...     advance(1)
    """
    console = console or Console(stderr=True)
    started = time.monotonic()
    if console.is_terminal:
        columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as bar:
            yield _Bar(bar, description, total)
    else:
        log.info("%s: started", description)
        yield _Log(description, total)
    log.info("%s: done in %.1f s", description, time.monotonic() - started)


class _Bar:
    def __init__(self, bar: Progress, description: str, total: float | None) -> None:
        self.bar = bar
        self.task = bar.add_task(description, total=total)

    def __call__(self, steps: float = 1) -> None:
        self.bar.advance(self.task, steps)

    def to(self, done: float) -> None:
        self.bar.update(self.task, completed=done)


class _Log:
    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total, self.done = description, total, 0.0
        self.started = self.last = time.monotonic()

    def __call__(self, steps: float = 1) -> None:
        self.to(self.done + steps)

    def to(self, done: float) -> None:
        self.done = done
        now = time.monotonic()
        if now - self.last < _LOG_EVERY or done <= 0:
            return
        self.last = now
        left = f" of {self.total:g}, {(now - self.started) * (self.total / done - 1):.0f} s left" if self.total else ""
        log.info("%s: %g%s", self.description, done, left)
