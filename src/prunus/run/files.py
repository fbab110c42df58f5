"""Files that are complete or absent: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` in one atomic step."""
    partial = path.with_name(f"{path.name}.partial{os.getpid()}")
    partial.write_text(text)
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` in one atomic step; what JSON does not know is written as text."""
    write_text(path, json.dumps(value, indent=1, default=str))
