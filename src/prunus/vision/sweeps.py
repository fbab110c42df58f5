"""A sweep: one finished dense training, many compression rates, kind by kind, measured right after pruning.

    dense ─▶ kind x rate ─▶ [pruned, BatchNorm counted anew, (retrained)] ─▶ accuracy, parameters, operations, latency

    out/sweep.json    everything      out/table.md, out/sweep.png    for people      out/points/    one file a point

    prunus grid sweep.yaml      sweep: {start: runs/dense, kinds: [filters], rates: [0.3, 0.5]}, base: {...}, out: ...

A killed sweep goes on: points that are finished are not repeated.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import Field
from torch import nn

from prunus.jobs import Job, Store, Workers, check_inputs, mark, run
from prunus.machine import read_json, write_json, write_text
from prunus.measure import latency
from prunus.recipe import ClassifierRecipe, Folder, Kind, Strict, Unfinished, digest, merge, parse, read_yaml, said
from prunus.report import markdown_table, plot_sweep
from prunus.vision import stages
from prunus.vision.dense import adopt, dense_key, dense_of
from prunus.vision.jobs import ClassifierJobs
from prunus.vision.outcome import outcome
from prunus.vision.plan import Plan
from prunus.vision.setting import Setting
from prunus.vision.train import pruning_of

__all__ = ["KINDS", "RATES", "Sweep", "SweepFile", "Swept", "load_sweep", "rows_of", "sweep", "sweep_of"]

KINDS: tuple[str, ...] = get_args(Kind)
_OF_POINTS = ("prune", "retrain", "recalibrate")  # what a state dict's recipe says of every point
RATES = (0.0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99)


@dataclass(frozen=True)
class Sweep:
    """What is swept: a recipe for each point, kind by kind and then rate by rate, the dense folder, the output folder.

    timed: images in a batch whose forward pass is timed.
    """

    points: tuple[ClassifierRecipe, ...]
    dense: Path
    out: Path
    timed: int = 128


class Swept(Strict):
    """What a file with the key `sweep` asks for.

    start: the folder of a finished run, or a file with a state dict. timed: images in a batch whose forward pass is
    timed.
    """

    start: Folder
    kinds: tuple[Kind, ...] = get_args(Kind)
    rates: tuple[float, ...] = RATES
    timed: int = Field(default=128, ge=1)


class SweepFile(Strict):
    """A sweep as YAML says it. base: keys of every point's recipe, and of a state dict the recipe of its network."""

    sweep: Swept
    base: dict[str, Any] = Field(default_factory=dict)
    out: Folder | None = None


def load_sweep(path: Path, out: Path | None = None) -> Sweep:
    """The checked sweep of a YAML file. Raises as `parse` and `sweep_of` do."""
    asked = parse(read_yaml(path) | ({"out": str(out)} if out else {}), SweepFile, str(path))
    return sweep_of(
        Path(asked.sweep.start),
        recipe=asked.base if "images" in asked.base else None,
        kinds=asked.sweep.kinds,
        rates=asked.sweep.rates,
        overrides=_dotted({k: v for k, v in asked.base.items() if "images" not in asked.base or k in _OF_POINTS}),
        out=None if asked.out is None else Path(asked.out),
        timed=asked.sweep.timed,
    )


