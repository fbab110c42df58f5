"""The mean of some numbers and their deviation, as values and as text."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["mean_and_std", "spread"]


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and the sample deviation, which a single value has not."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def spread(found: Mapping[str, Any]) -> str:
    """A mean with its deviation, if there is one."""
    places = 0 if found["mean"] >= 1000 else 1 if found["mean"] >= 100 else 2
    deviation = "" if found["std"] is None else f" ± {found['std']:.{places}f}"
    return f"{found['mean']:.{places}f}{deviation}"
