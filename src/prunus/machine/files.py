"""Text and JSON files that are complete or absent: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

__all__ = ["write_json", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 in one atomic step, making the folder if need be.

    >>> write_text(Path("out/notes.txt"), "done")
    """
    partial = path.with_name(f"{path.name}.partial{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` in one atomic step; what JSON does not know is written as text.

    >>> write_json(Path("out/result.json"), {"perplexity": 12.5})
    """
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")
