"""What a run reads, by contents: a killed run that goes on must not mix two models, or two texts, under one path.

path ─▶ size, time and hash of the head of a large file, hash of a small one, all of these of a folder
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prunus.checkpoint import PICKLES
from prunus.machine import read_json, write_json
from prunus.save import check_apart, source_folder

__all__ = ["check_inputs", "check_outside", "contents_of", "inputs_of"]

_WHOLE = 1 << 26  # bytes of the largest file that is read whole
_HEAD = 1 << 20
_NAMED = ("model", "teacher", "weights", "source", "tasks", "start", "folder")  # keys of recipes that name what is read
_OF_MODELS = (".safetensors", *PICKLES, ".json", ".gguf", ".model", ".jinja", ".txt", ".py")


def inputs_of(recipe: BaseModel) -> set[str]:
    """The models, texts and images that a recipe names."""
    return set(_named(recipe.model_dump(mode="json")))


def check_outside(out: Path, recipes: Sequence[BaseModel]) -> None:
    """Raises ValueError for a folder that recipes read, or that lies in what they read, or has it inside."""
    for name in sorted({name for recipe in recipes for name in inputs_of(recipe)}):
        check_apart(out, name)


def check_inputs(out: Path, recipes: Sequence[BaseModel]) -> None:
    """Write the contents of all that recipes name to out/inputs.json, or compare with what stands there.

    Models of the hub count when they are in its cache. Raises ValueError naming what was changed.
    """
    path = out / "inputs.json"
    known: dict[str, str] = read_json(path) if path.exists() else {}
    names = {name for recipe in recipes for name in inputs_of(recipe)}
    found = {name: contents for name in sorted(names) if (contents := contents_of(name)) is not None}
    changed = [name for name, contents in found.items() if known.get(name, contents) != contents]
    if changed:
        raise ValueError(
            f"{changed[0]!r} was changed since {out} was begun with it: put the old one back, give another folder with "
            f"--out, or delete {path} if it is the same all the same"
        )
    if found.keys() - known.keys():
        write_json(path, known | found)


def contents_of(name: str) -> str | None:
    """Hash of what a name in a recipe means, of a large file and of images by size and time; None for what is not here.

    >>> contents_of("digits")
    """
    path = source_folder(name) or Path(name).expanduser()
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        return None
    whole = hashlib.sha256()
    model = (path / "config.json").is_file()
    for each in sorted(path.iterdir() if model else path.rglob("*")):
        if each.is_file() and (each.suffix in _OF_MODELS or not model):
            whole.update(f"{each.relative_to(path)} {_file(each) if model else _stamp(each)}\n".encode())
    return whole.hexdigest()


def _named(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, str) and key in _NAMED:
        yield value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _named(item, key if key == "tasks" else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _named(item, key)


def _file(path: Path) -> str:
    with path.open("rb") as file:
        if path.stat().st_size <= _WHOLE:
            return hashlib.file_digest(file, "sha256").hexdigest()
        return hashlib.sha256(file.read(_HEAD)).hexdigest() + _stamp(path)


def _stamp(path: Path) -> str:
    found = path.stat()
    return f"{found.st_size} {found.st_mtime_ns}"
