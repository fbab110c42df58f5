"""Zeros, smaller files and smaller models in one table: perplexity, without and with retraining, beside measured speed.

    python scripts/shrink_table.py --out runs/shrink [--model embedded] [--data TEXT] [--steps 512] [--minutes 2.5]

Every row is a run of `prunus run`, so a killed script goes on; rows.json and table.md have what is finished. Baselines
are made here: blocks by angular distance (Gromov et al. 2024), neurons by the norms of their columns, or of these times
what they receive.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.blocks import embed, find_blocks, run_block
from prunus.machine import read_json, write_json
from prunus.measure import speed
from prunus.report import markdown_table
from prunus.run import stages
from prunus.run.compress import compress
from prunus.run.folder import device_of
from prunus.run.recipe import LanguageRecipe, merge, parse
from prunus.run.texts import calibration_windows
from prunus.save import load_model, save_model
from prunus.score import Criterion
from prunus.shrink import remove_blocks, remove_neurons
from prunus.stream import Memory

ADMM = {"refit": {"of": "admm"}}


def rows_of(blocks: int, words: Any) -> dict[str, dict[str, Any]]:
    """Row -> what its recipe says beside the base."""
    return {
        "dense": {"prune": {"sparsity": 0.0, "criterion": "magnitude"}, "retrain": None},
        "dense, retrained": {"prune": {"sparsity": 0.0, "criterion": "magnitude"}},
        "25 % of neurons": {"shrink": {"neurons": 0.25}},
        "50 % of neurons": {"shrink": {"neurons": 0.5}},
        f"{blocks} of blocks": {"shrink": {"blocks": blocks}},
        f"{2 * blocks} of blocks": {"shrink": {"blocks": 2 * blocks}},
        "60 % zeros": {"prune": {"criterion": ADMM, "sparsity": 0.6}},
        "2:4": {"prune": {"criterion": ADMM, "pattern": "2:4"}},
        f"{blocks} of blocks, by angle": {"baseline": "angle", "count": blocks},
        f"{2 * blocks} of blocks, by angle": {"baseline": "angle", "count": 2 * blocks},
        "words": {"shrink": {"vocabulary": words}},
        f"25 % of neurons, {blocks} of blocks": {"shrink": {"neurons": 0.25, "blocks": blocks}},
        f"25 % of neurons, {blocks} of blocks, words": {
            "shrink": {"neurons": 0.25, "blocks": blocks, "vocabulary": words}
        },
        "25 % of neurons, 60 % zeros": {
            "shrink": {"neurons": 0.25},
            "prune": {"criterion": ADMM, "sparsity": 0.6},
        },
        "50 % of neurons, 2:4": {
            "shrink": {"neurons": 0.5},
            "prune": {"criterion": ADMM, "pattern": "2:4"},
        },
        "25 % of neurons, by magnitude": {"baseline": "magnitude", "share": 0.25},
        "50 % of neurons, by magnitude": {"baseline": "magnitude", "share": 0.5},
        "25 % of neurons, by Wanda": {"baseline": "wanda", "share": 0.25},
        "50 % of neurons, by Wanda": {"baseline": "wanda", "share": 0.5},
    }


def by_angle(model: Any, tokens: Tensor, count: int) -> list[int]:
    """The `count` blocks in a row over which hidden states turn least: arccos of their cosine, mean over tokens."""
    names, place = find_blocks(model), next(model.parameters()).device
    hidden, arguments = embed(model, names, tokens, source=Memory(model), device=place, batch_size=8)
    found = torch.zeros(len(names) - count + 1)
    with torch.no_grad():
        for index, entering in enumerate(hidden):
            states = [entering]
            for name in names:
                states.append(run_block(model.get_submodule(name), states[-1], arguments[name][index]))
            for first in range(len(found)):
                cosine = torch.cosine_similarity(states[first].float(), states[first + count].float(), dim=-1)
                found[first] += cosine.clamp(-1, 1).arccos().mean().cpu()
    return list(range(int(found.argmin()), int(found.argmin()) + count))


def by_norms(scaled: bool) -> Criterion:
    """Columns by their norms, or these times the norms of what they receive (as Wanda's scores); nothing is fitted."""

    def solve(layer: Any, _: Any, kept: int) -> tuple[Tensor, Tensor]:
        rows, size = layer.weight.shape
        norms = layer.weight.norm(dim=0) * (layer.inputs.norms if scaled else 1.0)
        mask = torch.zeros(size, dtype=torch.bool, device=layer.weight.device)
        mask[norms.topk(round(kept / rows)).indices] = True
        mask = mask.expand(rows, size).clone()
        return layer.weight * mask, mask

    return Criterion(solve, needs="norms")


def baseline(recipe: LanguageRecipe, said: dict[str, Any], folder: Path) -> None:
    """Write the folder of a model that another method made smaller, without retraining."""
    if (folder / "prunus.json").exists():
        return
    device = device_of(recipe)
    recipe = stages.fitted(recipe, device)
    loaded = stages.load(recipe, device)
    tokens = calibration_windows(recipe.calibrate, loaded.tokenizer)
    if said["baseline"] == "angle":
        model = remove_blocks(loaded.model, by_angle(loaded.model, tokens, said["count"]))
    else:
        model = remove_neurons(loaded.model, tokens, said["share"], criterion=by_norms(said["baseline"] == "wanda"))
    save_model(model, loaded.tokenizer, folder, masks=None, info={}, source=loaded.folder)


def row(name: str, base: dict[str, Any], said: dict[str, Any], out: Path, how: dict[str, Any]) -> dict[str, Any]:
    """The numbers of one row."""
    folder = out / name.replace("%", "percent").replace(" ", "-").replace(",", "").replace(":", "-")
    raw = {**merge(base, {"out": str(folder)}), **{key: value for key, value in said.items() if key in KEYS}}
    if "baseline" in said:
        plain = parse({**base, "out": str(folder), "retrain": None}, LanguageRecipe, name)
        baseline(plain, said, out / f"{folder.name}-start")
        raw |= {"model": str(out / f"{folder.name}-start"), "prune": {"sparsity": 0.0, "criterion": "magnitude"}}
        raw["retrain"] = merge(raw["retrain"], {"distill.teacher": base["model"]})
    result = compress(parse(raw, LanguageRecipe, name))
    before, after = (result["perplexity"].get(stage) for stage in ("pruned", "merged"))
    half = load_model(folder / "model", torch.bfloat16)
    saved = save_model(half, None, folder / "packed", masks=None, info={}, packed="zstd")
    model = (half.float() if how["device"] == "cpu" else half).to(how["device"])
    paced = vars(speed(model, prompt=how["prompt"], tokens=32, batch_size=how["batch_size"]))
    sizes = {"file": saved.dense_bytes, "packed": saved.weight_bytes}
    return {"model": name, "before": before, "after": after, **sizes, **paced, "seconds": result["seconds"]}


KEYS = ("prune", "shrink", "retrain")


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("--out", type=Path, required=True)
    ask.add_argument("--model", default="embedded")
    ask.add_argument("--data", default="embedded")
    ask.add_argument("--recipe", default=None, help="JSON of what the base says besides")
    ask.add_argument("--steps", type=int, default=512)
    ask.add_argument("--lr", type=float, default=1e-3)
    ask.add_argument("--blocks", type=int, default=1)
    ask.add_argument("--minutes", type=float, default=1e9)
    ask.add_argument("--device", default="cpu")
    ask.add_argument("--prompt", type=int, default=256)
    ask.add_argument("--batch-size", type=int, default=1)
    ask.add_argument("--only", default="", help="rows, with ; between them")
    said = ask.parse_args()
    started, text = time.perf_counter(), "embedded"
    train = {"source": said.data, "split": "train"} if said.data == "embedded" else said.data
    base = {
        "model": said.model,
        "device": said.device,
        "dtype": "float32",
        "calibrate": {"data": train, "samples": 256, "length": 512, "batch_size": 32},
        "retrain": {
            "train": ["full"], "data": train, "steps": said.steps, "batch_size": 16, "length": 512, "lr": said.lr,
            "distill": {"weight": 0.5},
        },
        "evaluate": {"window": 512, "batch_size": 16, "data": {"test": {"source": text, "split": "test"}}},
    }  # fmt: skip
    base = merge(base, read_json(said.recipe) if said.recipe else {})
    words = {"source": text, "split": "train", "part": [0.0, 0.5]}
    how = {"device": said.device, "prompt": said.prompt, "batch_size": said.batch_size}
    found: dict[str, Any] = read_json(said.out / "rows.json") if (said.out / "rows.json").exists() else {}
    for name, each in rows_of(said.blocks, words).items():
        late = time.perf_counter() - started > 60 * said.minutes
        if name in found or late or (said.only and name not in said.only.split(";")):
            continue
        found[name] = row(name, base, each, said.out, how)
        write_json(said.out / "rows.json", found)
    (said.out / "table.md").write_text(markdown_table(_shown(list(found.values()))))


def _shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first = rows[0]
    return [
        {
            "model": each["model"],
            "perplexity": next(iter(each["before"].values())),
            "retrained": next(iter(each["after"].values())) if each["after"] else None,
            "16 bits, MB": each["file"] / 1e6,
            "packed, MB": each["packed"] / 1e6,
            "prefill": f"{each['prefill']:,.0f} ({each['prefill'] / first['prefill']:.2f}×)",
            "decode": f"{each['decode']:,.0f} ({each['decode'] / first['decode']:.2f}×)",
        }
        for each in rows
    ]


if __name__ == "__main__":
    main()
