"""Tables of a grid of soups, as Markdown, from its members.jsonl: what docs/results/soups.md is written around.

    python scripts/soup_tables.py runs/soups > tables.md

For each cell: every row (soup, members, baselines) with its accuracy, calibration error, training and inference; wins
and losses of the soup seed by seed; corrupted images; what lies between members; accuracy by phase.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.jobs.tables import mean_and_std, read_results, spread
from prunus.report import markdown_table

Result = Mapping[str, Any]
AGAINST = ("mean_member", "best_member", "imp", "longer", "swa", "reprune", "ensemble", "dense_soup_retrained")


def cells(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Soups of one cell, by seed: its labels, its results."""
    found: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda each: (list(each["labels"].items()), each["seed"])):
        if "soup" in result:
            found.setdefault(", ".join(result["labels"].values()), []).append(result)
    yield from found.items()


def mean(values: Sequence[float | None], scale: float = 1.0) -> str | None:
    """Mean and deviation over seeds as text, None if a seed has no such number."""
    known = [scale * value for value in values if value is not None]
    return spread(mean_and_std(known)) if known and len(known) == len(values) else None


def rows_of(results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows of one cell, in the order in which a soup lists them."""
    shown: list[dict[str, Any]] = []
    for place, first in enumerate(results[0]["rows"]):
        same = [each["rows"][place] for each in results]
        line: dict[str, Any] = {"run": first["row"], "accuracy": mean([each["accuracy"] for each in same], 100)}
        line |= {"loss": mean([each["loss"] for each in same])}
        for key, name in (("calibration_error", "calibration error"), ("worst_class", "worst class")):
            line[name] = mean([each[key] for each in same], 100)
        line |= {"epochs": first["epochs"], "inference, %": 100 * first["inference"]}
        if "corrupted" in results[0]:
            corrupted = [each.get("corrupted") for each in same]
            for key, name in (("top1", "corrupted"), ("calibration_error", "its calibration error")):
                line[name] = None if None in corrupted else mean([each[key] for each in corrupted if each], 100)
        shown.append(line)
    return shown


def against(label: str, results: Sequence[Result], value: Callable[[Result, str], float | None]) -> dict[str, Any]:
    """The soup less each of the others, in points, and in how many seeds it is above."""
    line: dict[str, Any] = {"cell": label, "seeds": len(results)}
    for name in AGAINST:
        pairs = [(value(each, "soup"), value(each, name)) for each in results]
        apart = [100 * (soup - other) for soup, other in pairs if soup is not None and other is not None]
        line[name] = f"{statistics.fmean(apart):+.2f} ({sum(x > 0 for x in apart)})" if apart else None
    return line


def plain(result: Result, name: str) -> float | None:
    """Accuracy of a row."""
    return result["soup"].get(name)


def corrupted(result: Result, name: str) -> float | None:
    """Mean accuracy of a row on corrupted images."""
    found = result.get("corrupted", {}).get("rows", {}).get(name)
    return None if found is None else found["mean"]["top1"]


def between(label: str, results: Sequence[Result]) -> dict[str, Any]:
    """Distances, angles and barriers of the last phase's members."""
    found = [each["between"] for each in results]
    line: dict[str, Any] = {"cell": label}
    for key, name in (("l2_mean", "L2"), ("angle_mean", "angle"), ("barycentre_mean", "to the mean")):
        line[name] = mean([each[key] for each in found])
    barriers = [line["barrier"] for each in found for line in each["lines"].values()]
    return line | {"highest barrier (loss)": max(barriers) if barriers else None}


def phases(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Accuracy after each phase."""
    shown: list[dict[str, Any]] = []
    for same in zip(*(each["phases"] for each in results), strict=True):
        line: dict[str, Any] = {"sparsity": f"{100 * same[0]['sparsity']:.1f} %"}
        line["soup"] = mean([each["soup"] for each in same], 100)
        line["mean member"] = mean([statistics.fmean(each["members"]) for each in same], 100)
        line["best member"] = mean([max(each["members"]) for each in same], 100)
        for name in ("imp", "longer"):
            line[name] = mean([each.get(name) for each in same], 100)
        shown.append(line)
    return shown


def text(results: Sequence[Result]) -> str:
    """The whole page."""
    found = dict(cells(results))
    parts = ["## The soup less the others, in points of accuracy (seeds in which it is above)\n"]
    parts.append(markdown_table([against(label, each, plain) for label, each in found.items()]))
    outside = {label: each for label, each in found.items() if all("corrupted" in one for one in each)}
    if outside:
        parts.append("## The same on corrupted images\n")
        parts.append(markdown_table([against(label, each, corrupted) for label, each in outside.items()]))
    apart = {label: each for label, each in found.items() if all("between" in one for one in each)}
    if apart:
        parts.append("## Between members\n")
        parts.append(markdown_table([between(label, each) for label, each in apart.items()]))
    for label, each in found.items():
        seeds = ", ".join(str(one["seed"]) for one in each)
        parts.append(f"## {label} (seeds {seeds})\n")
        parts.append(markdown_table(rows_of(each)))
        if len(each[0]["phases"]) > 1:
            parts.append(markdown_table(phases(each)))
    return "\n".join(parts)


def main() -> None:
    """Print the tables of a grid's folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    sys.stdout.write(text(list(read_results(args.folder).values())))


if __name__ == "__main__":
    main()
