"""The README's first command: the main job on the embedded model and text, offline, in about two minutes on two cores.

One pruning, two ways back: biases and norms, and MaskLoRA merged into the zeros' neighbours. What is shown is what
`prunus run` measures; only the second retraining, from the same pruned weights, is added here.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from prunus.machine import write_json
from prunus.report import plot_compression, progress
from prunus.run import stages
from prunus.run.compress import prunus_info
from prunus.run.folder import device_of, held
from prunus.run.recipe import LanguageRecipe, given, merge, parse
from prunus.run.show import show_result
from prunus.save import save_model
from prunus.stream import Streamed

__all__ = ["RECIPE", "demo"]

RECIPE: dict[str, Any] = {
    "model": "embedded",
    "dtype": "float32",
    "device": "auto",
    "prune": {"criterion": "wanda", "sparsity": 0.6},
    "calibrate": {"samples": 64, "length": 256, "batch_size": 16},
    "retrain": {"train": ["biases", "norms"], "steps": 100, "batch_size": 8, "length": 256, "lr": 3e-3},
    "evaluate": {"window": 256, "batch_size": 16},
}
MASK_LORA: dict[str, Any] = {"train": ["mask_lora"], "rank": 2, "alpha": 4.0, "lr": 2e-3}


def demo(out: Path, sparsity: float = 0.6) -> dict[str, Any]:
    """The result: perplexity dense, pruned, retrained on biases and norms, retrained with MaskLoRA and merged.

    Raises ValueError for a sparsity outside [0, 1).
    """
    raw = {**RECIPE, "prune": {**RECIPE["prune"], "sparsity": sparsity}, "out": str(out)}
    recipe = parse(raw, LanguageRecipe, "demo")
    with held(out):
        return _demo(recipe, out)


def _demo(recipe: LanguageRecipe, out: Path) -> dict[str, Any]:
    device = device_of(recipe)
    started = time.perf_counter()
    loaded = stages.load(recipe)
    loaded.model.to(device)
    perplexities: dict[str, Any] = {"dense": stages.evaluate(loaded, recipe, device)}
    with progress("prune", loaded.model.config.num_hidden_layers) as advance:
        streamed = stages.prune(loaded, recipe, device, on_block=lambda _: advance(1))
    perplexities["pruned"] = stages.evaluate(loaded, recipe, device)
    pruned = copy.deepcopy(loaded.model)
    report = {}
    for name, change in (("biases and norms", {}), ("MaskLoRA, merged", MASK_LORA)):
        loaded = replace(loaded, model=copy.deepcopy(pruned))
        report[name] = _retrain(loaded, streamed, recipe, change, name=name)
        perplexities[name] = stages.evaluate(loaded, recipe, device)
    result: dict[str, Any] = {"model": "embedded", "perplexity": perplexities, "pruning": stages.summary(streamed)}
    result |= {"retraining": report, "seconds": time.perf_counter() - started, "device": str(device)}
    info = prunus_info(recipe, result)
    result["saved"] = str(out / "model")
    save_model(
        loaded.model.to("cpu"), loaded.tokenizer, out / "model", masks=streamed.masks, info=info, source=loaded.folder
    )
    write_json(out / "result.json", result)
    plot_compression(result, out / "report.png")
    show_result(result, out)
    return result


def _retrain(
    loaded: stages.Loaded, streamed: Streamed, recipe: LanguageRecipe, change: dict[str, Any], *, name: str
) -> dict[str, Any]:
    recipe = parse(
        merge(recipe.model_dump(mode="json"), {f"retrain.{k}": v for k, v in change.items()}), LanguageRecipe, "demo"
    )
    with progress(f"retrain {name}", given(recipe.retrain).steps) as advance:
        report = stages.retrain(loaded, streamed.masks, recipe, device_of(recipe), on_step=advance.step)
    return {k: v for k, v in report.numbers().items() if k not in ("losses", "merge")}
