"""Pictures of SmolLM2's tables: perplexity against tokens, and against sparsity.

python scripts/smollm2_pictures.py docs/results
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prunus.report import plot_grid

TEXT = "wikitext-2"
COLOURS = {"norms and biases": "#E69F00", "MaskLoRA": "#56B4E9", "everything": "#0072B2"}
BUDGETS = {"smollm2-262k": 262_144, "smollm2-4m": 4_194_304}  # grid -> tokens
LONGER = {"17 M": 16_777_216, "67 M": 67_108_864}
LOSSES = {"CE": ("--", "cross-entropy"), "half": ("-", "with the teacher")}
SHARES = ("50 %", "60 %", "70 %", "2:4")


def rows_of(results: Path, grid: str) -> list[dict[str, Any]]:
    """A grid's rows; none of one that was not run."""
    path = results / grid / "table.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def by_tokens(results: Path, pattern: str) -> dict[tuple[str, str], dict[int, float]]:
    """(what was retrained, loss) -> tokens -> perplexity, after ADMM."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for grid, tokens in BUDGETS.items():
        for row in rows_of(results, grid):
            if (row["criterion"], row["pattern"]) == ("ADMM", pattern) and row["trained"] in COLOURS:
                lines.setdefault((row["trained"], row["loss"]), {})[tokens] = row[TEXT]["mean"]
    for row in rows_of(results, "smollm2-tokens"):
        if row["pattern"] == pattern:
            lines["everything", "half"][LONGER[row["tokens"]]] = row[TEXT]["mean"]
    return lines


def draw_tokens(results: Path, dense: float, path: Path) -> None:
    """Perplexity against tokens at 2:4 and 60 %, side by side."""
    figure = Figure(figsize=(9.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, pattern in zip(axes, ("2:4", "60 %"), strict=True):
        for (trained, loss), points in sorted(by_tokens(results, pattern).items()):
            style, said = LOSSES[loss]
            line = {"color": COLOURS[trained], "linestyle": style, "label": f"{trained}, {said}"}
            axis.plot(sorted(points), [points[tokens] for tokens in sorted(points)], marker="o", markersize=4, **line)
        axis.axhline(dense, color="black", linestyle=":", linewidth=1, label=f"dense, {dense:.1f}")
        axis.set_xscale("log")
        axis.set_title(f"ADMM, {pattern}", fontsize=10, loc="left")
        axis.set_xlabel("tokens of retraining")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("perplexity, WikiText-2 (tokenised)")
    axes[1].legend(frameon=False, fontsize=8, loc="upper right")
    figure.savefig(path, format="png")


def draw_sparsity(results: Path, dense: float, path: Path) -> None:
    """Perplexity against sparsity at 4.2 million tokens, and not retrained."""
    table: dict[str, dict[str, float]] = {}
    for row in (*rows_of(results, "smollm2-262k"), *rows_of(results, "smollm2-4m")):
        retrained = row["trained"] in COLOURS and row["retraining"]["tokens"] == BUDGETS["smollm2-4m"]
        if row["criterion"] == "ADMM" and row["pattern"] in SHARES and (retrained or row["trained"] == "nothing"):
            said = "not retrained" if row["trained"] == "nothing" else f"{row['trained']}, {LOSSES[row['loss']][1]}"
            table.setdefault(said, {})[row["pattern"]] = row[TEXT]["mean"]
    plot_grid(table, path, dense=dense, title="SmolLM2-135M, ADMM, 4.2 million tokens; WikiText-2 (tokenised)")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (dense,) = {round(json.loads((folder / grid / "dense.json").read_text())[TEXT], 2) for grid in BUDGETS}
    draw_tokens(folder, dense, folder / "smollm2-tokens.png")
    draw_sparsity(folder, dense, folder / "smollm2-sparsity.png")
