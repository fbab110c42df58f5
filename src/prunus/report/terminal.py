"""What a terminal shows: tables (in files as Markdown, with one formatting of numbers), and how far the work is.

Elsewhere than on a terminal, and inside of other work that is shown, progress is a line in the log now and then.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from prunus.machine import ranks

log = logging.getLogger(__name__)

_LOG_EVERY = 30.0  # seconds
_LEAST = 20  # characters that a name keeps
_drawing = threading.Lock()  # held by the bar that is on the terminal

Row = Mapping[str, Any]


def print_table(
    rows: Sequence[Row], columns: Sequence[str] | None = None, title: str = "", *, console: Console | None = None
) -> None:
    """Print rows (column -> value) as a table; numbers to the right, a missing value as a dash.

    columns: which, in order; those of all rows, as they come, if left out. Where the table is wider than the terminal,
    its longest names lose their middle, and texts wrap; elsewhere it is as wide as it needs. Raises ValueError without
    rows or for a column that no row has.

    >>> print_table([{"stage": "dense", "perplexity": 12.345}], title="Result")
    """
    columns = _columns(rows, columns)
    cells = {column: [format_value(row.get(column)) for row in rows] for column in columns}
    widths = {column: max(map(len, [column, *cells[column]])) for column in columns}
    whole = sum(widths.values()) + 3 * len(columns) + 1
    console = console or _console(whole)
    names = [column for column in columns if not any(" " in cell for cell in cells[column])]
    if names and console.is_terminal and whole > console.width:
        longest = max(names, key=lambda column: widths[column])
        cells[longest] = _shortened(cells[longest], max(_LEAST, widths[longest] - whole + console.width))
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        numeric = is_numeric(rows, column)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    console.print(table, markup=False)


def _console(width: int) -> Console:
    """Standard output; where it is no terminal, wide enough."""
    console = Console()
    return console if console.is_terminal else Console(width=max(width, console.width))


def _shortened(names: Sequence[str], width: int) -> list[str]:
    """Names without the beginning that all share, and where that is not enough, without their middle."""
    if len(names) > 1 and max(map(len, names)) > width:
        parts = [name.split(".") for name in names]
        shared = sum(1 for _ in takewhile(lambda alike: len(set(alike)) == 1, zip(*parts, strict=False)))
        names = [".".join(["…", *own[shared:]]) if shared else name for name, own in zip(names, parts, strict=True)]
    end = 3 * (width - 1) // 5
    return [name if len(name) <= width else f"{name[: width - 1 - end]}…{name[-end:]}" for name in names]


def markdown_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """The same table as GitHub Markdown."""
    columns = _columns(rows, columns)
    aligned = ["---:" if is_numeric(rows, column) else "---" for column in columns]
    lines = [columns, aligned, *([format_value(row.get(c)) for c in columns] for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def is_numeric(rows: Sequence[Row], column: str) -> bool:
    """Whether a column has numbers, which stand to the right."""
    return any(isinstance(row.get(column), int | float) for row in rows)


def format_value(value: Any) -> str:
    """Four significant digits for a float, thousands apart in a whole number, a dash for None, else the text."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or not value:
        return f"{value:g}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _columns(rows: Sequence[Row], columns: Sequence[str] | None) -> list[str]:
    if not rows:
        raise ValueError("a table needs at least one row")
    present = list(dict.fromkeys(key for row in rows for key in row))
    unknown = [column for column in columns or () if column not in present]
    if unknown:
        raise ValueError(f"no row has column {unknown[0]!r}; there are {', '.join(present)}")
    return list(columns) if columns is not None else present


class Advance(Protocol):
    """Says how far the work is: `advance(n)` by n more, `advance.to(done)` to an absolute count."""

    def __call__(self, steps: float = 1) -> None:
        """`steps` more are done."""
        ...

    def to(self, done: float) -> None:
        """`done` in all are done, counted from the beginning."""
        ...

    def step(self, done: int, loss: float) -> None:
        """`done` training steps in all are done, the last ones with this loss: what `train` takes as `on_step`."""
        ...


@contextmanager
def progress(
    description: str, total: float | None, *, tokens: int = 0, console: Console | None = None
) -> Generator[Advance]:
    """A bar of `total` steps (None: unknown, the bar pulses) on stderr while the block runs.

    tokens: those of a training step, whose speed is shown beside the loss. One bar is drawn at a time, by the process
    that was called. Where none is, the start, the end and every half minute between are logged at INFO.

    >>> with progress("prune", 12) as advance:
    ...     advance(1)
    """
    console = console or Console(stderr=True)
    started, ours = time.monotonic(), ranks.is_main() and multiprocessing.parent_process() is None
    if console.is_terminal and ours and _drawing.acquire(blocking=False):
        count = () if total is None else (MofNCompleteColumn(),)
        columns = (TextColumn("{task.description:<18}"), BarColumn(bar_width=12), *count)
        times = TimeElapsedColumn() if total is None else TimeRemainingColumn(elapsed_when_finished=True)
        try:
            with Progress(*columns, times, TextColumn("{task.fields[said]}"), console=console) as bar:
                yield _Bar(bar, description, total, tokens)
                if total is None:
                    bar.update(bar.task_ids[0], total=1, completed=1)
        finally:
            _drawing.release()
    else:
        log.info("%s: started", description)
        yield _Log(description, total)
    log.info("%s: done in %.1f s", description, time.monotonic() - started)


class _Bar:
    def __init__(self, bar: Progress, description: str, total: float | None, tokens: int) -> None:
        self.bar, self.tokens = bar, tokens
        self.task = bar.add_task(description, total=total, said="")
        self.first: tuple[int, float] | None = None

    def __call__(self, steps: float = 1) -> None:
        self.bar.advance(self.task, steps)

    def to(self, done: float) -> None:
        self.bar.update(self.task, completed=done)

    def step(self, done: int, loss: float) -> None:
        now = time.monotonic()
        self.first = self.first or (done, now)  # a run that goes on did not make the steps before
        passed = now - self.first[1]
        speed = f", {self.tokens * (done - self.first[0]) / passed:,.0f} tokens/s" if self.tokens and passed else ""
        self.bar.update(self.task, completed=done, said=f"loss {loss:.3f}{speed}")


class _Log:
    def __init__(self, description: str, total: float | None) -> None:
        self.description, self.total, self.done = description, total, 0.0
        self.started = self.last = time.monotonic()

    def __call__(self, steps: float = 1) -> None:
        self.to(self.done + steps)

    def step(self, done: int, loss: float) -> None:
        self.to(done, f", loss {loss:.3f}")

    def to(self, done: float, said: str = "") -> None:
        self.done = done
        now = time.monotonic()
        if now - self.last < _LOG_EVERY or done <= 0:
            return
        self.last = now
        left = f" of {self.total:g}, {(now - self.started) * (self.total / done - 1):.0f} s left" if self.total else ""
        log.info("%s: %g%s%s", self.description, done, left, said)
