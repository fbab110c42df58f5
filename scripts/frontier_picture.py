"""The README's picture: what pruning half of the weights costs, and what retraining gives back, from a grid's table.

python scripts/frontier_picture.py docs/results/embedded-frontier
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PRUNED, SLIVER, ALL, DENSE = "#D55E00", "#56B4E9", "#0072B2", "#000000"
BARS = (  # name, criterion, trained, loss, colour
    ("Wanda", "Wanda", "nothing", "CE", PRUNED),
    ("ADMM and refit", "ADMM, refit", "nothing", "CE", PRUNED),
    ("Wanda, then MaskLoRA", "Wanda", "MaskLoRA", "CE", SLIVER),
    ("ADMM and refit, then MaskLoRA\nwith the dense model as teacher", "ADMM, refit", "MaskLoRA", "half", SLIVER),
    ("ADMM and refit, then everything\nwith the dense model as teacher", "ADMM, refit", "everything", "half", ALL),
)
HALF = "2:4"
DENSE_PERPLEXITY = 31.01  # on the test text, docs/results/embedded-frontier/table.md


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the picture; rows: of table.json."""
    found = {
        (row["criterion"], row["trained"], row["loss"]): row["test"]["mean"] for row in rows if row["pattern"] == HALF
    }
    figure = Figure(figsize=(8.2, 3.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for place, (_, criterion, trained, loss, colour) in enumerate(BARS):
        value = found[criterion, trained, loss]
        axis.barh(place, value, color=colour, height=0.7)
        axis.annotate(
            f"{value:.1f}", (value, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axis.axvline(DENSE_PERPLEXITY, color=DENSE, linestyle="--", linewidth=1)
    said, at = f"dense, {DENSE_PERPLEXITY:.1f}", (DENSE_PERPLEXITY, -0.6)
    axis.annotate(said, at, xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set_yticks(range(len(BARS)), [name for name, *_ in BARS], fontsize=9)
    axis.set_ylim(len(BARS) - 0.4, -0.9)
    axis.set_xlabel("perplexity, half of the weights zero (2:4); less is better")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a grid, with its table.json")
    folder = parser.parse_args().folder
    draw(json.loads((folder / "table.json").read_text(encoding="utf-8")), folder / "frontier.png")
