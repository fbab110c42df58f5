"""What a grid found: results by member, and the tables and picture made of them, complete or not.

    members/KEY.json (one a member) + members.jsonl (the same, packed) ─▶ table.json, table.md, grid*.png

A folder that holds only members.jsonl is enough to make the tables again and to go on with the grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.machine import json_line, json_value, read_json, write_json, write_text
from prunus.run.grid import Grid, final_members

__all__ = ["read_results", "tabulate"]

Result = Mapping[str, Any]


def read_results(out: Path) -> dict[str, dict[str, Any]]:
    """Member key -> its result, from the packed file and from single files."""
    packed = out / "members.jsonl"
    rows = [json_value(line) for line in packed.read_text(encoding="utf-8").splitlines()] if packed.exists() else []
    found: dict[str, dict[str, Any]] = {row.pop("key"): row for row in rows}
    return found | {path.stem: read_json(path) for path in sorted((out / "members").glob("*.json"))}


def tabulate(grid: Grid) -> list[dict[str, Any]]:
    """One row a finished cell: labels, seeds, tuned value, mean and deviation of what was measured; written too.

    A cell whose tuned value is not chosen yet is left out; so is a seed that is not finished.
    """
    out = Path(grid.out)
    results = read_results(out)
    rows = _rows(grid, results)
    lines = [json_line({"key": key, **result}) for key, result in sorted(results.items())]
    write_text(out / "members.jsonl", "".join(line + "\n" for line in lines))
    write_json(out / "table.json", rows)
    grid.task.write(grid.layout, rows)
    return rows


def _rows(grid: Grid, results: Mapping[str, Result]) -> list[dict[str, Any]]:
    members = [member for member in final_members(grid, results, partial=True) if member.key in results]
    rows: list[dict[str, Any]] = []
    for labels in grid.cells():
        mine = [member for member in members if member.labels == labels]
        if mine:
            head: dict[str, Any] = {**labels, "seeds": [m.seed for m in mine], "tuned": mine[0].tuned}
            rows.append(head | grid.task.row([results[m.key] for m in mine]))
    return rows
