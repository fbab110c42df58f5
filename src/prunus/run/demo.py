"""The README's first command: the main job on the embedded model and text, offline, in a minute on two cores.

One pruning, two ways back: biases and norms, and MaskLoRA merged into the zeros' neighbours. What is shown is what
`prunus run` measures; only the second retraining, from the same pruned weights, is added here, and that threads and
steps go by the time that they are seen to take: two demos need not make the same steps, nor the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prunus.jobs import device_of, held
from prunus.language import Pruned, evaluate, load, prune, prunus_info, summary
from prunus.machine import counted, write_json
from prunus.recipe import LanguageRecipe, given, merge, parse
from prunus.report import plot_compression
from prunus.run.page import write_report
from prunus.run.show import show_result

__all__ = ["RECIPE", "demo"]

RECIPE: dict[str, Any] = {
    "model": "embedded",
    "dtype": "float32",
    "prune": {"criterion": "admm", "sparsity": 0.6},
    "calibrate": {"samples": 64, "length": 256, "batch_size": 16},
    "retrain": {"train": ["biases", "norms"], "steps": 100, "batch_size": 8, "length": 256, "lr": 3e-3},
    "evaluate": {"window": 256, "batch_size": 16},
}
SECONDS = 54  # for what follows the imports; a retraining has 8 steps at least and RECIPE's at most, whatever they take
LEAST = 8
MASK_LORA: dict[str, Any] = {"train": ["mask_lora"], "rank": 2, "alpha": 4.0, "lr": 2e-3}


def demo(out: Path, sparsity: float = 0.6, device: str = "auto") -> dict[str, Any]:
    """The result: perplexity dense, pruned, retrained on biases and norms, retrained with MaskLoRA and merged.

    The steps of a retraining are those that fit into a minute here and now.
    Raises ValueError for a sparsity outside [0, 1).
    """
    raw = {**RECIPE, "prune": {**RECIPE["prune"], "sparsity": sparsity}, "device": device, "out": str(out)}
    recipe = parse(raw, LanguageRecipe, "demo")
    with held(out):
        return _demo(recipe, out)


def _demo(recipe: LanguageRecipe, out: Path) -> dict[str, Any]:
    device = device_of(recipe)
    started = time.perf_counter()
    loaded = load(recipe)
    loaded.model.to(device)
    _choose_threads(loaded.model)
    perplexities: dict[str, Any] = {"dense": evaluate(loaded, recipe, device)}
    streamed = prune(loaded, recipe, device)
    pruned = ended = Pruned(loaded, streamed.masks, recipe, device)
    before = time.perf_counter()
    perplexities["pruned"] = evaluate(loaded, recipe, device)
    now = time.perf_counter()
    steps = _steps(pruned, SECONDS - (now - started) - 2 * (now - before))
    report: dict[str, Any] = {}
    for name, change in (("biases and norms", {}), ("MaskLoRA, merged", MASK_LORA)):
        name = f"{name}, {counted(steps, 'step')}"
        ended, report[name] = _retrain(pruned, change | {"steps": steps}, name)
        perplexities[name] = evaluate(ended.loaded, recipe, device)
    result: dict[str, Any] = {"model": "embedded", "perplexity": perplexities, "pruning": summary(streamed)}
    result |= {"retraining": report, "seconds": time.perf_counter() - started, "device": str(device)}
    info = prunus_info(recipe, result)
    result["saved"] = str(out / "model")
    ended.loaded.model.to("cpu")
    ended.save(out / "model", info)
    write_json(out / "result.json", result)
    plot_compression(result, out / "report.png")
    show_result(result, out)
    write_report(out)
    return result


def _choose_threads(model: Any) -> None:
    """One thread where several are slower, because other programs use the cores."""
    most, tokens = torch.get_num_threads(), torch.zeros(8, 256, dtype=torch.long)
    if most == 1 or model.device.type != "cpu":
        return
    seconds = dict.fromkeys((most, 1), 0.0)
    with torch.inference_mode():
        model(tokens)
        for count in (most, 1) * 3:
            torch.set_num_threads(count)
            started = time.perf_counter()
            model(tokens)
            seconds[count] += time.perf_counter() - started
    torch.set_num_threads(min(seconds, key=lambda count: seconds[count]))


def _steps(pruned: Pruned, left: float) -> int:
    """How many steps each of two retrainings has in `left` seconds, by two of the slower one."""
    _, found = _retrain(pruned, MASK_LORA | {"steps": 2}, "two steps, to measure them")
    return max(LEAST, min(given(pruned.recipe.retrain).steps, int(left / found["seconds"]) - 1))


def _retrain(pruned: Pruned, change: Mapping[str, Any], name: str) -> tuple[Pruned, dict[str, Any]]:
    """A retrained copy, and the numbers of it."""
    raw = merge(pruned.recipe.model_dump(mode="json"), {f"retrain.{key}": value for key, value in change.items()})
    own = replace(pruned, loaded=pruned.loaded.copied(), recipe=parse(raw, LanguageRecipe, "demo"))
    numbers = own.retrain_(f"retrain {name}").numbers()
    return own, {key: value for key, value in numbers.items() if key not in ("losses", "merge")}
