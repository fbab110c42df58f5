"""What a grid of classifiers found: rows of means and deviations over seeds, in percent, as tables and pictures."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.data import CORRUPTIONS
from prunus.machine import write_text
from prunus.measure import MEASURES
from prunus.report import markdown_table, plot_accuracy
from prunus.run.layout import Layout, mean_and_std, picture_of, spread
from prunus.run.vision.soups.phases import by_phase

__all__ = ["METRICS", "across", "row", "write"]

Result = Mapping[str, Any]

PERCENT = ("accuracy", "top5", "worst_class", "calibration_error", "maximum_calibration_error", "sparsity", "reached")
STAGES = ("dense", "pruned", "recalibrated", "retrained", "settled")
COSTS = ("speedup", "parameters", "nonzero")
NUMBERS = ("loss", *COSTS, "weight_change", "epochs", "steps", "seconds", "images_per_second")
LAST_PHASE = ("distance", "share", "initial_lr")
# What stands beside a soup, by the names of its rows.
SOUPS = (
    *("mean_member", "best_member", "ensemble", "uniform", "greedy", "learned", "imp", "longer", "swa", "reprune"),
    *("dense_soup", "dense_soup_pruned", "dense_soup_retrained"),
)
CORRUPTED_ROWS = ("mean_member", "best_member", "ensemble", "imp", "longer")
CORRUPTED = {  # column -> where it stands under `corrupted` in a result
    **{f"corrupted.{'accuracy' if name == 'top1' else name}": ("mean", name) for name in MEASURES},
    **{f"corrupted.severity_{severity}": ("by_severity", str(severity), "top1") for severity in range(1, 6)},
    **{f"corrupted.{name}": ("by_name", name, "top1") for name in CORRUPTIONS},
    **{f"corrupted.{name}": ("rows", name, "mean", "top1") for name in CORRUPTED_ROWS},
}
METRICS = (*PERCENT, *STAGES, *NUMBERS, *LAST_PHASE, *SOUPS, *CORRUPTED)
SHARES = {*PERCENT, *STAGES, *SOUPS, *CORRUPTED} - {"corrupted.loss"}


def row(results: Sequence[Result]) -> dict[str, Any]:
    """One cell: accuracy and the accuracies of the stages before, and every other number under `metrics`."""
    found = {name: _spread([_value(result, name) for result in results]) for name in METRICS}
    known = {name: value for name, value in found.items() if value is not None}
    shown = ("accuracy", "dense", "pruned")
    phases = {"accuracy by phase": by_phase(results)} if all("soup" in result for result in results) else {}
    return {**{name: known[name] for name in shown if name in known}, "metrics": known, **phases}


def write(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write table.md, a picture for each axis whose labels are numbers, and one of soups by phase."""
    write_text(layout.out / "table.md", _markdown(layout, rows) if rows else "Nothing is finished yet.\n")
    numeric = [axis for axis in layout.axes if layout.is_numeric(axis)]
    axes = [layout.show.across] if layout.show.across else numeric or [across(layout)]
    for axis in axes if rows else []:
        _plot(layout, rows, axis, layout.out / "grid.png" if len(axes) == 1 else picture_of(layout.out, axis))
    phased = [found for found in rows if any(len(line) > 1 for line in found.get("accuracy by phase", {}).values())]
    if phased:  # soups of more than one phase
        panels = {", ".join(str(found[name]) for name in layout.axes): found["accuracy by phase"] for found in phased}
        path = layout.out / "phases.png"
        plot_accuracy(panels, path, xlabel="sparsity after the phase", dense=_dense(phased))


def across(layout: Layout) -> str:
    """The axis along which a table's columns stand: the one asked for, the first of numbers, or the last of all."""
    if layout.show.across is not None:
        return layout.show.across
    return next((axis for axis in layout.axes if layout.is_numeric(axis)), list(layout.axes)[-1])


