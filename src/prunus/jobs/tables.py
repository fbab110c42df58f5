"""What a grid found, as rows of means and deviations over seeds, tables and pictures: those of every task.

    members/KEY.json (one a member) + members.jsonl (the same, packed) ─▶ a row a cell ─▶ table.md, grid*.png

A folder that holds only members.jsonl is enough to make the tables again and to go on with the grid.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from prunus.machine import read_json, write_text
from prunus.measure import CORRUPTIONS, HEADLINES, MEASURES, headline
from prunus.recipe import Strict
from prunus.report import Point, markdown_table, plot_accuracy, plot_grid, read_metrics

__all__ = [
    "BEST",
    "LONGER",
    "MEAN",
    "METRICS",
    "PARTS",
    "SOUP",
    "Layout",
    "Show",
    "accuracy_row",
    "accuracy_tables",
    "by_phase",
    "mean_and_std",
    "perplexity_row",
    "perplexity_tables",
    "pictures_of",
    "read_results",
    "spread",
]

Result = Mapping[str, Any]
Row = Mapping[str, Any]
MEAN, BEST, SOUP, LONGER = "mean of members", "best member", "soup", "as long as all"  # rows of language models' soups
PARTS = ("retraining", "zero_shot", "pruning", "shrink")  # of a language model's row, beside perplexities
_BESIDE = (MEAN, BEST, LONGER)  # what a soup stands beside
_MOST_LINES = 10  # that one picture tells apart


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

    @property
    def rates(self) -> str | None:
        """The axis whose labels are shares in percent or N:M patterns."""
        named = (axis for axis in self.axes if self.is_rate(axis))
        return self.show.across or next(named, None)

    def is_rate(self, axis: str) -> bool:
        """Whether every label of an axis is a share or has a colon, and not all are plain numbers."""
        labels = self.axes[axis]
        shares = all(":" in label or re.fullmatch(r"[\d.]+ ?%?", label) for label in labels)
        return shares and any("%" in label or ":" in label for label in labels)

    @property
    def across(self) -> str:
        """The axis along which a table's columns stand: the one asked for, the first of numbers, or the last of all."""
        return self.show.across or next((axis for axis in self.axes if self.is_numeric(axis)), list(self.axes)[-1])

    def picture(self, label: str) -> Path:
        """The file of a picture; what a label says stays in its name.

        >>> Layout({}, Show(), Path("out")).picture("../w/o LoRA")
        PosixPath('out/grid-..-w-o LoRA.png')
        """
        plain = re.sub(r"[/\\\0]", "-", label)[:100]
        return self.out / f"grid-{plain}.png"

    def pivot(self, rows: Sequence[Row], number: str, axis: str | None, alone: str = "") -> str:
        """A Markdown table: a line for each combination of labels, a column for each label of an axis, or one alone."""
        down = [name for name in self.axes if name != axis]
        lines: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            place = {name: str(row[name]) for name in down}
            lines.setdefault(tuple(place.values()), place)[str(row[axis]) if axis else alone] = spread(row[number])
        columns = [*down, *(self.axes[axis] if axis else [alone])]
        return markdown_table([{column: line.get(column) for column in columns} for line in lines.values()], columns)


def pictures_of(out: Path) -> list[Path]:
    """The pictures beside the tables of a grid's folder."""
    return sorted(each for name in ("grid.png", "grid-*.png", "phases.png") for each in out.glob(name))


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Member key -> its result, from the packed file and from single files."""
    packed = out / "members.jsonl"
    rows = read_metrics(packed) if packed.exists() else []
    found: dict[str, dict[str, Any]] = {row.pop("key"): row for row in rows}
    return found | {path.stem: read_json(path) for path in sorted((out / "members").glob("*.json"))}


def mean_and_std(values: Sequence[float]) -> dict[str, float | None]:
    """The mean and the sample deviation, which a single value has not, and which is NaN beside one that went astray."""
    known = all(map(math.isfinite, values))  # statistics.stdev ends in an AttributeError else
    deviation = None if len(values) < 2 else statistics.stdev(values) if known else math.nan
    return {"mean": statistics.fmean(values), "std": deviation}


def spread(found: Mapping[str, Any]) -> str:
    """A mean with its deviation, if there is one."""
    places = 0 if found["mean"] >= 1000 else 1 if found["mean"] >= 100 else 2
    deviation = "" if found["std"] is None else f" ± {found['std']:.{places}f}"
    return f"{found['mean']:.{places}f}{deviation}"


# Language models: perplexity by text.


def perplexity_row(results: Sequence[Result]) -> dict[str, Any]:
    """One cell: perplexity by text, what a soup stands beside, and the first seed's retraining, tasks and sizes."""

    def over_seeds(value: Callable[[Result, str], float]) -> dict[str, Any]:
        return {text: mean_and_std([float(value(each, text)) for each in results]) for text in results[0]["perplexity"]}

    row = over_seeds(lambda result, text: result["perplexity"][text])
    if all("soup" in result for result in results):
        names = [x for x in results[0]["soup"]["perplexity"] if x in _BESIDE or x.startswith(f"{SOUP}, ")]
        each = {name: over_seeds(lambda r, text, name=name: r["soup"]["perplexity"][name][text]) for name in names}
        row["beside"] = {text: {name: found[text] for name, found in each.items()} for text in results[0]["perplexity"]}
    if all("zero_shot" in result for result in results):
        row["tasks"] = {
            task: mean_and_std([_score(each["zero_shot"][task]) for each in results])
            for task in results[0]["zero_shot"]
        }
    for part in PARTS:
        if part in results[0]:
            row[part] = {k: v for k, v in results[0][part].items() if k not in ("losses", "merge")}
    return row


