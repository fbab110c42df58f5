"""Pictures of results as PNG: one compression run, and a grid of methods against sparsity.

Colours are Okabe and Ito's, then some of Tol's, which people with any colour vision tell apart; lines differ in markers
as well. Figures are drawn on their own Agg canvas: no display, no pyplot, no global state.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.machine import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.transforms import Bbox

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK = "#CC79A7", "#56B4E9", "#000000"
_CYCLE = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK, "#882255", "#999933", "#332288", "#888888")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_ALIKE = 5e-4  # shares of zeros that differ by less are one
_STAGES = {  # by the first word
    **{"dense": BLACK, "pruned": VERMILION, "reconstructed": PURPLE, "retrained": SKY, "merged": BLUE},
    **{"mean": SKY, "best": ORANGE, "soup": GREEN, "as": PURPLE},
}


def plot_compression(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG of one run: the perplexity after each stage, and the sparsity of layers by block where it varies.

    result: `pruning.by_layer` (parameter name -> share of zeros) and `perplexity` (stage -> value, or stage ->
    {text: value}); `model` becomes the title. Raises ValueError when there is neither.
    """
    layers: Mapping[str, float] = result.get("pruning", {}).get("by_layer", {})
    perplexity = _by_text(result.get("perplexity", {}))
    if not layers and not perplexity:
        raise ValueError("the result holds neither pruning.by_layer nor perplexity: there is nothing to draw")
    varies = bool(layers) and max(layers.values()) - min(layers.values()) >= _ALIKE
    figure = _figure(11 if varies else 6.5, 4.2)
    axes = figure.subplots(1, 2 if varies else 1, squeeze=False, width_ratios=(1, 1.25) if varies else (1,))[0]
    _draw_bars(axes[0], perplexity)
    if varies:
        _draw_sparsity(axes[1], layers)
    said = f", {100 * max(layers.values()):.1f} % zeros in every layer" if layers and not varies else ""
    figure.suptitle(f"{result.get('model', '')}{said}".removeprefix(", "), fontsize=11, x=0.01, ha="left")
    _save(figure, path)


def plot_grid(
    table: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    dense: float | None = None,
    title: str = "",
    xlabel: str = "sparsity, % zeros",
    deviations: Mapping[str, Mapping[str, float | None]] | None = None,
) -> None:
    """Write a PNG of methods (line each) against sparsities: method -> {"50 %" or "0.5" or "2:4": value}.

    Shares of zeros are an axis with lines; N:M patterns stand beside it as points. dense: a dashed line.
    deviations: bars at these values. The value axis is logarithmic when the largest value is more than five times the
    smallest. Raises ValueError for no value.

    >>> plot_grid({"wanda": {"50 %": 20.0, "2:4": 30.0}, "magnitude": {"50 %": 25.0, "2:4": 60.0}}, "grid.png")
    """
    values = [v for row in table.values() for v in row.values() if math.isfinite(v)]
    if not values:
        raise ValueError("the table holds no finite value: there is nothing to draw")
    labels = list(dict.fromkeys(label for row in table.values() for label in row))
    shares = sorted((label for label in labels if ":" not in label), key=_share)
    patterns = [label for label in labels if ":" in label]
    groups = [group for group in (shares, patterns) if group]
    figure = _figure(4.5 + 2.2 * len(groups), 4.4)
    axes = figure.subplots(1, len(groups), sharey=True, squeeze=False, width_ratios=[max(2, len(g)) for g in groups])[0]
    for axis, group in zip(axes, groups, strict=True):
        _draw_methods(axis, table, group, deviations or {}, lines=group is shares)
        if dense is not None:
            axis.axhline(dense, color=BLACK, linestyle="--", linewidth=1, label=f"dense, {dense:.4g}")
    low = min([*values, dense] if dense is not None else values)
    if low > 0 and max(values) > 5 * low:
        axes[0].set_yscale("log")
        _plain_ticks(axes[0])
    if shares:
        axes[0].set_xlabel(xlabel)
    axes[0].set_ylabel("perplexity")
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _save(figure, path)


