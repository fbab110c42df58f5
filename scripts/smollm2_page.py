"""The tables and pictures of docs/results/language-models.md, from what SmolLM2's grids left.

    python scripts/smollm2_page.py docs/results

A table stands in the page between `<!-- NAME -->` and `<!-- end -->`, and is written anew there; pictures lie beside.
What no grid has left yet is left out.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prunus.report import markdown_table, plot_grid

Row = dict[str, Any]
TEXT = "wikitext-2"
PATTERNS = ("50 %", "60 %", "70 %", "2:4", "4:8")
COLOURS = {"norms and biases": "#E69F00", "MaskLoRA": "#56B4E9", "everything": "#0072B2"}
BUDGETS = {"smollm2-262k": 262_144, "smollm2-4m": 4_194_304}  # grid -> tokens
LONGER = {"17 M": 16_777_216, "67 M": 67_108_864}
LOSSES = {"CE": ("--", "cross-entropy"), "half": ("-", "with the teacher")}


def rows_of(results: Path, grid: str) -> list[Row]:
    """A grid's rows; none of one that was not run."""
    path = results / grid / "table.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []


def said(values: Sequence[Row | None]) -> str:
    """Perplexities beside each other, with the deviation where there are several seeds; "" where none was measured."""
    parts = ["" if each is None else number(each[TEXT]["mean"], each[TEXT]["std"]) for each in values]
    return " / ".join(part or "–" for part in parts) if any(parts) else ""


def number(mean: float, deviation: float | None = None) -> str:
    """Two decimals below 100, one below 1000."""
    text = f"{mean:,.{2 if mean < 100 else 1 if mean < 1000 else 0}f}"
    return text if deviation is None else f"{text} ± {deviation:.2f}"


def one_shot(results: Path) -> str:
    """Criteria by patterns, nothing retrained; those of the first grid, calibrated alike, where this one has none."""
    rows = [row for row in rows_of(results, "smollm2-262k") if row["trained"] == "nothing"]
    first = [row for row in rows_of(results, "smollm2-grid") if row["method"] == "pruned only"]
    rows += [row | {"criterion": _FIRST[row["criterion"]]} for row in first]
    return _by_pattern(rows, ("criterion",), lambda found: found[:1])


def retrained(results: Path, grid: str) -> str:
    """What is retrained by patterns, after each criterion: by cross-entropy / with the teacher."""
    fits = ("reconstruction, MaskLoRA", "reconstruction, everything")
    rows = [row for row in rows_of(results, grid) if row["trained"] not in fits]
    after = {row["criterion"] for row in rows if row["trained"] != "nothing"} | {"ELSA", "learned masks"}
    rows = [row for row in rows if row["criterion"] in after]

    def chosen(found: Sequence[Row]) -> list[Row | None]:  # what nothing is retrained after has no loss of retraining
        return [*found] if found[0]["trained"] == "nothing" else [_of(found, loss) for loss in LOSSES]

    return _by_pattern(rows, ("criterion", "trained"), chosen)


def reconstructed(results: Path) -> str:
    """Blocks fitted after each criterion, beside nothing and beside retraining by cross-entropy."""
    names = ("nothing", "reconstruction, MaskLoRA", "reconstruction, everything", "MaskLoRA", "everything")
    fitted = {row["criterion"] for row in rows_of(results, "smollm2-262k") if row["trained"].startswith("recon")}
    rows = [r for r in rows_of(results, "smollm2-262k") if r["trained"] in names and r["criterion"] in fitted]
    rows = [r for r in rows if r["pattern"] in ("60 %", "2:4")]
    return _by_pattern(rows, ("criterion", "trained"), lambda found: [_of(found, "CE")])


def by_tokens(results: Path, pattern: str) -> dict[tuple[str, str], dict[int, float]]:
    """(what was retrained, loss) -> tokens -> perplexity, after ADMM."""
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for grid, tokens in BUDGETS.items():
        for row in rows_of(results, grid):
            if (row["criterion"], row["pattern"]) == ("ADMM", pattern) and row["trained"] in COLOURS:
                lines.setdefault((row["trained"], row["loss"]), {})[tokens] = row[TEXT]["mean"]
    for row in rows_of(results, "smollm2-tokens"):
        if row["pattern"] == pattern:
            lines.setdefault(("everything", "half"), {})[LONGER[row["tokens"]]] = row[TEXT]["mean"]
    return lines


def tokens(results: Path) -> str:
    """Everything with the teacher after ADMM: perplexity, and times the dense one, by tokens."""
    found, shots = [], [r for r in rows_of(results, "smollm2-262k") if (r["criterion"], r["trained"]) == _SHOT]
    for pattern in PATTERNS[:4]:
        shot = next((row[TEXT]["mean"] for row in shots if row["pattern"] == pattern), None)
        line = {0: shot, **by_tokens(results, pattern).get(("everything", "half"), {})}
        names = dict(zip((0, *BUDGETS.values(), *LONGER.values()), ("none", "262 k", "4.2 M", *LONGER), strict=True))
        cells = {
            name: f"{number(line[n])} ({line[n] / dense(results):.2f})" if line.get(n) else ""
            for n, name in names.items()
        }
        found.append({"pattern": pattern, **cells})
    return markdown_table(found)


