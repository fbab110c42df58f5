"""Pictures of classifiers as PNG: accuracy of methods with error bars, one run's training and stages, and a sweep."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prunus.report.plots import _CYCLE, _STAGES, BLACK, BLUE, VERMILION, _figure, _save, _style, _wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[str, float, float | None]  # label on the abscissa, mean, deviation
_COLUMNS = 3  # panels side by side
_CROWDED, _SHOWN = 10.0, 15.0  # points
_CHARACTER = 0.1  # inches on the abscissa
_FEW = 12  # points that are marked, because a line of one shows nothing
_WINDOWS = 40  # running means are over a fortieth of a line


def plot_accuracy(
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    path: str | Path,
    *,
    xlabel: str,
    ylabel: str = "accuracy, %",
    dense: float | None = None,
    title: str = "",
) -> None:
    """Write a PNG with a panel for each key, a line for each method, deviations as bars.

    panels: panel title -> method -> points. The labels on the abscissa stand at equal distances, in the order in which
    they come. dense: a dashed line. When most values lie within ten points of the best, what is more than fifteen below
    it is left out, and the axis says so. Raises ValueError without points.

    >>> plot_accuracy({"": {"ALLR": [("90 %", 94.1, 0.1), ("95 %", 93.2, None)]}}, "grid.png", xlabel="sparsity")
    """
    labels = list(dict.fromkeys(point[0] for lines in panels.values() for row in lines.values() for point in row))
    if not labels:
        raise ValueError("there are no points to draw")
    across = min(_COLUMNS, len(panels))
    down = -(-len(panels) // across)
    width = max(3.4, max(0.6, _CHARACTER * max(map(len, labels))) * len(labels))
    figure = _figure(1.6 + width * across, 0.6 + 3.2 * down)
    axes = list(figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat)
    order = {name: i for i, name in enumerate(dict.fromkeys(name for lines in panels.values() for name in lines))}
    for axis, (name, lines) in zip(axes, panels.items(), strict=False):
        _draw_lines(axis, lines, labels, order)
        if dense is not None:
            axis.axhline(dense, color=BLACK, linestyle="--", linewidth=1, label=f"dense, {dense:.2f}")
        axis.set_title(name, loc="left", fontsize=10)
        axis.set_xlabel(xlabel)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    best, bottom = _limits([point[1] for lines in panels.values() for row in lines.values() for point in row], dense)
    if bottom is not None and len(order) > 1:
        axes[0].set_ylim(bottom, best + 0.5)
        ylabel = f"{ylabel} (less than {bottom:.0f} not shown)"
    for place in range(0, len(panels), across):
        axes[place].set_ylabel(ylabel)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    if handles:
        figure.legend(handles.values(), handles.keys(), frameon=False, fontsize=8, loc="outside right upper")
    if title:
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _save(figure, path)


def plot_run(
    losses: Sequence[float],
    stages: Mapping[str, float],
    path: str | Path,
    *,
    rates: Sequence[float] = (),
    title: str,
    what: str = "accuracy",
) -> None:
    """Write a PNG of one run: left the training loss of each epoch and the learning rate, right accuracy by stage.

    losses: the mean of each epoch; rates: learning rates at equal distances over the same time; stages: name ->
    accuracy in %, or what else is measured. Raises ValueError when there is neither a loss nor a stage.
    """
    if not losses and not stages:
        raise ValueError("there is neither a loss nor a stage to draw")
    from matplotlib.ticker import MaxNLocator

    figure = _figure(10, 3.8)
    left, right = figure.subplots(1, 2)
    marker = "o" if len(losses) <= _FEW else None
    left.plot([epoch + 0.5 for epoch in range(len(losses))], losses, color=BLUE, linewidth=1.4, marker=marker)
    left.set_xlabel("epoch")
    left.set_xlim(0, max(1, len(losses)))
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_title("Training loss" + (" and learning rate (dashed)" if rates else ""), loc="left", fontsize=10)
    if rates:
        other = left.twinx()
        places = [len(losses) * (i + 0.5) / len(rates) for i in range(len(rates))]
        other.plot(places, rates, color=VERMILION, linestyle="--", linewidth=1)
        other.set_ylim(0, None)
    for i, (name, value) in enumerate(stages.items()):
        right.bar(i, value, color=_STAGES.get(name, _CYCLE[i % len(_CYCLE)]))
        right.annotate(f"{value:.2f}", (i, value), xytext=(0, 2), textcoords="offset points", ha="center", fontsize=8)
    right.set_xticks(range(len(stages)), [_wrapped(name) for name in stages])
    right.set_ylim(0, 108)
    right.set_title(f"{what.capitalize()}, %", loc="left", fontsize=10)
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    _save(figure, path)


def plot_losses(
    losses: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    watched: Mapping[str, Sequence[tuple[int, float]]] | None = None,
    every: Mapping[str, int] | None = None,
) -> None:
    """Write a PNG of training losses by step, a line for each retraining; long ones faint, with their running mean.

    every: how many steps a loss is the mean of, where not one. watched: steps and perplexities that were measured
    meanwhile, dashed, on an axis of their own. Raises ValueError without a loss.
    """
    if not any(losses.values()):
        raise ValueError("there is no loss to draw")
    from matplotlib.ticker import MaxNLocator

    figure = _figure(8, 3.4)
    axis = figure.subplots()
    for i, (name, values) in enumerate(losses.items()):
        style: dict[str, Any] = {**_style(i), "linewidth": 1.4, "label": name}
        width, step = len(values) // _WINDOWS, (every or {}).get(name, 1)
        steps = range(step, step * len(values) + 1, step)
        if width > 1:
            axis.plot(steps, values, color=style["color"], linewidth=0.5, alpha=0.35)
        means = [statistics.fmean(values[max(0, end - max(1, width)) : end]) for end in range(1, len(values) + 1)]
        axis.plot(steps, means, **style, markevery=max(1, len(values) // 8), markersize=4)
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_title("Training loss", loc="left", fontsize=10)
    measured = {name: points for name, points in (watched or {}).items() if points}
    if measured:
        right = axis.twinx()
        right.set_ylabel("perplexity meanwhile, dashed")
        style: dict[str, Any]
        for name, points in measured.items():
            steps, values = zip(*points, strict=True)
            style = {**_style(list(losses).index(name)), "linestyle": "--", "markersize": 4}
            right.plot(steps, values, **style)
    if len(losses) > 1:
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def plot_sweep(result: Mapping[str, Any], path: str | Path) -> None:
    """Write a PNG with a line for each kind: accuracy against rate, parameters, operations, and measured latency.

    result: `points`, each with `kind`, `rate`, `stages` (name -> {"top1"}), `nonzero`, `sparse_flops` and `latency`
    (device -> seconds), and `dense` with the same numbers. Dotted where accuracy is shown as pruning left it, full as
    it is at the end. Raises ValueError without points.
    """
    points, dense = result["points"], result["dense"]
    if not points:
        raise ValueError("a sweep without points has nothing to draw")
    panels: dict[str, Callable[[Mapping[str, Any]], float]] = {
        "rate, %": lambda point: 100 * point["rate"],
        "nonzero parameters, %": lambda point: 100 * point["nonzero"] / dense["nonzero"],
        "operations, %": lambda point: 100 * point["sparse_flops"] / dense["sparse_flops"],
    }
    for device in dense["latency"]:
        panels[f"measured latency on the {device}, %"] = _latency(device, dense)
    figure = _figure(1.6 + 3.2 * len(panels), 3.8)
    axes = figure.subplots(1, len(panels), sharey=True)
    for axis, (label, place) in zip(axes, panels.items(), strict=True):
        for number, kind in enumerate(dict.fromkeys(point["kind"] for point in points)):
            mine = [point for point in points if point["kind"] == kind]
            at = [place(point) for point in mine]
            if label == "rate, %":
                left = [100 * point["stages"]["pruned"]["top1"] for point in mine]
                axis.plot(at, left, color=_CYCLE[number % len(_CYCLE)], linestyle=":", linewidth=1)
            values = [100 * point["accuracy"] for point in mine]
            style: dict[str, Any] = {**_style(number), "markersize": 4, "linewidth": 1.2}
            axis.plot(at, values, label=kind.replace("_", " "), **style)
        axis.axhline(100 * dense["accuracy"], color=BLACK, linestyle="--", linewidth=1, label="dense")
        axis.set_xlabel(label)
    axes[0].set_ylabel("accuracy, % (dotted: as pruning left it)")
    axes[-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(str(result.get("model", "")), fontsize=11, x=0.01, ha="left")
    _save(figure, path)


def _limits(values: Sequence[float], dense: float | None) -> tuple[float, float | None]:
    """The best value, and where the axis begins if a few far below would squeeze the rest."""
    best = max([*values, dense] if dense is not None else values)
    crowded = statistics.median(values) > best - _CROWDED and min(values) < best - _SHOWN
    return best, best - _SHOWN if crowded else None


def _draw_lines(
    axis: Axes, lines: Mapping[str, Sequence[Point]], labels: Sequence[str], order: Mapping[str, int]
) -> None:
    """Lines stand a little aside of each other, so that their bars can be told apart; one without a name is points."""
    aside = min(0.06, 0.5 / max(1, len(order)))
    for name, points in lines.items():
        shift = (order[name] - (len(order) - 1) / 2) * aside
        style: dict[str, Any] = {**_style(order[name]), "markersize": 4, "linewidth": 1.2, "capsize": 2}
        axis.errorbar(
            [labels.index(label) + shift for label, _, _ in points],
            [mean for _, mean, _ in points],
            yerr=[std or 0.0 for _, _, std in points],
            label=name or None,
            linestyle="-" if name else "none",
            **style,
        )
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.5, len(labels) - 0.5)


def _latency(device: str, dense: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], float]:
    return lambda point: 100 * point["latency"][device] / dense["latency"][device]
