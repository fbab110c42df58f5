"""What a run of any task stands on: its folder, claimed by the hash of its recipe, and its device.

out/recipe.yaml    the resolved recipe, before any work      out/result.json    what the run found, when it is finished
out/.prunus-run    that the folder is a run's: where it is missing and other files are, nothing is written or deleted
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from pydantic import BaseModel

from prunus.machine import read_json, write_text

__all__ = ["device_name", "device_of", "finished", "write_recipe"]

_MARKER = ".prunus-run"


class Placed(Protocol):
    """A recipe that says where it runs."""

    @property
    def device(self) -> str: ...


def finished(out: Path, key: str) -> dict[str, Any] | None:
    """The result of a finished run in its folder, None where there is none. key: the hash of its recipe.

    Raises ValueError for the result of another recipe, and for a folder with files that no run of Prunus left: a run
    overwrites and deletes what has its names.
    """
    path = out / "result.json"
    if not path.exists():
        names = sorted(each.name for each in out.iterdir()) if out.is_dir() else []
        if names and _MARKER not in names:
            raise ValueError(f"out: {out} is no run folder and has other files ({names[0]!r}, ...); give another --out")
        return None
    found = read_json(path)
    if found.get("key") != key:
        raise ValueError(f"out: {out} holds the result of another recipe; give another folder with --out, or delete it")
    return found


def write_recipe(out: Path, recipe: BaseModel) -> None:
    """Make the folder that of a run which begins, with its resolved recipe."""
    write_text(out / _MARKER, "A run of Prunus; it may overwrite and delete what has its names here.\n")
    write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


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


def device_name(device: torch.device) -> str:
    """The device in words."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