def dense(results: Path) -> float:
    """The dense model's perplexity, the same beside every grid."""
    paths = [results / grid / "dense.json" for grid in BUDGETS]
    (value,) = {round(json.loads(path.read_text())[TEXT], 2) for path in paths if path.exists()}
    return value


def draw_tokens(results: Path, path: Path) -> None:
    """Perplexity against tokens at 2:4 and 60 %, side by side, where several budgets were run."""
    lines = {pattern: by_tokens(results, pattern) for pattern in ("2:4", "60 %")}
    lines = {pattern: found for pattern, found in lines.items() if any(len(each) > 1 for each in found.values())}
    figure = Figure(figsize=(1.6 + 3.9 * len(lines), 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(lines), sharey=True, squeeze=False)[0]
    for axis, (pattern, found) in zip(axes, lines.items(), strict=True):
        for (trained, loss), points in sorted(found.items()):
            style, name = LOSSES[loss]
            line = {"color": COLOURS[trained], "linestyle": style, "label": f"{trained}, {name}"}
            axis.plot(sorted(points), [points[n] for n in sorted(points)], marker="o", markersize=4, **line)
        axis.axhline(dense(results), color="black", linestyle=":", linewidth=1, label=f"dense, {dense(results):.1f}")
        axis.set_xscale("log")
        axis.set_title(f"ADMM, {pattern}", fontsize=10, loc="left")
        axis.set_xlabel("tokens of retraining")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("perplexity, WikiText-2 (tokenised)")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, frameon=False, fontsize=8, loc="outside lower center", ncols=4)
    figure.savefig(path, format="png")


def draw_sparsity(results: Path, path: Path) -> None:
    """Perplexity against sparsity after ADMM: not retrained, on 262,144 tokens, on 4.2 million."""
    table: dict[str, dict[str, float]] = {}
    for grid, budget in zip(BUDGETS, ("262 k", "4.2 M"), strict=True):
        for row in rows_of(results, grid):
            wanted = row["trained"] == "nothing" or (row["trained"], row["loss"]) in _DRAWN[grid]
            if row["criterion"] == "ADMM" and row["pattern"] in PATTERNS[:4] and wanted:
                taught = ", teacher" if row["loss"] == "half" else ""
                name = "not retrained" if row["trained"] == "nothing" else f"{row['trained']}{taught}, {budget} tokens"
                table.setdefault(name, {})[row["pattern"]] = row[TEXT]["mean"]
    title = "SmolLM2-135M, ADMM; WikiText-2 (tokenised)"
    plot_grid(table, path, dense=dense(results), title=title)


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with its tables anew. Raises ValueError for a table that has no place in it."""
    for name, table in tables.items():
        page, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda found, table=table: f"{found[1]}\n{table}\n{found[2]}",
            page,
            flags=re.S,
        )
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}: give it one, <!-- {name} -->")
    return page


_SHOT = ("ADMM", "nothing")
_FIRST = {"wanda": "Wanda", "sparsegpt": "SparseGPT", "magnitude": "magnitude"}
_DRAWN = {
    "smollm2-262k": (("norms", "CE"), ("norms and biases", "CE"), ("MaskLoRA", "CE"), ("everything", "half")),
    "smollm2-4m": (("MaskLoRA", "half"), ("everything", "half")),
}


def _of(rows: Sequence[Row], loss: str) -> Row | None:
    return next((row for row in rows if row["loss"] == loss), None)


def _by_pattern(rows: Sequence[Row], heads: Sequence[str], chosen: Callable[[list[Row]], Sequence[Row | None]]) -> str:
    """One line for each combination of heads, a column for each pattern; the share of what is trained beside it."""
    lines: dict[tuple[str, ...], Row] = {}
    for row in rows:
        line = lines.setdefault(tuple(row[head] for head in heads), {head: row[head] for head in heads})
        if "trained" in heads:
            share = row.get("retraining", {}).get("share")
            line["of all"] = line.get("of all") or ("" if share is None else f"{100 * share:.3g} %")
        line.setdefault(row["pattern"], []).append(row)
    patterns = [pattern for pattern in PATTERNS if any(pattern in line for line in lines.values())]
    for line in lines.values():
        line |= {pattern: said(chosen(line[pattern])) if pattern in line else "" for pattern in patterns}
    columns = [*heads, *(["of all"] if "trained" in heads else []), *patterns]
    full = [line for line in lines.values() if any(line[pattern] for pattern in patterns)]
    return markdown_table([{name: line.get(name, "") for name in columns} for line in full], columns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the results, with the page and the grids")
    folder = parser.parse_args().folder
    found = {"one-shot": one_shot(folder)} | {
        grid: retrained(folder, grid) for grid in BUDGETS if rows_of(folder, grid)
    }
    if any(row["trained"].startswith("recon") for row in rows_of(folder, "smollm2-262k")):
        found["reconstruction"] = reconstructed(folder)
    if rows_of(folder, "smollm2-4m") or rows_of(folder, "smollm2-tokens"):
        found["tokens"] = tokens(folder) + "\n![Perplexity against tokens](smollm2-tokens.png)\n"
        draw_tokens(folder, folder / "smollm2-tokens.png")
    draw_sparsity(folder, folder / "smollm2-sparsity.png")
    target = folder / "language-models.md"
    target.write_text(filled(target.read_text(encoding="utf-8"), found), encoding="utf-8")
