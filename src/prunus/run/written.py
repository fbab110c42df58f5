"""What a command writes where `--out` says: a new file, or one in the place of what Prunus wrote there before.

It is looked at before any work: a model that was inspected, a text, or someone's notes are not written over.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from prunus.machine import read_json
from prunus.measure import HEADLINES
from prunus.report import PAGE_MARK

__all__ = ["check_numbers", "check_page"]

_HEAD = 1 << 10  # bytes in which a page says that it is ours
_EVALUATED = {"perplexity", *HEADLINES}
_EVALUATION = _EVALUATED | {"head", "zero_shot", "lm_eval", "corrupted"}
_ROWS = ({"entries", "zeros", "pattern"}, {"model", "parameters", "zeros"})  # of weights, of models


def check_numbers(out: Path | None) -> None:
    """Raises ValueError for a file of numbers that cannot be written, or would take the place of anything else's."""
    if out is not None:
        _check(out, _is_numbers)


def check_page(out: Path, picture: Path | None = None) -> None:
    """Raises ValueError as `check_numbers`, of a page. picture: what is written beside it."""
    _check(out, _is_page)
    if picture is not None and picture.exists() and not out.exists():
        raise ValueError(f"--out {out}: the page's picture would take the place of {picture}; give another file")


def _check(out: Path, is_ours: Callable[[Path], bool]) -> None:
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give a file")
    folder = next(each for each in out.absolute().parents if each.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: nothing can be written in {folder}; give another file")
    if out.exists() and not (out.is_file() and is_ours(out)):
        raise ValueError(f"--out {out} is there already, and not what prunus wrote; give another file, or delete it")


def _is_numbers(path: Path) -> bool:
    with path.open("rb") as file:
        if file.read(1) not in (b"{", b"["):  # of a model it would take long to see
            return False
    try:
        found = read_json(path)
    except ValueError:
        return False
    if isinstance(found, dict):
        return found.keys() <= _EVALUATION and any(isinstance(found.get(name), dict) for name in _EVALUATED)
    return all(isinstance(row, dict) and any(keys <= row.keys() for keys in _ROWS) for row in found)


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return PAGE_MARK.encode() in file.read(_HEAD)