def _dotted(raw: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The leaves of a nested mapping by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in raw.items():
        found |= _dotted(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return found


def sweep_of(
    source: Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    kinds: Sequence[str] = KINDS,
    rates: Sequence[float] = RATES,
    overrides: Mapping[str, Any] | None = None,
    out: Path | None = None,
    timed: int = 128,
) -> Sweep:
    """The sweep of a finished run's dense network, or of a state dict in a file, which needs the recipe of its network.

    kinds, rates: what becomes of the network, and how much of it goes. overrides: dotted keys of the points' recipes;
    nothing is retrained without `retrain` among them. A state dict is written to `out` as a dense training.
    Raises FileNotFoundError or ValueError for a source that is none, and for kinds, rates and keys that make no sense.
    """
    strange = [kind for kind in kinds if kind not in KINDS]
    if strange:
        raise ValueError(f"kinds: there is no {strange[0]!r}; there are {', '.join(KINDS)}")
    if not kinds or not rates or timed < 1:
        raise ValueError(f"a sweep needs a kind, a rate and an image to time; got {kinds=}, {rates=}, images={timed}")
    given = {"prune": {}, "retrain": None, "soup": None, **(overrides or {})}
    changes = [{**given, "prune.kind": kind, "prune.sparsity": rate} for kind in kinds for rate in rates]
    if source.is_dir():
        out = out or source / "sweep"
        if pruning_of(source, {**given, "prune.sparsity": rates[0]}, out).keyed != "images":
            raise ValueError(
                f"{source}: a sweep is of a network that looks at images; compare sparsities of an encoder of texts "
                "in a grid (axes: {zeros: {50 %: {prune.sparsity: 0.5}}})"
            )
        points = tuple(pruning_of(source, change, out) for change in changes)
        return Sweep(points, source / "dense", out, timed)
    if recipe is None or not source.is_file():
        found = "needs the recipe of its network as `base`" if source.is_file() else "is not there"
        raise ValueError(f"{source} {found}; give the folder of a finished run, or a state dict and its recipe")
    out = out or source.with_suffix("") / "sweep"
    points = tuple(
        parse(merge(dict(recipe), {"during": None, **change, "out": str(out)}), ClassifierRecipe, str(source))
        for change in changes
    )
    mark(out, "sweep")
    adopt(Setting.of(dense_of(points[0])), source, out / "dense")
    return Sweep(points, out / "dense", out, timed)


def sweep(asked: Sweep, workers: Workers = Workers()) -> dict[str, Any]:  # noqa: B008 - it is frozen
    """Everything measured, as `out/sweep.json` holds it; tables and pictures are written too.

    workers: who measures; what runs beside others takes longer, and latencies say so.
    Raises ValueError for images or devices that are not there, and for a dense folder of another training; Unfinished
    at the end when a point failed.
    """
    setting = Setting.anew(asked.points[0])
    mark(asked.out, "sweep")
    check_inputs(asked.out, asked.points)
    dense = setting.recipe.model_copy(update={"prune": None, "retrain": None})
    store = Store(asked.out, places={dense_key(dense): asked.dense.resolve()})
    jobs = ClassifierJobs(store, tuple(_job(asked, recipe) for recipe in (dense, *asked.points)), dense)
    if wrong := run([jobs], workers, name="sweep"):
        raise Unfinished(wrong[0])
    reference, *found = [jobs.store.result(job) for job in jobs.wanted]
    result = {
        "model": setting.recipe.model,
        "measured_on": setting.recipe.images.measure_on,
        "device": setting.name,
        "threads": torch.get_num_threads(),
        "timed_images": asked.timed,
        "dense": reference,
        "points": found,
    }
    write_json(asked.out / "sweep.json", result)
    write_text(asked.out / "table.md", markdown_table(rows_of(result)))
    plot_sweep(result, asked.out / "sweep.png")
    return result


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table: the dense network, then every point. Accuracies in percent, latencies in milliseconds."""
    stages_seen = list(dict.fromkeys(name for point in result["points"] for name in point["stages"] if name != "dense"))
    shown = {"pruned": result["dense"]["stages"]["dense"]}
    dense = {**result["dense"], "kind": "dense", "rate": 0.0, "stages": shown}
    return [_row(found, stages_seen) for found in (dense, *result["points"])]


def _row(found: Mapping[str, Any], stages_seen: Sequence[str]) -> dict[str, Any]:
    measured = {name: found["stages"].get(name) for name in stages_seen}
    return {
        "kind": found["kind"],
        "rate": f"{100 * found['rate']:g} %",
        **{name: None if each is None else f"{100 * each['top1']:.2f}" for name, each in measured.items()},
        "parameters": found["parameters"],
        "nonzero": found["nonzero"],
        "Mflop": found["sparse_flops"] / 1e6,
        **{f"{device}, ms": 1000 * seconds for device, seconds in found["latency"].items()},
    }


_COUNTED = ("dense_flops", "sparse_flops", "speedup", "parameters", "nonzero", "sparsity")


def _job(asked: Sweep, recipe: ClassifierRecipe) -> Job:
    """A point; the dense network is one that is not pruned."""
    key = digest([said(recipe, but={"out"}), asked.timed, _source(asked.dense)])[:24]
    return Job("points", key, partial(_point, recipe, asked.timed), Plan(recipe).jobs)


def _point(recipe: ClassifierRecipe, timed: int, job: Job, store: Store) -> dict[str, Any]:
    setting = Setting.of(recipe)
    found = outcome(Plan(recipe), store)
    result = found.result
    head = {} if recipe.prune is None else {"kind": recipe.prune.kind, "rate": recipe.prune.sparsity}
    counted = _whole(found.model, setting) | {name: result[name] for name in _COUNTED if name in result}
    return {
        **head,
        "accuracy": result["accuracy"],
        "stages": {name: {"top1": stage["top1"], "loss": stage["loss"]} for name, stage in result["stages"].items()},
        **counted,
        "epochs": 0.0 if recipe.retrain is None else result["phases"][-1]["epochs"],
        "left_alone": result.get("left_alone", {}),
        "latency": _latencies(found.model, setting, timed),
    }


def _source(dense: Path) -> str:
    """What tells one dense training from another in the same folder."""
    metrics = read_json(dense / "metrics.json")
    return digest(metrics)


def _whole(model: nn.Module, setting: Setting) -> dict[str, Any]:
    """The costs of a dense network."""
    flops, parameters = sum(stages.operations(setting).values()), sum(p.numel() for p in model.parameters())
    return {"sparse_flops": flops, "parameters": parameters, "nonzero": parameters}


def _latencies(model: nn.Module, setting: Setting, images: int) -> dict[str, float]:
    """Seconds of a forward pass over a batch, on the CPU in fp32 and, where the run has one, on its GPU."""
    batch = next(setting.measured())[0]
    batch = batch.repeat(-(-images // len(batch)), 1, 1, 1)[:images]
    found = {"CPU": latency(copy.deepcopy(model).cpu(), batch.cpu())}
    if setting.device.type == "cuda":
        found["GPU"] = latency(model, batch, precision=setting.precision)
    return found
