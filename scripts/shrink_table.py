"""Zeros, smaller files and smaller models in one table: perplexity, without and with retraining, beside measured speed.

    python scripts/shrink_table.py recipes/smaller/embedded.yaml --out docs/results/smaller/embedded [--workers 5]
    python scripts/shrink_table.py recipes/smaller/smollm2.yaml --out docs/results/smaller/smollm2 --blocks 4

The recipe says model, texts and retraining; every row is a run of it with other sections, in a process of a pool that
is spread over the GPUs. What is finished stands in OUT.json, from which the same command goes on; models lie in --work.
At the end, alone on the machine, one model of each shape is timed on the GPU (bfloat16) and on the CPU (float32), and
OUT.md and OUT.png are made. Baselines are made here: blocks by angular distance (Gromov et al. 2024), neurons by the
norms of their columns, or of these times what they receive.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.blocks import embed, find_blocks, run_block
from prunus.jobs.folder import device_name, device_of
from prunus.language import stages
from prunus.language.single import compress
from prunus.language.texts import calibration_windows
from prunus.machine import read_json, write_json, write_text
from prunus.measure import speed
from prunus.recipe import LanguageRecipe, merge, parse
from prunus.recipe.plain import read_yaml, yaml_value
from prunus.report import markdown_table, plot_speeds
from prunus.save import is_whole, load_model, save_model
from prunus.score import Criterion
from prunus.shrink import remove_blocks, remove_neurons
from prunus.stream import Memory

log = logging.getLogger(__name__)
ADMM = {"refit": {"of": "admm"}}
NOTHING = {"criterion": "magnitude", "sparsity": 0.0}


def rows_of(blocks: int, heads: float, width: bool) -> dict[str, dict[str, Any]]:
    """Row -> what its recipe says beside the base: `shrink` or `prune`, or which baseline makes it."""
    zeros, two_four = {"criterion": ADMM, "sparsity": 0.6}, {"criterion": ADMM, "pattern": "2:4"}
    few = {"neurons": 0.25, "blocks": blocks}
    return {
        "dense": {"prune": NOTHING, "retrain": None},
        "25 % of neurons": {"shrink": {"neurons": 0.25}},
        f"{2 * blocks} of blocks": {"shrink": {"blocks": 2 * blocks}},
        "60 % zeros": {"prune": zeros},
        "2:4": {"prune": two_four},
        f"25 % of neurons, {blocks} of blocks": {"shrink": few},
        "50 % of neurons": {"shrink": {"neurons": 0.5}},
        f"{2 * blocks} of blocks, by angle": {"baseline": "angle", "count": 2 * blocks},
        "50 % of neurons, by magnitude": {"baseline": "magnitude", "share": 0.5},
        "words": {"shrink": {"vocabulary": None}},
        f"{blocks} of blocks": {"shrink": {"blocks": blocks}},
        **({f"{heads:.0%} of heads".replace("%", " %"): {"shrink": {"heads": heads}}} if heads else {}),
        f"25 % of neurons, {blocks} of blocks, words": {"shrink": {**few, "vocabulary": None}},
        "25 % of neurons, 60 % zeros": {"shrink": {"neurons": 0.25}, "prune": zeros},
        "50 % of neurons, 2:4": {"shrink": {"neurons": 0.5}, "prune": two_four},
        f"50 % of neurons, {2 * blocks} of blocks": {"shrink": {"neurons": 0.5, "blocks": 2 * blocks}},
        "25 % of neurons, by magnitude": {"baseline": "magnitude", "share": 0.25},
        f"{blocks} of blocks, by angle": {"baseline": "angle", "count": blocks},
        "25 % of neurons, by Wanda": {"baseline": "wanda", "share": 0.25},
        "50 % of neurons, by Wanda": {"baseline": "wanda", "share": 0.5},
        **({"25 % of width": {"shrink": {"width": 0.25}}} if width else {}),
        "dense, retrained": {"prune": NOTHING},
    }


def rows_of_experts() -> dict[str, dict[str, Any]]:
    """The same for a model of experts."""
    zeros = {"criterion": ADMM, "sparsity": 0.6}
    return {
        "dense": {"prune": NOTHING, "retrain": None},
        "25 % of experts": {"shrink": {"experts": 0.25}},
        "50 % of experts": {"shrink": {"experts": 0.5}},
        "60 % zeros": {"prune": zeros},
        "50 % of experts, 60 % zeros": {"shrink": {"experts": 0.5}, "prune": zeros},
        "1 of blocks": {"shrink": {"blocks": 1}},
        "dense, retrained": {"prune": NOTHING},
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
    if is_whole(folder):
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


def quality(name: str, base: dict[str, Any], said: dict[str, Any], work: Path) -> dict[str, Any]:
    """The perplexities and sizes of one row, from its run."""
    started, folder = time.perf_counter(), folder_of(work, name)
    raw = {**base, "out": str(folder), **{key: said[key] for key in ("prune", "shrink", "retrain") if key in said}}
    if "shrink" not in said:
        raw = {key: value for key, value in raw.items() if key != "shrink"}
    elif "vocabulary" in said["shrink"]:
        raw["shrink"] = {**said["shrink"], "vocabulary": base["shrink"]["vocabulary"]}
    if "baseline" in said:
        start = work / f"{folder.name}-start"
        baseline(parse({**raw, "retrain": None}, LanguageRecipe, name), said, start)
        raw |= {"model": str(start), "prune": NOTHING}
        raw["retrain"] = merge(raw["retrain"], {"distill.teacher": base["model"]})
    recipe = parse(raw, LanguageRecipe, name)
    found = compress(recipe)
    shown = {"before": "pruned", "after": "merged"}
    perplexity = {key: found["perplexity"][stage] for key, stage in shown.items() if stage in found["perplexity"]}
    half = load_model(folder / "model", torch.bfloat16)
    saved = save_model(half, None, folder / "packed", masks=None, info={}, packed="zstd")
    tokens = 0 if recipe.retrain is None else recipe.retrain.steps * recipe.retrain.step_tokens
    return {
        "model": name,
        **perplexity,
        "tokens": tokens,
        "parameters": sum(each.numel() for each in half.parameters()),
        "file": saved.dense_bytes,
        "packed": saved.weight_bytes,
        "shapes": sorted([key, list(each.shape)] for key, each in half.state_dict().items()),
        "shrink": found.get("shrink"),
        "hardware": device_name(device_of(recipe)),
        "seconds": time.perf_counter() - started,
    }


def folder_of(work: Path, name: str) -> Path:
    return work / name.replace("%", "percent").replace(" ", "-").replace(",", "").replace(":", "-")


def begin_worker(workers: int) -> None:
    """One GPU for each process of the pool, in turn, and a share of the cores."""
    if torch.cuda.device_count():
        torch.cuda.set_device((get_context().current_process()._identity[-1] - 1) % torch.cuda.device_count())
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


def measured(folder: Path, device: str, said: argparse.Namespace) -> dict[str, Any]:
    model = load_model(folder / "model", torch.bfloat16 if device == "cuda" else torch.float32).to(device)
    return vars(speed(model, prompt=said.prompt, tokens=32, batch_size=said.batch_size, seconds=said.seconds))


def main() -> None:
    ask = argparse.ArgumentParser()
    ask.add_argument("recipe", type=Path)
    ask.add_argument("--out", type=Path, required=True, help="results: OUT.json, OUT.md")
    ask.add_argument("--work", type=Path, default=Path("runs/smaller"), help="runs and models")
    ask.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="of the recipe")
    ask.add_argument("--blocks", type=int, default=1)
    ask.add_argument("--heads", type=float, default=0.0)
    ask.add_argument("--width", action="store_true", help="a row with fewer entries of hidden states, too")
    ask.add_argument("--experts", action="store_true", help="the rows of a model of experts")
    ask.add_argument("--only", default="", help="rows, with ; between them")
    ask.add_argument("--minutes", type=float, default=1e9, help="no row begins later")
    ask.add_argument("--workers", type=int, default=1)
    ask.add_argument("--prompt", type=int, default=256)
    ask.add_argument("--batch-size", type=int, default=1)
    ask.add_argument("--seconds", type=float, default=1.0, help="of timing each phase")
    said = ask.parse_args()
    logging.basicConfig(level=logging.INFO)
    base = merge(
        read_yaml(said.recipe), {key: yaml_value(each, key) for key, each in (s.split("=", 1) for s in said.set)}
    )
    work, file = said.work / said.recipe.stem, said.out.with_suffix(".json")
    rows: dict[str, Any] = {each["model"]: each for each in read_json(file)} if file.exists() else {}
    asked = rows_of_experts() if said.experts else rows_of(said.blocks, said.heads, said.width)
    fill(
        rows, {name: each for name, each in asked.items() if not said.only or name in said.only.split(";")}, base, said
    )
    for device in ("cuda", "cpu") if torch.cuda.is_available() else ("cpu",):
        time_(rows, device, work, said)
        write_json(file, [rows[name] for name in asked if name in rows])
    shown = [rows[name] for name in asked if name in rows]
    draw(shown, said.out.with_suffix(".png"))
    write_text(said.out.with_suffix(".md"), markdown_table([shown_row(each, shown[0]) for each in shown]) + "\n")


def fill(rows: dict[str, Any], asked: dict[str, Any], base: dict[str, Any], said: argparse.Namespace) -> None:
    """Make the rows that are missing; each is on disk once it is made."""
    started, work, file = time.perf_counter(), said.work / said.recipe.stem, said.out.with_suffix(".json")
    missing = {name: each for name, each in asked.items() if name not in rows}
    pool = ProcessPoolExecutor(said.workers, get_context("spawn"), begin_worker, (said.workers,))
    with pool:
        jobs = {pool.submit(quality, name, base, each, work): name for name, each in missing.items()}
        for job in as_completed(jobs):
            if not job.cancelled():
                rows[jobs[job]] = job.result()
                write_json(file, list(rows.values()))
                log.info("%.0f s: %s", time.perf_counter() - started, jobs[job])
            if time.perf_counter() - started > 60 * said.minutes:
                for each in jobs:
                    each.cancel()


def time_(rows: dict[str, Any], device: str, work: Path, said: argparse.Namespace) -> None:
    """Give each row the speed of the first one of its shapes: where weights are zero changes no time."""
    known = {str(each["shapes"]): each[device] for each in rows.values() if device in each}
    for name, each in rows.items():
        shapes = str(each["shapes"])
        if device not in each and shapes not in known and is_whole(folder_of(work, name) / "model"):
            known[shapes] = measured(folder_of(work, name), device, said)
        if shapes in known:
            each[device] = known[shapes]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity after retraining against decoding, on the GPU where there is one."""
    device = "cuda" if any("cuda" in row for row in rows) else "cpu"
    points = [
        {
            "model": row["model"],
            "kind": kind_of(row["model"]),
            "perplexity": list((row["after"] if "after" in row else row["before"]).values())[-1],
            "speed": row[device]["decode"],
            "bytes": row["packed"],
        }
        for row in rows
        if device in row
    ]
    plot_speeds(points, path, device="GPU" if device == "cuda" else "CPU")


def kind_of(name: str) -> str:
    if name.startswith("dense"):
        return "dense"
    if ", by " in name:
        return "another method"
    zeros, fewer = "zeros" in name or "2:4" in name, "of " in name or "words" in name
    return "smaller, with zeros" if zeros and fewer else "zeros" if zeros else "smaller"


def shown_row(row: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    text = list(row["before"])[-1]
    found = {
        "model": row["model"],
        "perplexity": row["before"][text],
        "retrained": row["after"][text] if "after" in row else None,
        "parameters, M": row["parameters"] / 1e6,
        "16 bits, MB": row["file"] / 1e6,
        "packed, MB": row["packed"] / 1e6,
    }
    for device, name in (("cuda", "GPU"), ("cpu", "CPU")):
        for phase in ("prefill", "decode"):
            if device in row and device in dense:
                ratio = row[device][phase] / dense[device][phase]
                found[f"{phase}, {name}"] = f"{row[device][phase]:,.0f} ({ratio:.2f}×)"
    return found


if __name__ == "__main__":
    main()
