"""The dense training that pruned networks start from: one folder, complete or absent, shared by all that need it.

model.safetensors   the network       epoch-N.safetensors   as it was after epoch N, for weight rewinding
trace.json          learning rates as (value, steps) runs, warm-up, mean loss of each epoch
metrics.json        what was measured, and how long it took
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from prunus.checkpoint import read_state
from prunus.frankwolfe import SFW
from prunus.machine import read_json, write_json, write_tensors
from prunus.recipe import ClassifierRecipe, digest, said
from prunus.report import append_metrics, read_metrics
from prunus.train import During, Original, Plan, Substituted
from prunus.vision import stages
from prunus.vision.setting import Setting

__all__ = [
    "Dense",
    "Snapshots",
    "adopt",
    "dense_key",
    "dense_of",
    "losses_by_epoch",
    "read_dense",
    "train_dense",
    "watchers",
]


@dataclass(frozen=True)
class Dense:
    """A finished dense training: what its learning rate did, and what was measured."""

    original: Original
    metrics: Mapping[str, Any]


def dense_of(recipe: ClassifierRecipe) -> ClassifierRecipe:
    """The recipe of the dense training that a pruned network starts from."""
    plain = {"during": None, "prune": None, "retrain": None, "soup": None, "recalibrate": 1.0, "corruptions": None}
    return recipe.model_copy(update=plain)


def dense_key(recipe: ClassifierRecipe) -> str:
    """Hash of what decides the dense training: recipes that agree on it share the run."""
    dense = dense_of(recipe)
    if dense.data.measure_on == "both":  # which trains on the images that "validation" trains on
        data = dense.data.model_copy(update={"measure_on": "validation"})
        dense = dense.model_copy(update={dense.keyed: data})
    return digest(said(dense, but={"out": True, "save": True, "train": {"evaluate_every"}}))[:24]


def train_dense(setting: Setting, folder: Path, *, checkpoint: Path, log: Path | None = None) -> Dense:
    """The dense training of a setting's recipe, written to `folder`.

    checkpoint: a file from which a killed training goes on. log: as of `watchers`.
    """
    model, left = setting.new_model(), _Left()
    if not setting.recipe.train.epochs:
        as_it_came = {"measured_on": setting.recipe.data.measured, "epochs": 0, "steps": 0, "seconds": 0.0}
        return _written(folder, model, setting, Original.of([setting.recipe.train.lr]), as_it_came)
    multiplier, warmup = stages.schedule(setting)
    trace = stages.fit(
        model,
        setting,
        multiplier,
        steps=setting.steps(setting.recipe.train.epochs),
        part=0,
        during=[Snapshots(model, folder, setting), left, *watchers(setting, log, model)],
        checkpoint=checkpoint,
    )
    steps, losses = len(trace.losses), losses_by_epoch(trace.losses, setting.epoch_steps)
    speed = steps * setting.recipe.train.batch_size / max(trace.seconds, 1e-9)
    numbers = {"measured_on": setting.recipe.data.measured, "epochs": setting.recipe.train.epochs, "steps": steps}
    numbers |= {"seconds": trace.seconds, "images_per_second": speed, **left.numbers()}
    return _written(folder, model, setting, Original.of(trace.lrs, warmup), numbers, losses=losses)


def adopt(setting: Setting, weights: Path, folder: Path) -> Dense:
    """A state dict that was trained elsewhere, written to `folder` as the dense training of the setting's recipe.

    weights: .safetensors, or what torch.save made of a state dict. Its learning rates are taken to be the recipe's.
    Raises ValueError for a file that is no state dict of the recipe's network, and a folder that holds another one.
    """
    model, key = setting.new_model(), dense_key(setting.recipe)
    model.load_state_dict(read_state(weights, model.state_dict()))
    known = hashlib.sha256(weights.read_bytes()).hexdigest()
    found = read_dense(folder)
    if found is not None:
        if (found.metrics["key"], found.metrics.get("adopted")) != (key, known):
            raise ValueError(f"{folder} holds another dense network; give another --out, or delete it")
        return found
    multiplier, warmup = stages.schedule(setting)
    steps = setting.steps(setting.recipe.train.epochs)
    original = Original.of([setting.recipe.train.lr * multiplier(step) for step in range(steps)], warmup)
    return _written(folder, model, setting, original, {"adopted": known, "epochs": 0, "steps": 0, "seconds": 0.0})


def _written(
    folder: Path,
    model: nn.Module,
    setting: Setting,
    original: Original,
    numbers: Mapping[str, Any],
    *,
    losses: Sequence[float] = (),
) -> Dense:
    """A finished dense network, written and measured; its numbers last, because they say that all is there."""
    write_tensors(folder / "model.safetensors", model.state_dict())
    write_json(folder / "trace.json", {"lrs": original.runs(), "warmup": original.warmup, "losses": losses})
    write_json(folder / "metrics.json", {"key": dense_key(setting.recipe), **stages.measure(model, setting), **numbers})
    made = read_dense(folder)
    assert made is not None
    return made


def read_dense(folder: Path) -> Dense | None:
    """The finished dense training in a folder, or None."""
    if not (folder / "metrics.json").exists():
        return None
    trace = read_json(folder / "trace.json")
    return Dense(Original.from_runs(trace["lrs"], trace["warmup"]), read_json(folder / "metrics.json"))


def losses_by_epoch(losses: Sequence[float], epoch_steps: int) -> list[float]:
    """The mean loss of each epoch."""
    parts = [losses[start : start + epoch_steps] for start in range(0, len(losses), epoch_steps)]
    return [sum(part) / len(part) for part in parts]


class _Left(During):
    """Notes how much of the initialisation Frank-Wolfe has left, in trainings by it."""

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Keep the optimizer, whose state knows."""
        self.optimizer = optimizer

    def numbers(self) -> dict[str, Any]:
        """left_of_start: prod (1 - s) over the steps."""
        left = self.optimizer.left() if isinstance(self.optimizer, SFW) else None
        return {} if left is None else {"left_of_start": left}