def _score(found: Mapping[str, float]) -> float:
    """The first metric of a task, of which `stderr` is; accuracies, exact matches among them, in percent."""
    metric, value = next(iter(found.items()))
    return 100 * value if metric.startswith(("acc", "exact_match")) else value


def perplexity_tables(layout: Layout, rows: Sequence[Row]) -> None:
    """Write table.md, one table a text and one of all tasks, and pictures of perplexity against sparsity."""
    path, parts = layout.out / "dense.json", list[str]()
    dense: dict[str, Any] = read_json(path) if path.exists() else {}
    texts = [key for key, value in rows[0].items() if isinstance(value, dict) and "mean" in value] if rows else []
    for text in texts:
        reference = f" (dense: {dense[text]:.2f})" if text in dense else ""
        table = layout.pivot(rows, text, layout.rates, "perplexity")
        parts.append(f"### Perplexity, {text}{reference}\n\n{table}")
        if any("beside" in row for row in rows):
            parts.append(f"### Soups, {text}\n\n{markdown_table(_soups(layout, rows, text))}")
    if any("tasks" in row for row in rows):
        parts.append(f"### Zero-shot, accuracies in %\n\n{_tasks(layout, rows, dense.get('zero_shot', {}))}")
    sized = [{**row, "size": mean_and_std([row["shrink"]["parameters"][0] / 1e6])} for row in rows if "shrink" in row]
    if sized:
        parts.append(f"### Parameters, millions\n\n{layout.pivot(sized, 'size', layout.rates, 'parameters')}")
    write_text(layout.out / "table.md", "\n".join(parts))
    if rows and layout.rates is not None and layout.is_rate(layout.rates):
        text = texts[min(1, len(texts) - 1)]
        _plot_perplexity(layout, rows, layout.rates, text, dense.get(text))


def _tasks(layout: Layout, rows: Sequence[Row], dense: Mapping[str, Mapping[str, float]]) -> str:
    """A Markdown table of zero-shot tasks: a line for the dense model, if it was measured, and one for each cell."""
    cells = [_cell(layout, row, row["tasks"]) for row in rows if "tasks" in row]
    known = {task: spread(mean_and_std([_score(found)])) for task, found in dense.items()}
    first = [{next(iter(layout.axes)): "dense", **known}] if known else []
    return markdown_table([*first, *cells], list(dict.fromkeys(column for cell in cells for column in cell)))


def _soups(layout: Layout, rows: Sequence[Row], text: str) -> list[dict[str, Any]]:
    """A line a soup: its cell, the soup, its members' mean and best, and the run as long as all of them."""
    return [
        _cell(layout, row, {"the soup": row[text], **row["beside"][text]})  # an axis may well be called soup
        for row in rows
        if "beside" in row
    ]


