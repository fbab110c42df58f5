"""How a grid's tables and pictures are laid out, and what one number of a cell is: a mean with its deviation."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from prunus.run.plain import Strict

__all__ = ["Layout", "Show", "mean_and_std", "picture_of", "spread"]


class Show(Strict):
    """How tables and pictures are laid out.

    across: the axis whose labels are a table's columns and a picture's abscissa; lines: the axis with a line for each
    label; columns: further numbers of each cell, as a classifier's result names them (dotted), such as speedup.
    """

    across: str | None = None
    lines: str | None = None
    columns: list[str] = Field(default_factory=list[str])


@dataclass(frozen=True)
class Layout:
    """What tables are made with: the labels of every axis, what is asked for, and the folder that they go to."""

    axes: Mapping[str, Sequence[str]]
    show: Show
    out: Path

    def is_numeric(self, axis: str) -> bool:
        """Whether an axis has labels that are numbers."""
        labels = self.axes[axis]
        return len(labels) > 1 and all(re.match(r"\d", label) for label in labels)


def picture_of(out: Path, label: str) -> Path:
    """The file of a picture; what a label says stays in its name.

    >>> picture_of(Path("out"), "../w/o LoRA")
    PosixPath('out/grid-..-w-o LoRA.png')
    """
    plain = re.sub(r"[/\\\0]", "-", label)[:100]
    return out / f"grid-{plain}.png"


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and the sample deviation, which a single value has not."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def spread(found: Mapping[str, Any]) -> str:
    """A mean with its deviation, if there is one."""
    places = 0 if found["mean"] >= 1000 else 1 if found["mean"] >= 100 else 2
    deviation = "" if found["std"] is None else f" ± {found['std']:.{places}f}"
    return f"{found['mean']:.{places}f}{deviation}"