class Snapshots(During):
    """Keeps the network as it is after the epochs of `train.snapshots`; 0 is before the training."""

    def __init__(self, model: nn.Module, folder: Path, setting: Setting) -> None:
        super().__init__()
        self.network = [model]  # a list, so that its parameters do not become this module's
        self.folder = folder
        asked = setting.recipe.train.snapshots
        self.steps_of = {epoch * setting.epoch_steps - 1: epoch for epoch in asked}

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Keep the beginning, if that is asked for."""
        self.after_step(-1)

    def after_step(self, step: int) -> None:
        """Keep what is asked for."""
        epoch = self.steps_of.get(step)
        path = self.folder / f"epoch-{epoch}.safetensors"
        if epoch is not None and not path.exists():
            write_tensors(path, self.network[0].state_dict())


def watchers(setting: Setting, log: Path | None, model: nn.Module, method: During | None = None) -> list[During]:
    """What measures the network while it is trained, as `train.evaluate_every` says; nothing without a log."""
    return [_Watch(model, method, setting, log)] if log is not None and setting.recipe.train.evaluate_every else []


class _Watch(During):
    """Measures the network every so many epochs while it is trained, with the weights that a method gives it."""

    def __init__(self, model: nn.Module, method: During | None, setting: Setting, log: Path) -> None:
        super().__init__()
        self.seen = (model, method)  # a tuple, so that they do not become parts of this module
        self._setting, self.log = setting, log  # what it runs on may be another when it goes on
        self.done = {row["epoch"] for row in read_metrics(log) if "epoch" in row} if log.exists() else set[int]()
        self.every = setting.recipe.train.evaluate_every * setting.epoch_steps

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Nothing is needed."""

    def after_step(self, step: int) -> None:
        """Measure after the last step of every `evaluate_every`-th epoch."""
        epoch = (step + 1) // self._setting.epoch_steps
        if (step + 1) % self.every or epoch in self.done:
            return
        model, method = self.seen
        with torch.no_grad():
            weights = {} if method is None else method.weights()
            found = stages.measure(Substituted(model, weights) if weights else model, self._setting)
        append_metrics(self.log, {"stage": "train", "epoch": epoch, **found})