def _cell(layout: Layout, row: Row, numbers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A line of a table: the labels of a cell, and numbers with their deviations."""
    return {**{axis: row[axis] for axis in layout.axes}, **{name: spread(found) for name, found in numbers.items()}}


def _plot_perplexity(layout: Layout, rows: Sequence[Row], across: str, text: str, dense: float | None) -> None:
    """Perplexity on a text against sparsity; a line for each combination of other labels.

    More lines than a reader can tell apart become one picture for each label of the first other axis.
    """
    others = [axis for axis in layout.axes if axis != across]
    lines = {tuple(row[axis] for axis in others): 1 + len(row.get("beside", {}).get(text, {})) for row in rows}
    split = sum(lines.values()) > _MOST_LINES
    pictures: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        names = [str(row[axis]) for axis in others]
        picture, line = (names[0], names[1:]) if split else ("", names)
        table = pictures.setdefault(picture, {})
        beside: Mapping[str, Any] = row["beside"][text] if "beside" in row else {}
        own = [*line, SOUP] if beside else line
        for drawn, found in [(own, row[text]), *(([*line, name], found) for name, found in beside.items())]:
            table.setdefault(", ".join(drawn), {})[str(row[across])] = found
    for picture, table in pictures.items():
        values = [found["mean"] for points in table.values() for found in points.values()]
        if len(values) == 1 or not any(map(math.isfinite, values)):
            continue  # a point says no more than its number
        path = layout.picture(picture) if picture else layout.out / "grid.png"
        means, deviations = (
            {line: {label: found[key] for label, found in points.items()} for line, points in table.items()}
            for key in ("mean", "std")
        )
        title = f"{picture}, {text}" if picture else text
        xlabel = f"{across}, %" if any("shrink" in row for row in rows) else "sparsity, % zeros"
        plot_grid(means, path, dense=dense, title=title, deviations=deviations, xlabel=xlabel)


# Classifiers: accuracy (of texts also another share that counts) in percent, and every other number under `metrics`.

_COMPANIONS = (
    "pearson",
    "top5",
    "worst_class",
    "calibration_error",
    "maximum_calibration_error",
    "sparsity",
    "reached",
)
_PERCENT = (*HEADLINES, *_COMPANIONS)
_STAGES = ("dense", "pruned", "recalibrated", "retrained", "settled")
_COSTS = ("speedup", "parameters", "nonzero")
_NUMBERS = ("loss", *_COSTS, "weight_change", "epochs", "steps", "seconds", "images_per_second", "left_of_start")
_LAST_PHASE = ("distance", "share", "initial_lr")
# What stands beside a soup, by the names of its rows.
_SOUPS = (
    *("mean_member", "best_member", "ensemble", "uniform", "greedy", "learned", "imp", "longer", "swa", "reprune"),
    *("dense_soup", "dense_soup_pruned", "dense_soup_retrained"),
)
_CORRUPTED_ROWS = ("mean_member", "best_member", "ensemble", "imp", "longer")
_HEADLINE = "headline"  # in place of a key: what counts most among the numbers that stand there
_PLACES: dict[str, tuple[str | int, ...]] = {  # column -> where it stands in a result
    **{name: (name,) for name in _PERCENT},
    **{name: ("stages", name, _HEADLINE) for name in _STAGES},
    **{name: (name,) for name in _NUMBERS},
    **{name: ("phases", -1, name) for name in _LAST_PHASE},
    **{name: ("soup", name) for name in _SOUPS},
    **{f"corrupted.{'accuracy' if name == 'top1' else name}": ("corrupted", "mean", name) for name in MEASURES},
    **{f"corrupted.severity_{number}": ("corrupted", "by_severity", str(number), "top1") for number in range(1, 6)},
    **{f"corrupted.{name}": ("corrupted", "by_name", name, "top1") for name in CORRUPTIONS},
    **{f"corrupted.{name}": ("corrupted", "rows", name, "mean", "top1") for name in _CORRUPTED_ROWS},
}
METRICS = tuple(_PLACES)
_SHARES = set(METRICS) - {*_NUMBERS, *_LAST_PHASE, "corrupted.loss"}


def accuracy_row(results: Sequence[Result]) -> dict[str, Any]:
    """One cell: accuracy and the accuracies of the stages before, and every other number under `metrics`."""
    found = {name: [_value(result, name) for result in results] for name in METRICS}
    known = {
        name: mean_and_std([v for v in values if v is not None]) for name, values in found.items() if None not in values
    }
    shown = (next(name for name in HEADLINES if name in known), "dense", "pruned")
    phases = {"accuracy by phase": by_phase(results)} if all("soup" in result for result in results) else {}
    return {**{name: known[name] for name in shown if name in known}, "metrics": known, **phases}


def accuracy_tables(layout: Layout, rows: Sequence[Row]) -> None:
    """Write table.md, a picture for each axis whose labels are numbers, and one of soups by phase."""
    write_text(layout.out / "table.md", _accuracies(layout, rows) if rows else "Nothing is finished yet.\n")
    numeric = [axis for axis in layout.axes if layout.is_numeric(axis)]
    axes = [layout.show.across] if layout.show.across else numeric or [layout.across]
    for axis in axes if rows else []:
        _plot_accuracy(layout, rows, axis, layout.out / "grid.png" if len(axes) == 1 else layout.picture(axis))
    phased = [found for found in rows if any(len(line) > 1 for line in found.get("accuracy by phase", {}).values())]
    if phased:  # soups of more than one phase
        panels = {", ".join(str(found[name]) for name in layout.axes): found["accuracy by phase"] for found in phased}
        path = layout.out / "phases.png"
        plot_accuracy(panels, path, xlabel="sparsity after the phase", dense=_dense(phased))


def _value(result: Result, name: str) -> float | None:
    """A number of a result, in percent where it is a share that people read so."""
    value: Any = result
    for key in _PLACES[name]:
        if not value:
            return None
        value = headline(value)[1] if key == _HEADLINE else value[key] if isinstance(key, int) else value.get(key)
    return None if value is None else 100 * float(value) if name in _SHARES else float(value)


def _accuracies(layout: Layout, rows: Sequence[Row]) -> str:
    """Accuracy with a column for each label of one axis; then, if asked for, a line a cell with further numbers."""
    seeds, dense = sorted({len(found["seeds"]) for found in rows}), _dense(rows)
    counted = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    over = "one seed" if seeds == [1] else f"mean ± deviation over {counted} seeds"
    reference = "" if dense is None else f"; dense: {dense:.2f}"
    main = _main(rows)
    text = f"### {main.capitalize()}, % ({over}{reference})\n\n{layout.pivot(rows, main, layout.across)}"
    return text + ("\n" + _details(layout, rows) if layout.show.columns else "")


def _details(layout: Layout, rows: Sequence[Row]) -> str:
    shown: list[dict[str, Any]] = []
    for found in rows:
        line: dict[str, Any] = {axis: found[axis] for axis in layout.axes}
        for name in (_main(rows), *layout.show.columns):
            number = found["metrics"].get(name)
            column = f"{name}, measured" if name in layout.axes else name
            line[column] = None if number is None else spread(number) if name in _SHARES else number["mean"]
        shown.append(line)
    return f"### All cells\n\n{markdown_table(shown)}"


def _dense(rows: Sequence[Row]) -> float | None:
    """The dense accuracy, where all cells that have one agree within a point."""
    found = [float(row["dense"]["mean"]) for row in rows if "dense" in row]
    return statistics.fmean(found) if found and max(found) - min(found) < 1 else None


def _plot_accuracy(layout: Layout, rows: Sequence[Row], axis: str, path: Path) -> None:
    """Accuracy along one axis; a line for each label of another, a panel for each combination of the rest."""
    others = [other for other in layout.axes if other != axis]
    words = [other for other in others if not layout.is_numeric(other)]
    line = layout.show.lines if layout.show.lines in others else (words or others or [None])[-1]
    rest, places, main = [other for other in others if other != line], list(layout.axes[axis]), _main(rows)
    panels: dict[str, dict[str, list[Point]]] = {}
    for labels in itertools.product(*(layout.axes[other] for other in rest)):
        for found in sorted(rows, key=lambda found: places.index(found[axis])):
            if all(found[other] == label for other, label in zip(rest, labels, strict=True)):
                lines = panels.setdefault(", ".join(labels), {})
                point = (str(found[axis]), float(found[main]["mean"]), found[main]["std"])
                lines.setdefault(str(found[line]) if line else "", []).append(point)
    if sum(len(points) for lines in panels.values() for points in lines.values()) > 1:
        plot_accuracy(panels, path, xlabel=axis, ylabel=f"{main}, %", dense=_dense(rows))


def _main(rows: Sequence[Row]) -> str:
    """The column of what counts most."""
    return next(name for name in HEADLINES if name in rows[0])


_NAMES = {"soup": "soup", "imp": "imp", "longer": "longer imp"}


def by_phase(results: Sequence[Result]) -> dict[str, list[Point]]:
    """Line -> (sparsity after the phase, accuracy in %, its deviation), a point for each phase of a soup.

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
            spread_of = phases[0]["members"] if name == "mean member" and len(found) == 1 else found
            deviation = 100 * statistics.stdev(spread_of) if len(spread_of) > 1 else None
            lines.setdefault(name, []).append((label, 100 * statistics.fmean(found), deviation))
    return lines
