"""What a run of any task stands on: a folder of its own, held while it runs, what it reads, and its device.

out/recipe.yaml    the resolved recipe, before any work      out/result.json    what the run found, when it is finished
out/.prunus-run    that the folder is Prunus's, and whose: where it is missing and other files are, nothing is written
                   or deleted. `.prunus-run.lock` beside it is held by the process that runs

out/inputs.json    what is read, by contents                 out/work/          what a killed run goes on from
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from filelock import FileLock
from pydantic import BaseModel

from prunus.jobs.inputs import check_inputs, check_outside
from prunus.machine import counted, locked, ranks, read_json, remove_partials, write_json, write_text
from prunus.train import unrecordable

__all__ = [
    "begin",
    "check_recordable",
    "device_name",
    "device_of",
    "entered",
    "finished",
    "held",
    "mark",
    "ran_on",
    "where",
]

log = logging.getLogger(__name__)

_MARKER = ".prunus-run"


class Placed(Protocol):
    """A recipe that says where it runs."""

    @property
    def device(self) -> str: ...


def finished(recipe: BaseModel, out: Path, key: str, left: Sequence[str] = ()) -> dict[str, Any] | None:
    """The result of a finished run in its folder, None where there is none.

    key: the hash of its recipe; left: names of what it left there. Raises ValueError for the result of another recipe,
    one without the files that it left, and a folder that is read, or has files that no run of Prunus left: a run
    overwrites and deletes what has its names.
    """
    check_outside(out, [recipe])
    _check_ours(out, "run")
    path = out / "result.json"
    if not path.exists():
        return None
    found = read_json(path)
    if not isinstance(found, dict) or found.get("key") != key:
        raise ValueError(f"out: {out} holds the result of another recipe; give another folder with --out, or delete it")
    gone = [name for name in left if not (out / name).exists()]
    if gone:
        raise ValueError(f"out: {out} is finished, but its {gone[0]} is gone; delete {path} to make it again")
    return found


def mark(out: Path, kind: str) -> None:
    """Make a folder that of a run, a grid, a sweep or a text.

    Raises ValueError for a folder of another kind, or with files that Prunus did not leave.
    """
    _check_ours(out, kind)
    if not (out / _MARKER).exists():
        write_text(out / _MARKER, _ours(kind))


@contextmanager
def held(out: Path, kind: str = "run") -> Generator[None]:
    """Context in which a folder of a kind is this process's, and that of the processes launched together with it.

    Raises ValueError that says who has it, and as `mark` does.
    """
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock = _locked(out, kind) if ranks.is_main() else None
    if ranks.agree(lock is None):
        raise ValueError(f"out: {out} is in use{_holder(out)}; wait for it, or give another folder with --out")
    try:
        yield
    finally:
        if lock is not None:
            _leave(out, lock, new)


@contextmanager
def entered(
    recipe: BaseModel, out: Path, key: str, left: Sequence[str], picture: str
) -> Generator[dict[str, Any] | None]:
    """Context in which a run's folder is held: its result, None while there is none; afterwards out/work is gone.

    picture: without it a finished run is entered once more. Raises ValueError as `finished` and `held` do.
    """
    found = finished(recipe, out, key, left)
    ranks.wait()  # nothing is written before every process has looked
    if found is not None:
        log.warning("%s is finished: nothing is repeated", out)
        if (out / picture).exists() and not (out / "work").exists():
            yield found
            return
    with held(out):
        yield finished(recipe, out, key, left)  # who had it until now may have ended it
        ranks.wait()
        if ranks.is_main():
            shutil.rmtree(out / "work", ignore_errors=True)
        ranks.wait()


def begin(out: Path, recipe: BaseModel) -> None:
    """Write the resolved recipe of a run into its folder, whose inputs must be those of when it was begun.

    Raises ValueError naming what was changed since.
    """
    check_inputs(out, [recipe])
    write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def ran_on(work: Path, name: str, needs: Iterable[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """What a result says of devices: the one the work began on, and, if others went on with it, which.

    work: a folder that is there until the result is; needs: results that this one goes by. Numbers of different devices
    or thread counts differ in their last bits.
    """
    path = work / "devices.json"
    names: list[str] = list(dict.fromkeys([*(read_json(path) if path.exists() else []), name]))
    if ranks.is_main():
        write_json(path, names)
    return where(names, [name for need in needs for name in need.get("resumed_on", ())])


def where(names: Sequence[str], others: Sequence[str] = ()) -> dict[str, Any]:
    """How a file says on which devices its work was done: the first one, and the rest and others, if there are any.

    >>> where(["CPU, 1 threads", "CPU, 1 threads"])
    {'device': 'CPU, 1 threads'}
    """
    first, *rest = dict.fromkeys(names)
    later = list(dict.fromkeys([*rest, *others]))
    return {"device": first} | ({"resumed_on": later} if later else {})


def _check_ours(out: Path, kind: str) -> None:
    if file := next((each for each in (out, *out.parents) if each.is_file()), None):
        raise ValueError(f"out: {str(file)!r} is a file; give a folder")
    if link := next((each for each in (out, *out.parents) if each.is_symlink() and not each.exists()), None):
        raise ValueError(f"out: {str(link)!r} is a link that leads nowhere; make the folder it names, or give another")
    found = out.iterdir() if out.is_dir() else []
    names = sorted(each.name for each in found if not each.match(f".{_MARKER}.*"))  # of one that was killed as it began
    if names and _MARKER not in names and not (kind == "grid" and "members.jsonl" in names):  # which only grids leave
        raise ValueError(
            f"out: {out} is no {kind} folder and has other files ({names[0]!r}, ...); give another --out, or make an "
            f"empty file {_MARKER} in it if Prunus may overwrite and delete them"
        )
    said = _said(out).split()
    if len(said) > 1 and said[1] != kind:
        raise ValueError(f"out: {out} is the folder of a {said[1]}, not of a {kind}; give another --out")


def _locked(out: Path, kind: str) -> FileLock | None:
    """The lock of a folder, which now says who has it."""
    mark(out, kind)
    lock = locked(out / f"{_MARKER}.lock")
    if lock is None:
        return None
    remove_partials(out)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    write_text(out / _MARKER, f"{_ours(kind)}by process {os.getpid()} on {socket.gethostname()}, since {since}\n")
    return lock


def _leave(out: Path, lock: FileLock, new: Sequence[Path]) -> None:
    """Let others have a folder; of a run which wrote nothing, take back the folders that were made for it."""
    left = {path.name for path in out.iterdir()} if new and out.is_dir() else set[str]()
    empty = left == {_MARKER, f"{_MARKER}.lock"}
    if empty:
        (out / _MARKER).unlink()  # while nobody else can have the folder, and need it
    Path(lock.lock_file).unlink(missing_ok=True)  # who finds it free now finds what this one left
    lock.release()
    with suppress(OSError):  # of another run, which came since
        for folder in new if empty else ():
            folder.rmdir()


def _holder(out: Path) -> str:
    """Who said last that the folder is its own."""
    said = _said(out).splitlines()[1:]
    return f" {said[0]}" if said else ""


def _ours(kind: str) -> str:
    """The first line of a marker, whose second word `_check_ours` reads."""
    return f"A {kind} of Prunus; it may overwrite and delete what has its names here.\n"


def _said(out: Path) -> str:
    """What a folder's marker says; nothing where there is none, or its run has just taken it back."""
    with suppress(FileNotFoundError):
        return (out / _MARKER).read_text(encoding="utf-8")
    return ""


def device_of(recipe: Placed) -> torch.device:
    """The device of a recipe; "auto" is the first GPU if there is one.

    Raises ValueError when a CUDA device is asked for and none is there.
    """
    if recipe.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(recipe.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {recipe.device!r} asked for, but torch sees no GPU; use device: auto or cpu")
    return device


def check_recordable(device: torch.device, *, scaled: bool) -> None:
    """Raises ValueError where a recipe's steps are to be recorded, `capture: true`, and the device cannot.

    scaled: whether the precision is fp16.
    """
    if why := unrecordable(device, scaled=scaled):
        raise ValueError(f"capture: {why}; leave it out")


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"