def plot_speeds(points: Sequence[Mapping[str, Any]], path: str | Path, *, device: str = "") -> None:
    """Write a PNG of models in one plane: measured tokens a second to the right, perplexity upward, files as areas.

    points: `model`, `perplexity`, `speed` (tokens a second), `bytes`, and `kind` by which they are coloured. Raises
    ValueError for no point.

    >>> plot_speeds([{"model": "dense", "kind": "dense", "perplexity": 20.0, "speed": 90.0, "bytes": 1e6}], "speed.png")
    """
    if not points:
        raise ValueError("no model has a measured speed: there is nothing to draw")
    figure = _figure(9, 5.4)
    axis = figure.subplots()
    largest = max(float(row["bytes"]) for row in points)
    for i, kind in enumerate(dict.fromkeys(str(row["kind"]) for row in points)):
        mine = [row for row in points if row["kind"] == kind]
        colour = BLACK if kind == "dense" else _CYCLE[i % len(_CYCLE)]
        areas = [30 + 270 * float(row["bytes"]) / largest for row in mine]
        across, up = [row["speed"] for row in mine], [row["perplexity"] for row in mine]
        axis.scatter(across, up, s=areas, color=colour, alpha=0.55, linewidths=0, label=kind)
    values = [float(row["perplexity"]) for row in points]
    if max(values) > 3 * min(values):
        axis.set_yscale("log")
        _plain_ticks(axis)
    axis.set_ylabel("perplexity")
    axis.set_xlabel(f"tokens a second, one after another{', ' if device else ''}{device}")
    axis.margins(x=0.15, y=0.08)
    _name_points(axis, points)
    legend = figure.legend(
        *axis.get_legend_handles_labels(), frameon=False, fontsize=8, ncols=5, loc="outside lower left"
    )
    for handle in legend.legend_handles:
        handle.set_sizes([40])  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue] - of scatter
    _save(figure, path)


def _name_points(axis: Axes, points: Sequence[Mapping[str, Any]]) -> None:
    """Write names to the right of their points, moved upward past those that they would lie on."""
    written: list[Bbox] = []
    for row in sorted(points, key=lambda row: row["perplexity"]):
        said, at = f"{row['model']}, {row['bytes'] / 1e6:.3g} MB", (row["speed"], row["perplexity"])
        for up in range(-3, 57, 4):
            name = axis.annotate(said, at, xytext=(9, up), textcoords="offset points", fontsize=7, parse_math=False)
            if not any(name.get_window_extent().overlaps(other) for other in written) or up >= 53:
                written.append(name.get_window_extent())
                break
            name.remove()


