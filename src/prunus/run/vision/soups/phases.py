"""Accuracy by phase: of a soup, its members, and the single runs beside it, over the seeds of one recipe."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from prunus.report import Point

__all__ = ["by_phase"]

_NAMES = {"soup": "soup", "imp": "imp", "longer": "longer imp"}


def by_phase(results: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Line -> (sparsity after the phase, accuracy in %, its deviation), a point for each phase.

    results: of one recipe with several seeds, the mean of which is taken. The deviation is that over seeds; of one
    result only the mean member has one, over its members.
    """
    lines: dict[str, list[Point]] = {}
    for phases in zip(*(result["phases"] for result in results), strict=True):
        label = f"{100 * phases[0]['sparsity']:.1f} %"
        values = {shown: [p[name] for p in phases] for name, shown in _NAMES.items() if all(name in p for p in phases)}
        values["mean member"] = [statistics.fmean(p["members"]) for p in phases]
        values["best member"] = [max(p["members"]) for p in phases]
        for name, found in values.items():
            spread = phases[0]["members"] if name == "mean member" and len(found) == 1 else found
            deviation = 100 * statistics.stdev(spread) if len(spread) > 1 else None
            lines.setdefault(name, []).append((label, 100 * statistics.fmean(found), deviation))
    return lines
