"""What a grid of language models found: rows of perplexities over seeds, as tables and pictures, soups beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.machine import read_json, write_text
from prunus.report import markdown_table, plot_grid
from prunus.run.layout import Layout, mean_and_std, picture_of, spread
from prunus.run.soups import BEST, LONGER, MEAN, SOUP

__all__ = ["row", "write"]

Result = Mapping[str, Any]
_MOST_LINES = 10  # that one picture tells apart
_BESIDE = (MEAN, BEST, LONGER)  # what a soup stands beside


def row(results: Sequence[Result]) -> dict[str, Any]:
    """One cell: perplexity by text, what a soup stands beside, and the first seed's retraining and tasks."""
    row: dict[str, Any] = {
        text: mean_and_std([float(result["perplexity"][text]) for result in results])
        for text in results[0]["perplexity"]
    }
    if all("soup" in result for result in results):
        row["beside"] = _soup(results)
    for part in ("retraining", "zero_shot", "pruning"):
        if part in results[0]:
            row[part] = {k: v for k, v in results[0][part].items() if k not in ("losses", "merge")}
    return row


def write(layout: Layout, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write table.md and pictures of perplexity against sparsity."""
    dense = _dense(layout.out)
    write_text(layout.out / "table.md", _markdown(layout, rows, dense))
    if rows:
        _plot(layout, rows, dense)


def _soup(results: Sequence[Result]) -> dict[str, Any]:
    """Text -> name -> mean and deviation over seeds, of what a soup stands beside."""
    found = [result["soup"]["perplexity"] for result in results]
    names = [name for name in _BESIDE if name in found[0]]
    texts = found[0][SOUP]
    return {text: {n: mean_and_std([float(one[n][text]) for one in found]) for n in names} for text in texts}


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key, value in rows[0].items() if isinstance(value, dict) and "mean" in value] if rows else []


def _across(layout: Layout) -> str | None:
    """The axis whose labels are sparsities or N:M patterns: the columns of a table, the abscissa of a picture."""
    if layout.show.across is not None:
        return layout.show.across
    return next((axis for axis, labels in layout.axes.items() if any("%" in x or ":" in x for x in labels)), None)


def _markdown(layout: Layout, rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> str:
    """One table a text: a line for each combination of the other axes, a column for each sparsity."""
    across = _across(layout)
    parts: list[str] = []
    for text in _texts(rows):
        lines: dict[tuple[str, ...], dict[str, str]] = {}
        for row in rows:
            down = {axis: str(row[axis]) for axis in layout.axes if axis != across}
            line = lines.setdefault(tuple(down.values()), dict(down))
            line[str(row[across]) if across else "perplexity"] = spread(row[text])
        columns = [axis for axis in layout.axes if axis != across] + (
            list(layout.axes[across]) if across else ["perplexity"]
        )
        reference = f" (dense: {dense[text]:.2f})" if text in dense else ""
        shown = [{column: line.get(column) for column in columns} for line in lines.values()]
        parts.append(f"### Perplexity, {text}{reference}\n\n{markdown_table(shown, columns)}")
        parts += _soups(layout, rows, text)
    return "\n".join(parts)


def _soups(layout: Layout, rows: Sequence[Mapping[str, Any]], text: str) -> list[str]:
    """A line a soup: its cell, the soup, its members' mean and best, and the run as long as all of them."""
    shown = [
        {
            **{axis: row[axis] for axis in layout.axes},
            "the soup": spread(row[text]),  # an axis may well be called soup
            **{name: spread(value) for name, value in row["beside"][text].items()},
        }
        for row in rows
        if "beside" in row
    ]
    columns = list(dict.fromkeys(column for line in shown for column in line))
    return [f"### Soups, {text}\n\n{markdown_table(shown, columns)}"] if shown else []


def _plot(layout: Layout, rows: Sequence[Mapping[str, Any]], dense: Mapping[str, float]) -> None:
    """Perplexity on the second text, or the only one, against sparsity; a line for each combination of other labels.

    More lines than a reader can tell apart become one picture for each label of the first other axis.
    """
    across, texts = _across(layout), _texts(rows)
    if across is None:
        return
    text = texts[min(1, len(texts) - 1)]
    others = [axis for axis in layout.axes if axis != across]
    lines = {tuple(row[axis] for axis in others): 1 + len(row.get("beside", {}).get(text, {})) for row in rows}
    split = sum(lines.values()) > _MOST_LINES
    pictures: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        names = [str(row[axis]) for axis in others]
        picture, line = (names[0], names[1:]) if split else ("", names)
        table = pictures.setdefault(picture, {})
        beside = {name: found["mean"] for name, found in row["beside"][text].items()} if "beside" in row else {}
        own = [*line, SOUP] if beside else line
        for drawn, value in [(own, row[text]["mean"]), *(([*line, name], value) for name, value in beside.items())]:
            table.setdefault(", ".join(drawn), {})[str(row[across])] = float(value)
    for picture, table in pictures.items():
        path = picture_of(layout.out, picture) if picture else layout.out / "grid.png"
        plot_grid(table, path, dense=dense.get(text), title=f"{picture}, {text}" if picture else text)


def _dense(out: Path) -> dict[str, float]:
    path = out / "dense.json"
    return read_json(path) if path.exists() else {}
