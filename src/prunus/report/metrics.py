"""metrics.jsonl: one JSON object a line, appended whole, so that a killed run leaves only complete lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["append_metrics", "read_metrics"]


def append_metrics(path: str | Path, row: Mapping[str, Any]) -> None:
    """Append `row` with the time (seconds since 1970) as one line, in one write that other processes cannot split.

    NaN and infinities are stored as the strings "nan", "inf", "-inf", which every JSON reader takes.

    >>> append_metrics("run/metrics.jsonl", {"stage": "prune", "loss": 2.5})
    """
    line = json.dumps(_plain({"time": round(time.time(), 3), **row}), allow_nan=False) + "\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All rows of a metrics file, oldest first. Raises ValueError naming a line that is not JSON."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [_row(path, number, line) for number, line in enumerate(lines, 1)]


def _row(path: str | Path, number: int, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); delete the line to read the rest") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if value - value == 0 else str(value)  # inf - inf and nan - nan are nan
    return _plain(value.item()) if callable(getattr(value, "item", None)) else str(value)
