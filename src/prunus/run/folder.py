"""What a run of any task stands on: its folder, claimed by the hash of its recipe, and its device.

out/recipe.yaml    the resolved recipe, before any work      out/result.json    what the run found, when it is finished
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from pydantic import BaseModel

from prunus.machine import write_text

__all__ = ["device_name", "device_of", "finished", "write_recipe"]


class Placed(Protocol):
    """A recipe that says where it runs."""

    @property
    def device(self) -> str: ...


def finished(out: Path, key: str) -> dict[str, Any] | None:
    """The result of a finished run in its folder, None where there is none. key: the hash of its recipe.

    Raises ValueError for the result of another recipe.
    """
    path = out / "result.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    if found is not None and found.get("key") != key:
        raise ValueError(f"out: {out} holds the result of another recipe; give another folder with --out, or delete it")
    return found


def write_recipe(out: Path, recipe: BaseModel) -> None:
    """Write the resolved recipe of a run that begins."""
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
