"""`prunus run` of a classifier: a run in a folder that resumes, with its network, numbers and picture.

    out/recipe.yaml      the resolved recipe          out/metrics.jsonl      what was measured, also while it trained
    out/result.json      what the table shows         out/model.safetensors  the network; masks.safetensors, prunus.json
    out/dense/           the dense training           out/report.png         loss, learning rate, accuracy by stage

A killed run goes on from out/work, which is gone when the run is done.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from prunus import __version__
from prunus.machine import read_json, write_json, write_text
from prunus.masks import Masks
from prunus.measure import Energy
from prunus.report import append_metrics, append_once, plot_run, progress, read_metrics
from prunus.run.folder import begin, finished, held, ran_on
from prunus.run.recipe import ClassifierRecipe, digest, merge, parse, read_yaml, said
from prunus.run.vision import stages
from prunus.run.vision.dense import dense_key, read_dense, write_state
from prunus.run.vision.experiment import Outcome, experiment
from prunus.run.vision.setting import Setting
from prunus.save import FORMAT, INFO_NAME, MASKS_NAME
from prunus.train import During, Plan, Substituted

__all__ = ["begin_classifier", "begun", "describe", "prune_run", "pruning_of", "train_run"]

log = logging.getLogger(__name__)

_RATES = 400  # learning rates in a picture


def train_run(recipe: ClassifierRecipe, *, dense: Path | None = None) -> dict[str, Any]:
    """The result of a run (the content of `out/result.json`); a finished run is read, a killed one goes on.

    dense: a folder with a finished dense training to start from; `out/dense` if left out.
    Raises ValueError when `out` holds another recipe's run, and for images or a device that are not there.
    """
    with begun(recipe, "report.png") as (out, key, found):
        if found is not None:
            if not (out / "report.png").exists():
                _plot(out, recipe, found, {}, dense or out / "dense")
            return found
        setting = begin_classifier(recipe, key)
        with Energy() as energy:
            outcome = experiment(
                setting,
                dense or out / "dense",
                work=out / "work",
                bar=progress,
                watch=lambda model, method: _watchers(model, method, setting, out / "metrics.jsonl"),
            )
        result = {"key": key, "model": recipe.model, **ran_on(out, setting.name), **outcome.result}
        result["joules"] = energy.joules
        _write(out, recipe, outcome, result, dense or out / "dense")
        return result


@contextmanager
def begun(recipe: ClassifierRecipe, picture: str) -> Generator[tuple[Path, str, dict[str, Any] | None]]:
    """The folder of a run, the hash of its recipe, and its result if it is finished; the folder is held meanwhile.

    At the end nothing is left there that only a killed run needs. Raises ValueError when the folder holds another
    recipe's run, finished or not, or another process has it.
    """
    out, key = Path(recipe.out), digest(said(recipe, but={"out"}))
    left = ("model.safetensors", INFO_NAME)
    found = finished(recipe, out, key, left)
    if found is not None:
        log.warning("%s is finished: nothing is repeated", out)
        if (out / picture).exists() and not (out / "work").exists():
            yield out, key, found
            return
    _check_work(out, key)
    with held(out):
        yield out, key, finished(recipe, out, key, left)  # who had it until now may have ended it
        shutil.rmtree(out / "work", ignore_errors=True)


def begin_classifier(recipe: ClassifierRecipe, key: str) -> Setting:
    """The setting of a run whose folder is begun: what cannot be run is refused before anything is written."""
    setting = Setting.of(recipe)
    setting.new_model()
    begin(Path(recipe.out), recipe)
    write_text(Path(recipe.out) / "work" / "key", key)
    return setting


def pruning_of(run: Path, overrides: Mapping[str, Any], out: Path | None = None) -> ClassifierRecipe:
    """The recipe that prunes and retrains the dense network of a finished run, from dotted overrides of that run's.

    Raises FileNotFoundError for a folder without a run; ValueError for a run without a dense network, and for
    overrides that would change how it was trained.
    """
    if not (run / "recipe.yaml").exists():
        raise FileNotFoundError(f"{run} holds no run of a classifier: there is no recipe.yaml; run its recipe first")
    raw = read_yaml(run / "recipe.yaml")
    found = read_dense(run / "dense")
    if found is None or raw.get("during"):
        why = "its network was pruned while it was trained" if raw.get("during") else "its training is not finished"
        raise ValueError(f"{run} holds no dense network: {why}; give the folder of a finished dense training")
    raw = merge({**raw, "out": str(out or run / "pruned")}, dict(overrides))
    recipe = parse(raw, ClassifierRecipe, str(run))
    if recipe.prune is None:
        raise ValueError("nothing would be pruned: give --sparsity")
    if dense_key(recipe) != found.metrics["key"]:
        raise ValueError(f"{run} was trained otherwise: only prune, retrain, recalibrate and out can be set here")
    return recipe


def prune_run(recipe: ClassifierRecipe, run: Path) -> dict[str, Any]:
    """The result of pruning and retraining the dense network of `run`, as `pruning_of` made the recipe."""
    return train_run(recipe, dense=run / "dense")


def _check_work(out: Path, key: str) -> None:
    begun = out / "work" / "key"
    if begun.exists() and begun.read_text(encoding="utf-8") != key:
        raise ValueError(f"out: {out} holds an unfinished run of another recipe; give another folder, or delete it")


def _watchers(model: nn.Module, method: During | None, setting: Setting, log: Path) -> list[During]:
    every = setting.recipe.train.evaluate_every
    return [_Watch(model, method, setting, log)] if every else []


class _Watch(During):
    """Measures the network every so many epochs while it is trained, with the weights that a method gives it."""

    def __init__(self, model: nn.Module, method: During | None, setting: Setting, log: Path) -> None:
        super().__init__()
        self.seen = (model, method)  # a tuple, so that they do not become parts of this module
        self.setting, self.log = setting, log
        self.done = {row["epoch"] for row in read_metrics(log) if "epoch" in row} if log.exists() else set[int]()
        self.every = setting.recipe.train.evaluate_every * setting.epoch_steps

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Nothing is needed."""

    def after_step(self, step: int) -> None:
        """Measure after the last step of every `evaluate_every`-th epoch."""
        epoch = (step + 1) // self.setting.epoch_steps
        if (step + 1) % self.every or epoch in self.done:
            return
        model, method = self.seen
        with torch.no_grad():
            weights = {} if method is None else method.weights()
            found = stages.measure(Substituted(model, weights) if weights else model, self.setting)
        append_metrics(self.log, {"stage": "train", "epoch": epoch, **found})


