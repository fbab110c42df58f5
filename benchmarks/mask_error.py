"""What is lost of the outputs of single layers by several ways to choose a mask, and how long each takes.

    python benchmarks/mask_error.py                                                  # the embedded model, all layers
    python benchmarks/mask_error.py --model SmolLM2-135M-Instruct.Q4_1.gguf --data c4.txt --include "layers.14.*"

Every layer sees the inputs of the dense model. Shown is ||(W - W') X||^2 as a share of Wanda's, the geometric mean over
layers (but those where Wanda loses nothing, because more inputs are always zero than weights pruned), and the seconds
for all of them, in one process. SparseGPT moves the weights that stay; "its mask alone" is its
mask on the weights as they were. All else is masks on the weights as they were.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import prunus
from prunus.language import stages
from prunus.language.stages import fitted
from prunus.language.texts import calibration_windows
from prunus.layers import Layer
from prunus.patterns import Pattern
from prunus.recipe import load_recipe
from prunus.report import print_table
from prunus.score import Criterion

ROWS = prunus.Unstructured("row")
PATTERNS = {"50 %": (ROWS, 0.5), "60 %": (ROWS, 0.6), "2:4": (prunus.NM(2, 4), 0.5)}


def mask_alone(criterion: Criterion) -> Criterion:
    """The mask that a criterion chooses, on the weights as they were."""

    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        mask = criterion.solve(layer, pattern, kept)[1]
        return layer.weight * mask, mask

    return Criterion(solve, needs=criterion.needs, compare=criterion.compare)


SOLVERS: dict[str, Criterion] = {
    "Wanda": prunus.wanda,
    "SparseGPT": prunus.sparsegpt(),
    "SparseGPT, its mask alone": mask_alone(prunus.sparsegpt()),
    "Frank-Wolfe, convex, rounded": prunus.frank_wolfe(30, 0, (0.0, 0.0)),
    "Frank-Wolfe, rounded": prunus.frank_wolfe(30, 0),
    "swaps from Wanda's mask": prunus.frank_wolfe(0, 100),
    "Frank-Wolfe and swaps (`frank_wolfe()`)": prunus.frank_wolfe(),
}


def error(layer: Layer, weight: Tensor) -> float:
    """||(W - W') X||^2 in float64."""
    change = (layer.weight - weight).double()
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    return float(((change @ layer.inputs.gram.double().to(change.device)) * change).sum())


def measure_all(rows: list[dict[str, Any]]) -> Criterion:
    """A criterion that measures the others on every layer it is given, and leaves the layer dense."""

    def solve(layer: Layer, _: Pattern, __: int) -> tuple[Tensor, Tensor]:
        for label, (pattern, sparsity) in PATTERNS.items():
            kept = pattern.counts((layer.weight.shape[0], layer.weight.shape[1]), sparsity, name=layer.name)
            for name, criterion in SOLVERS.items():
                started = time.perf_counter()
                weight, mask = criterion.solve(layer, pattern, kept)
                assert int(mask.sum()) == kept  # waits for a GPU, too
                seconds = time.perf_counter() - started
                found = error(layer, weight)
                rows.append({"layer": layer.name, "pattern": label, "solver": name, "error": found, "seconds": seconds})
        return layer.weight, torch.ones_like(layer.weight, dtype=torch.bool)

    return Criterion(solve, needs="gram")


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a solver: for each pattern the geometric mean of its errors over Wanda's, and the seconds in all."""
    base = {(row["layer"], row["pattern"]): row["error"] for row in rows if row["solver"] == "Wanda"}
    table: list[dict[str, Any]] = []
    for name in SOLVERS:
        line: dict[str, Any] = {"solver": name}
        for label in PATTERNS:
            mine = [row for row in rows if row["solver"] == name and row["pattern"] == label]
            logs = [math.log(row["error"] / base[row["layer"], label]) for row in mine if base[row["layer"], label]]
            line[label] = round(math.exp(statistics.fmean(logs)), 4)
            line[f"{label}, seconds"] = round(sum(row["seconds"] for row in mine), 2)
        table.append(line)
    return table


def main() -> None:
    """Measure, show the table, and write it with the single numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default=None, help="calibration text; the embedded one without it")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--include", nargs="*", default=[], help="globs of layer names")
    parser.add_argument("--out", type=Path, default=None, help="JSON file")
    asked = parser.parse_args()
    text = {} if asked.data is None else {"calibrate.data": asked.data}
    recipe = load_recipe(None, {"model": asked.model, "dtype": "float32", "device": asked.device, **text})
    recipe = fitted(recipe, torch.device(asked.device))
    loaded = stages.load(recipe)
    calibrate = recipe.calibrate.model_copy(update={"samples": asked.samples, "length": asked.length})
    windows = calibration_windows(calibrate, loaded.tokenizer)
    rows: list[dict[str, Any]] = []
    prunus.stream(
        loaded.model,
        measure_all(rows),
        ROWS,
        0.5,
        tokens=windows,
        include=asked.include,
        device=asked.device,
    )
    table = summary(rows)
    print_table(table, title=f"{asked.model}, {len({row['layer'] for row in rows})} layers")
    if asked.out is not None:
        gpu = torch.cuda.get_device_name() if asked.device.startswith("cuda") else None
        where = {"device": gpu or f"CPU, {torch.get_num_threads()} threads", "torch": torch.__version__}
        how = {"model": Path(asked.model).name, "samples": asked.samples, "length": asked.length}
        layers = len({row["layer"] for row in rows})
        found = {**how, **where, "python": platform.python_version(), "layers": layers, "table": table, "rows": rows}
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
