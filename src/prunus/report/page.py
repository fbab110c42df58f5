"""One HTML file of results that a browser opens without a network: the answer first, pictures, tables that sort."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunus.machine import write_text
from prunus.report.terminal import format_value, is_numeric

_TEMPLATE = Path(__file__).with_name("page.html")
PAGE_MARK = '<meta name="generator" content="Prunus">'  # by which a page of ours is known
_DENSITY = 1.25  # pixels of a picture for one of the page
_DARKEST = 0.75  # of the colour, so that numbers stay readable on it

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """A number that answers something, with its name above and a remark below."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Part:
    """A part of a page, of which everything but the title may be missing.

    rows: a table, as `print_table` takes it; heat: row -> column -> number, shaded from the least to the largest;
    pictures: PNG files, which are put into the page; code: text as it stands; folded: opened by a click.
    """

    title: str
    text: str = ""
    rows: Sequence[Row] = ()
    heat: Mapping[str, Mapping[str, float]] = field(default_factory=dict[str, Mapping[str, float]])
    pictures: Sequence[Path] = ()
    code: str = ""
    folded: bool = False

    def __bool__(self) -> bool:
        return bool(self.text or self.rows or self.heat or self.pictures or self.code)


@dataclass(frozen=True)
class Page:
    """A page: what it is about, what came out, and the parts that say how; empty parts are left out."""

    title: str
    subtitle: str
    cards: Sequence[Card]
    parts: Sequence[Part]


def write_page(page: Page, path: str | Path) -> None:
    """Write a page as one HTML file; all text is escaped.

    >>> write_page(Page("opt-125m", "", [Card("perplexity", "27.7")], []), "report.html")
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    parts = {"across": _across, "embedded": _embedded, "width": _width, "numeric": is_numeric, "shade": _shade}
    parts |= {"value": format_value}
    shown = Page(page.title, page.subtitle, page.cards, [part for part in page.parts if part])
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"), globals=parts)
    write_text(Path(path), template.render(page=shown, mark=PAGE_MARK))


def _across(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The columns of all rows, as they come."""
    return list(dict.fromkeys(column for row in rows for column in row))


def _embedded(picture: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def _width(picture: Path) -> int:
    """How wide a picture stands on the page, so that all have letters of one size."""
    return round(int.from_bytes(picture.read_bytes()[16:20]) / _DENSITY)  # PNG's header


def _shade(heat: Mapping[str, Mapping[str, float]], value: float) -> str:
    """How much of the colour a number gets: none for the least, `_DARKEST` for the largest."""
    numbers = [number for row in heat.values() for number in row.values() if math.isfinite(number)]
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    share = (value - low) / (high - low) if high > low and math.isfinite(value) else 0.0
    return f"{_DARKEST * share:.3f}"
