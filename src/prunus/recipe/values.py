"""Values that sections of several kinds take: counts, shares, devices, subsets of parameters, paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from prunus.adapt import subsets

__all__ = [
    "Count",
    "Device",
    "Folder",
    "Globs",
    "Part",
    "Positive",
    "Seed",
    "Share",
    "Subsets",
    "Whole",
    "check_there",
    "looks_local",
]

Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]  # what torch's generators take
Part = Annotated[float, Field(ge=0, lt=1)]  # a share that is not all
Globs = tuple[str, ...]
Folder = Annotated[str, AfterValidator(os.path.expanduser)]  # that is written


def looks_local(text: str) -> bool:
    """Whether a source is meant as a path, not as a hub name."""
    endings = (".txt", ".gz", ".parquet", ".jsonl", ".gguf", ".safetensors", ".tsv", ".csv", ".npz")
    return text.startswith((".", "/", "~")) or text.endswith(endings) or text.count("/") > 1


def check_there(path: str, mend: str, *, key: str = "") -> None:
    """Refuse a path of nothing. key: what the message begins with, where the section does not say it."""
    if not Path(path).expanduser().exists():
        raise ValueError(f"{key}no file or folder {path!r} (seen from {os.getcwd()}); {mend}")


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("a device is auto, cpu, cuda or one GPU such as cuda:1")
    return value


Device = Annotated[str, AfterValidator(_device)]


def _subsets(value: Any) -> Any:
    """Subset names from a list or from one text with commas; refused as `adapt` refuses them."""
    if not isinstance(value, str | list | tuple):
        raise ValueError("give names of subsets, as in [biases, norms]")
    names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
    subsets.check_subsets(names)
    return names


Subsets = Annotated[tuple[str, ...], BeforeValidator(_subsets)]
