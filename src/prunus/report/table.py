"""Tables of results: in the terminal with rich, in files as Markdown. One formatting of numbers for both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

__all__ = ["format_value", "markdown_table", "print_table"]

Row = Mapping[str, Any]


def print_table(
    rows: Sequence[Row], columns: Sequence[str] | None = None, title: str = "", *, console: Console | None = None
) -> None:
    """Print rows (column -> value) as a table; numbers to the right, a missing value as a dash.

    columns: which, in order; those of all rows, as they come, if left out. Raises ValueError without rows or for a
    column that no row has.

    >>> print_table([{"stage": "dense", "perplexity": 12.345}], title="Result")
    """
    columns = _columns(rows, columns)
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        numeric = any(isinstance(row.get(column), (int, float)) for row in rows)
        # Names are long and unique in their ends: fold, never cut.
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=numeric)
    for row in rows:
        table.add_row(*(format_value(row.get(column)) for column in columns))
    (console or Console()).print(table, markup=False)


def markdown_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """The same table as GitHub Markdown."""
    columns = _columns(rows, columns)
    numeric = {c: any(isinstance(row.get(c), (int, float)) for row in rows) for c in columns}
    lines = [columns, ["---:" if numeric[c] else "---" for c in columns]]
    lines += [[format_value(row.get(c)).replace("|", "\\|") for c in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def format_value(value: Any) -> str:
    """Four significant digits for a float, thousands apart in a whole number, a dash for None, else the text."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value) or not value:
        return f"{value:g}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


def _columns(rows: Sequence[Row], columns: Sequence[str] | None) -> list[str]:
    if not rows:
        raise ValueError("a table needs at least one row")
    present = list(dict.fromkeys(key for row in rows for key in row))
    unknown = [column for column in columns or () if column not in present]
    if unknown:
        raise ValueError(f"no row has column {unknown[0]!r}; there are {', '.join(present)}")
    return list(columns) if columns is not None else present
