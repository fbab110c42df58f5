"""metrics.jsonl: one JSON object a line, appended whole, so that a killed run leaves only complete lines."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.machine import json_line, json_value, naming

_TIMES = ("time", "seconds", "tokens_per_second", "images_per_second", "peak_memory")


def append_metrics(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append `row` with the time (seconds since 1970) as one line, in one write that other processes cannot split.

    NaN and infinities are the strings "nan", "inf", "-inf", which every JSON reader takes and `read_metrics` undoes.
    Raises OSError for a full disk, which keeps no part of the line.

    >>> append_metrics("run/metrics.jsonl", {"stage": "prune", "loss": 2.5})
    """
    line = f"{json_line({'time': round(time.time(), 3), **row})}\n".encode()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        with naming(path):
            written = os.write(file, line)
            if written < len(line):
                os.ftruncate(file, os.fstat(file).st_size - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    finally:
        os.close(file)


def append_once(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append `row` unless it is there, but for times: a run that goes on after a kill meets its own rows again.

    >>> append_once("run/metrics.jsonl", {"stage": "prune", "loss": 2.5})
    """
    rows = read_metrics(path) if Path(path).exists() else []
    if _lasting(row) not in map(_lasting, rows):
        append_metrics(path, row)


def _lasting(row: Mapping[str, Any]) -> str:
    return json_line({key: value for key, value in sorted(row.items()) if key not in _TIMES})


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, oldest first. Raises ValueError naming a line that is not JSON."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [_row(path, number, line) for number, line in enumerate(lines, 1)]


def _row(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        return json_value(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); delete the line to read the rest") from error