def _write(out: Path, recipe: ClassifierRecipe, outcome: Outcome, result: dict[str, Any], dense: Path) -> None:
    """The network, its masks, its description, the picture; the result last, because it says that all is there."""
    for stage, found in result["stages"].items():
        append_once(out / "metrics.jsonl", {"stage": stage, **found})
    if "corrupted" in result:
        append_once(out / "metrics.jsonl", {"stage": "corrupted", **result["corrupted"]["mean"]})
    for found in result["phases"]:
        append_once(out / "metrics.jsonl", {"stage": "phase", **found})
    if recipe.save:
        describe(out, recipe, outcome.model, outcome.masks, result)
    _plot(out, recipe, result, outcome.trace, dense)
    write_json(out / "result.json", result)


def _plot(
    out: Path, recipe: ClassifierRecipe, result: Mapping[str, Any], trace: Mapping[str, Any], dense: Path
) -> None:
    """The picture; without the trace of a training during which a method pruned, losses are left out."""
    trace = trace or _trace(dense)
    shown = {name: 100 * found["top1"] for name, found in result["stages"].items()}
    plot_run(trace.get("losses", []), shown, out / "report.png", rates=_rates(trace), title=recipe.model)


def _trace(dense: Path) -> dict[str, Any]:
    path = dense / "trace.json"
    return read_json(path) if path.exists() else {}


def describe(
    out: Path, recipe: ClassifierRecipe, model: nn.Module, masks: Masks | None, result: Mapping[str, Any]
) -> None:
    """Write a network, its masks if it has any, and what it is: model.safetensors, masks.safetensors, prunus.json."""
    write_state(out / "model.safetensors", model)
    if masks is not None:
        masks.save(out / MASKS_NAME)
    numbers = {key: value for key, value in result.items() if key not in ("key", "by_layer")}
    versions = {"prunus": __version__, "torch": torch.__version__}
    info = {"format": FORMAT, "recipe": recipe.model_dump(mode="json"), "metrics": numbers, "versions": versions}
    kept = {"masks": MASKS_NAME if masks is not None else None}
    write_json(out / INFO_NAME, info | kept | {"sparsity": {"layers": result.get("by_layer", {})}})


def _rates(trace: Mapping[str, Any]) -> list[float]:
    whole = [value for value, length in trace.get("lrs", []) for _ in range(int(length))]
    return whole[:: max(1, len(whole) // _RATES)]
