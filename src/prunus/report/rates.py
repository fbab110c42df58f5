"""The picture of a sweep: accuracy against the rate, and against what the rate bought."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from prunus.report.plots import _CYCLE, BLACK, _figure, _save, _style


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


def _latency(device: str, dense: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], float]:
    return lambda point: 100 * point["latency"][device] / dense["latency"][device]
