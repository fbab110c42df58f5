"""What a grid found: results by member, and the tables and picture made of them, complete or not.

    members/KEY.json (one a member) + members.jsonl (the same, packed) ─▶ table.json, table.md, grid*.png

A folder that holds only members.jsonl is enough to make the tables again and to go on with the grid.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.files import write_json, write_text
from prunus.report import markdown_table, plot_grid
from prunus.run.grid import Grid, Member, final_members

__all__ = ["read_results", "spread", "tabulate"]

Result = Mapping[str, Any]
_MOST_LINES = 10  # that one picture tells apart


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Member key -> its result, from the packed file and from single files."""
    packed = out / "members.jsonl"
    rows = [json.loads(line) for line in packed.read_text().splitlines()] if packed.exists() else []
    found: dict[str, dict[str, Any]] = {row.pop("key"): row for row in rows}
    return found | {path.stem: json.loads(path.read_text()) for path in sorted((out / "members").glob("*.json"))}


def tabulate(grid: Grid) -> list[dict[str, Any]]:
    """One row a finished cell: labels, seeds, tuned value, mean and deviation of each perplexity; written to `out` too.

    A cell whose tuned value is not chosen yet is left out; so is a seed that is not finished.
    """
    out = Path(grid.out)
    results = read_results(out)
    members = [member for member in final_members(grid, results, partial=True) if member.key in results]
    rows = _rows(grid, members, results)
    lines = [json.dumps({"key": key, **result}, default=str) for key, result in sorted(results.items())]
    write_text(out / "members.jsonl", "".join(line + "\n" for line in lines))
    write_json(out / "table.json", rows)
    write_text(out / "table.md", _markdown(grid, rows, _dense(out)))
    if rows:
        _plot(grid, rows, out, _dense(out))
    return rows


def spread(found: Mapping[str, Any]) -> str:
    """A mean with its deviation, if there is one."""
    places = 0 if found["mean"] >= 1000 else 1 if found["mean"] >= 100 else 2
    deviation = "" if found["std"] is None else f" ± {found['std']:.{places}f}"
    return f"{found['mean']:.{places}f}{deviation}"


def _rows(grid: Grid, members: Sequence[Member], results: Mapping[str, Result]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for labels in grid.cells():
        mine = [m for m in members if m.labels == labels]
        if not mine:
            continue
        found = [results[m.key] for m in mine]
        row: dict[str, Any] = {**labels, "seeds": [m.seed for m in mine], "tuned": mine[0].tuned}
        for text in found[0]["perplexity"]:
            values = [float(result["perplexity"][text]) for result in found]
            row[text] = {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for part in ("retraining", "zero_shot", "pruning"):
            if part in found[0]:
                row[part] = {k: v for k, v in found[0][part].items() if k not in ("losses", "merge")}
        rows.append(row)
    return rows


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key, value in rows[0].items() if isinstance(value, dict) and "mean" in value] if rows else []


def _across(grid: Grid) -> str | None:
    """The axis whose labels are sparsities or N:M patterns: the columns of a table, the abscissa of a picture."""
    return next((axis for axis, labels in grid.axes.items() if any("%" in x or ":" in x for x in labels)), None)


def _markdown(grid: Grid, rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> str:
    """One table a text: a line for each combination of the other axes, a column for each sparsity."""
    across = _across(grid)
    parts: list[str] = []
    for text in _texts(rows):
        lines: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            down = {axis: str(row[axis]) for axis in grid.axes if axis != across}
            line = lines.setdefault(tuple(down.values()), dict(down))
            line[str(row[across]) if across else "perplexity"] = spread(row[text])
        columns = [axis for axis in grid.axes if axis != across] + (
            list(grid.axes[across]) if across else ["perplexity"]
        )
        reference = f" (dense: {dense[text]:.2f})" if text in dense else ""
        shown = [{column: line.get(column) for column in columns} for line in lines.values()]
        parts.append(f"### Perplexity, {text}{reference}\n\n{markdown_table(shown, columns)}")
    return "\n".join(parts)


def _plot(grid: Grid, rows: Sequence[Mapping[str, Any]], out: Path, dense: Mapping[str, float]) -> None:
    """Perplexity on the second text, or the only one, against sparsity; a line for each combination of other labels.

    More lines than a reader can tell apart become one picture for each label of the first other axis.
    """
    across, texts = _across(grid), _texts(rows)
    if across is None:
        return
    text = texts[min(1, len(texts) - 1)]
    others = [axis for axis in grid.axes if axis != across]
    split = len({tuple(row[axis] for axis in others) for row in rows}) > _MOST_LINES
    pictures: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        names = [str(row[axis]) for axis in others]
        picture, line = (names[0], names[1:]) if split else ("", names)
        table = pictures.setdefault(picture, {})
        table.setdefault(", ".join(line), {})[str(row[across])] = float(row[text]["mean"])
    for picture, table in pictures.items():
        path = out / (f"grid-{picture}.png" if picture else "grid.png")
        plot_grid(table, path, dense=dense.get(text), title=f"{picture}, {text}" if picture else text)


def _dense(out: Path) -> dict[str, float]:
    path = out / "dense.json"
    return json.loads(path.read_text()) if path.exists() else {}