def _value(result: Result, name: str) -> float | None:
    """A number of a result, in percent where it is a share that people read so."""
    if name in STAGES:
        value = result["stages"].get(name, {}).get("top1")
    elif name in SOUPS:
        value = result.get("soup", {}).get(name)
    elif name in LAST_PHASE:
        value = result["phases"][-1].get(name) if result["phases"] else None
    elif name in CORRUPTED:
        value = result.get("corrupted")
        for key in CORRUPTED[name]:
            value = None if value is None else value.get(key)
    else:
        value = result.get(name)
    if value is None:
        return None
    return 100 * float(value) if name in SHARES else float(value)


def _spread(values: Sequence[float | None]) -> dict[str, float | None] | None:
    known = [value for value in values if value is not None]
    return mean_and_std(known) if len(known) == len(values) else None


def _markdown(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy with a column for each label of one axis; then, if asked for, a line a cell with further numbers."""
    axis = across(layout)
    down = [name for name in layout.axes if name != axis]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for found in rows:
        place = {name: str(found[name]) for name in down}
        line = lines.setdefault(tuple(place.values()), dict(place))
        line[str(found[axis])] = spread(found["accuracy"])
    columns = [*down, *layout.axes[axis]]
    shown = [{column: line.get(column) for column in columns} for line in lines.values()]
    seeds = sorted({len(found["seeds"]) for found in rows})
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    over = "one seed" if seeds == [1] else f"mean ± deviation over {counted} seeds"
    text = f"### Accuracy, % ({over}{_reference(rows)})\n\n"
    text += markdown_table(shown, columns)
    return text + ("\n" + _details(layout, rows) if layout.show.columns else "")


def _details(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> str:
    shown: list[dict[str, Any]] = []
    for found in rows:
        line: dict[str, Any] = {axis: found[axis] for axis in layout.axes}
        for name in ("accuracy", *layout.show.columns):
            number = found["metrics"].get(name)
            column = f"{name}, measured" if name in layout.axes else name
            line[column] = None if number is None else spread(number) if name in SHARES else number["mean"]
        shown.append(line)
    return f"### All cells\n\n{markdown_table(shown)}"


def _reference(rows: Sequence[Mapping[str, Any]]) -> str:
    """The dense accuracy, where all cells that have one agree within a tenth of a point."""
    dense = _dense(rows)
    return f"; dense: {dense:.2f}" if dense is not None else ""


def _dense(rows: Sequence[Mapping[str, Any]]) -> float | None:
    found = [float(row["dense"]["mean"]) for row in rows if "dense" in row]
    return statistics.fmean(found) if found and max(found) - min(found) < 1 else None


def _plot(layout: Layout, rows: Sequence[Mapping[str, Any]], axis: str, path: Path) -> None:
    """Accuracy along one axis; a line for each label of another, a panel for each combination of the rest."""
    others = [other for other in layout.axes if other != axis]
    words = [other for other in others if not layout.is_numeric(other)]
    line = layout.show.lines if layout.show.lines in others else (words or others or [None])[-1]
    rest = [other for other in others if other != line]
    panels: dict[str, dict[str, list[tuple[str, float, float | None]]]] = {}
    for labels in itertools.product(*(layout.axes[other] for other in rest)):
        for found in _along(rows, axis, layout):
            if all(found[other] == label for other, label in zip(rest, labels, strict=True)):
                lines = panels.setdefault(", ".join(labels), {})
                number = found["accuracy"]
                point = (str(found[axis]), float(number["mean"]), number["std"])
                lines.setdefault(str(found[line]) if line else "", []).append(point)
    if panels:
        plot_accuracy(panels, path, xlabel=axis, dense=_dense(rows))


def _along(rows: Sequence[Mapping[str, Any]], axis: str, layout: Layout) -> list[Mapping[str, Any]]:
    places = {label: place for place, label in enumerate(layout.axes[axis])}
    return sorted(rows, key=lambda found: places[found[axis]])
