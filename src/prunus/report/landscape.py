"""Pictures of what lies between networks: the loss along lines and over a plane, as `geometry` measures them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from prunus.report.plots import BLACK, _figure, _save, _style
from prunus.soup import Line, Plane


def plot_lines(lines: Mapping[str, Line], path: str | Path, *, title: str = "") -> None:
    """Write a PNG of the loss along lines between two members: name of the line -> its points.

    Raises ValueError when there is no line.

    >>> plot_lines({"1 to 2": line}, "lines.png")
    """
    if not lines:
        raise ValueError("there is no line to draw")
    figure = _figure(6.5, 4)
    axis = figure.subplots()
    for i, (name, line) in enumerate(lines.items()):
        axis.plot(line.shares, line.values, **_style(i), markersize=4, linewidth=1.4, label=name)
    axis.set_xlabel("share of the second member")
    axis.set_ylabel("loss")
    axis.legend(frameon=False, fontsize=8)
    if title:
        axis.set_title(title, loc="left", fontsize=10)
    _save(figure, path)


def plot_plane(
    plane: Plane,
    path: str | Path,
    *,
    labels: Sequence[str] = ("1", "2", "3"),
    title: str = "",
) -> None:
    """Write a PNG of the loss over the plane through three members, with the members and their mean on it.

    Values that are not finite are left white. Both axes have one scale: distances between weights.
    Raises ValueError when no value is finite, or there are other than three labels.

    >>> plot_plane(plane, "plane.png", title="three members at 90 %")
    """
    if not np.isfinite(plane.values).any():
        raise ValueError("the plane holds no finite value: there is nothing to draw")
    if len(labels) != 3:
        raise ValueError(f"the plane has three members; got {len(labels)} labels")
    figure = _figure(6.5, 5)
    axis = figure.subplots()
    filled = axis.contourf(plane.x, plane.y, np.ma.masked_invalid(plane.values), levels=12, cmap="viridis_r")
    figure.colorbar(filled, ax=axis, label="loss")
    axis.plot(*plane.members.T, "o", color=BLACK, markersize=6)
    axis.plot(*plane.members.mean(0), "X", color=BLACK, markersize=8)
    marks = [*zip(labels, plane.members, strict=True), ("mean", plane.members.mean(0))]
    for label, (x, y) in marks:
        axis.annotate(label, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=9, bbox=_BOX)
    axis.set_aspect("equal")
    axis.set_xlabel("distance along 1 to 2")
    axis.set_ylabel("distance across")
    if title:
        axis.set_title(title, loc="left", fontsize=10)
    _save(figure, path)


_BOX = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.75}
