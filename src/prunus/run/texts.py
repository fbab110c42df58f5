"""Grids of compression recipes: seeds, tuning by perplexity, shared prunings, tables of perplexity."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.machine import write_text
from prunus.report import markdown_table, plot_grid
from prunus.run.kinds import Bench, Result
from prunus.run.recipe import Recipe, merge, parse
from prunus.run.soups import BEST, LONGER, MEAN, SOUP
from prunus.run.spread import mean_and_std, spread

if TYPE_CHECKING:
    from prunus.run.grid import Grid, Member, Tune

__all__ = ["TEXTS"]

_MOST_LINES = 10  # that one picture tells apart


class _Texts:
    """The kind of grids over `Recipe`; see `kinds.Kind`."""

    together = False

    def check(self, grid: Grid) -> None:
        if grid.tune is not None and grid.tune.text is None:
            raise ValueError("tune: name the text whose perplexity chooses: text: validation")
        if grid.show.columns:
            raise ValueError("show.columns is for grids of classifiers; leave it out")

    def recipe(self, raw: Mapping[str, Any], seed: int, *, tuning: bool, where: str) -> Recipe:
        raw = merge(dict(raw), {"save": False})
        for section in ("retrain", "reconstruct"):
            if raw.get(section) is not None:
                raw = merge(raw, {f"{section}.seed": seed})
        return parse(raw, Recipe, where)

    def seeded(self, recipe: Recipe) -> bool:
        return recipe.retrain is not None or recipe.reconstruct is not None

    def loss(self, result: Result, tune: Tune) -> float:
        return float(result["perplexity"][tune.text])

    def first(self, members: Sequence[Member]) -> dict[str, Member]:
        """One member for each distinct pruning that others retrain, so that workers do not prune the same twice."""
        from prunus.run.bench import prune_key
        from prunus.run.grid import Member

        alone: dict[str, Member] = {}
        found: dict[str, Member] = {}
        for member in members:
            if member.recipe.reconstruct is None and member.recipe.retrain is not None:
                pruned = member.recipe.model_copy(update={"retrain": None, "soup": None})
                before = Member(member.labels, member.seed, {}, pruned)
                found[member.key] = alone.setdefault(prune_key(pruned), before)
        return found

    def ready(self, grid: Grid, first: Member, finished: Mapping[str, Result]) -> bool:
        return first.key in finished or (Path(grid.out) / "members" / f"{first.key}.json").exists()

    def order(self, member: Member) -> tuple[Any, ...]:
        """Members that prune alike follow each other, dearer fits come last."""
        from prunus.run.bench import prune_key

        return member.recipe.reconstruct is not None, prune_key(member.recipe)

    def prepare(self, members: Sequence[Member]) -> None:
        pass

    def bench(self, grid: Grid) -> Bench:
        from prunus.run.bench import Bench

        return Bench(Path(grid.out))

    def row(self, results: Sequence[Result]) -> dict[str, Any]:
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

    def write(self, grid: Grid, rows: Sequence[Mapping[str, Any]], results: Mapping[str, Result]) -> None:
        out = Path(grid.out)
        dense = _dense(out)
        write_text(out / "table.md", _markdown(grid, rows, dense))
        if rows:
            _plot(grid, rows, out, dense)


TEXTS = _Texts()
_BESIDE = (MEAN, BEST, LONGER)  # what a soup stands beside


def _soup(results: Sequence[Result]) -> dict[str, Any]:
    """Text -> name -> mean and deviation over seeds, of what a soup stands beside."""
    found = [result["soup"]["perplexity"] for result in results]
    names = [name for name in _BESIDE if name in found[0]]
    texts = found[0][SOUP]
    return {text: {n: mean_and_std([float(one[n][text]) for one in found]) for n in names} for text in texts}


def _texts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key, value in rows[0].items() if isinstance(value, dict) and "mean" in value] if rows else []


def _across(grid: Grid) -> str | None:
    """The axis whose labels are sparsities or N:M patterns: the columns of a table, the abscissa of a picture."""
    if grid.show.across is not None:
        return grid.show.across
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
        parts += _soups(grid, rows, text)
    return "\n".join(parts)


def _soups(grid: Grid, rows: Sequence[Mapping[str, Any]], text: str) -> list[str]:
    """A line a soup: its cell, the soup, its members' mean and best, and the run as long as all of them."""
    shown = [
        {
            **{axis: row[axis] for axis in grid.axes},
            "the soup": spread(row[text]),  # an axis may well be called soup
            **{name: spread(value) for name, value in row["beside"][text].items()},
        }
        for row in rows
        if "beside" in row
    ]
    columns = list(dict.fromkeys(column for line in shown for column in line))
    return [f"### Soups, {text}\n\n{markdown_table(shown, columns)}"] if shown else []


def _plot(grid: Grid, rows: Sequence[Mapping[str, Any]], out: Path, dense: Mapping[str, float]) -> None:
    """Perplexity on the second text, or the only one, against sparsity; a line for each combination of other labels.

    More lines than a reader can tell apart become one picture for each label of the first other axis.
    """
    across, texts = _across(grid), _texts(rows)
    if across is None:
        return
    text = texts[min(1, len(texts) - 1)]
    others = [axis for axis in grid.axes if axis != across]
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
        path = out / (f"grid-{picture}.png" if picture else "grid.png")
        plot_grid(table, path, dense=dense.get(text), title=f"{picture}, {text}" if picture else text)


def _dense(out: Path) -> dict[str, float]:
    path = out / "dense.json"
    return json.loads(path.read_text()) if path.exists() else {}