def by_block(layers: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Kind of layer -> block -> its number, of several (experts) the mean; layers outside of blocks by their place.

    >>> by_block({"model.layers.3.mlp.up_proj.weight": 0.5})
    {'up_proj': {3: 0.5}}
    """
    kinds: dict[str, dict[int, list[float]]] = {}
    for place, (name, value) in enumerate(layers.items()):
        number = re.search(r"\.(\d+)\.", name)
        kind = name.removesuffix(".weight").rsplit(".", 1)[-1]
        kinds.setdefault(kind, {}).setdefault(int(number.group(1)) if number else place, []).append(value)
    return {kind: {block: statistics.fmean(found) for block, found in row.items()} for kind, row in kinds.items()}


def _draw_sparsity(axis: Axes, layers: Mapping[str, float]) -> None:
    """A marker for each kind of layer (up_proj, fc1, ..) over block numbers; blockless layers stand by name."""
    from matplotlib.ticker import MaxNLocator

    kinds: dict[str, dict[int, float]] = {}
    for kind, points in by_block(layers).items():
        same = next((name for name, others in kinds.items() if others == points), "")
        kinds.pop(same, None)
        kinds[f"{same}, {kind}".removeprefix(", ")] = points
    spread = 0.6 / max(1, len(kinds))  # kinds of equal sparsity stand side by side, not over each other
    for i, (kind, points) in enumerate(kinds.items()):
        aside = (i - (len(kinds) - 1) / 2) * spread
        axis.plot(
            [block + aside for block in points],
            [100 * share for share in points.values()],
            **_style(i),
            markersize=4,
            linewidth=0.5,
            label=kind if len(kinds) > 1 else None,
        )
    axis.set_xlabel("block")
    axis.set_ylabel("zeros, %")
    axis.set_title("Sparsity by layer", loc="left", fontsize=10)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(kinds) > 1:
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _draw_bars(axis: Axes, perplexity: Mapping[str, Mapping[str, float]]) -> None:
    """A group of bars for each stage, a bar for each text; the values stand above."""
    texts = list(dict.fromkeys(text for row in perplexity.values() for text in row))
    stages = list(perplexity)
    width = 0.8 / max(1, len(texts))
    finite = [v for row in perplexity.values() for v in row.values() if math.isfinite(v) and v > 0]
    log_scale = bool(finite) and max(finite) > 5 * min(finite)
    bottom = 10 ** math.floor(math.log10(min(finite))) if log_scale else 0
    for j, text in enumerate(texts):
        for i, stage in enumerate(stages):
            value = perplexity[stage].get(text)
            if value is None:
                continue
            x = i + (j - (len(texts) - 1) / 2) * width
            shown = math.isfinite(value)
            colour = _STAGES.get(stage.split()[0], _CYCLE[i % len(_CYCLE)]) if len(texts) == 1 else _CYCLE[j]
            label = text if i == 0 and len(texts) > 1 else None
            axis.bar(x, value - bottom if shown else 0, width * 0.92, bottom=bottom, color=colour, label=label)
            axis.annotate(
                f"{value:.4g}",
                (x, value if shown else bottom),
                xytext=(0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
    if log_scale:
        axis.set_yscale("log")
        axis.set_ylim(bottom, max(finite) * (1.5 if len(texts) == 1 else 3))
        _plain_ticks(axis)
    elif finite:
        axis.set_ylim(0, max(finite) * (1.12 if len(texts) == 1 else 1.3))
    axis.set_xticks(range(len(stages)), [_wrapped(stage) for stage in stages])
    scale = " (log scale)" if log_scale else ""
    axis.set_title(f"Perplexity, lower is better{scale}", loc="left", fontsize=10)
    if len(texts) > 1:
        axis.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def _draw_methods(
    axis: Axes,
    table: Mapping[str, Mapping[str, float]],
    labels: Sequence[str],
    deviations: Mapping[str, Mapping[str, float | None]],
    *,
    lines: bool,
) -> None:
    spread = 0.0 if lines else 0.5 / max(1, len(table))
    for i, (method, row) in enumerate(table.items()):
        mine = [label for label in labels if label in row]
        at = [_share(label) * 100 if lines else labels.index(label) for label in mine]
        bars = [deviations.get(method, {}).get(label) or 0.0 for label in mine]
        style: dict[str, Any] = {**_style(i), "markersize": 6, "linewidth": 1.4, "capsize": 2}
        axis.errorbar(
            [x + (i - (len(table) - 1) / 2) * spread for x in at],
            [row[label] for label in mine],
            yerr=bars if any(bars) else None,
            linestyle="-" if lines else "none",
            label=method,
            **style,
        )
    if lines:
        axis.set_xticks([_share(label) * 100 for label in labels])
    else:
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.6, len(labels) - 0.4)
        axis.set_xlabel("at most N of M kept")


def _style(i: int) -> dict[str, Any]:
    """Colour and marker of the i-th series; no pair comes twice among 77."""
    return {"color": _CYCLE[i % len(_CYCLE)], "marker": _MARKERS[(i + i // len(_CYCLE)) % len(_MARKERS)]}


def _share(label: str) -> float:
    """0.5 for "50 %", "50%", "0.5" or "50". Raises ValueError for what is no share."""
    number = float(label.rstrip(" %"))
    return number / 100 if "%" in label or number >= 1 else number


def _by_text(perplexity: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    return {
        stage: {str(k): float(v) for k, v in value.items()} if isinstance(value, Mapping) else {"": float(value)}
        for stage, value in perplexity.items()
    }


def _wrapped(stage: str) -> str:
    import textwrap

    return "\n".join(textwrap.wrap(stage, 14)) or stage


def _plain_ticks(axis: Axes) -> None:
    from matplotlib.ticker import LogFormatter

    axis.yaxis.set_major_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: str | Path) -> None:
    """Write a figure, in which a dollar is a dollar: no label is a formula, and a broken one would end the run."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # pyright: ignore[reportAttributeAccessIssue] - of texts, which it looks for
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", linewidth=0.4, alpha=0.5)
        axis.set_axisbelow(True)
    with atomic(path) as partial:
        figure.savefig(partial, format="png")
