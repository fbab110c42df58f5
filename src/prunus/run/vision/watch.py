"""What looks at a network while it is trained: its accuracy every so many epochs, as a line of a log."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from prunus.report import append_metrics, read_metrics
from prunus.run.vision import stages
from prunus.run.vision.setting import Setting
from prunus.train import During, Plan, Substituted

__all__ = ["watchers"]


def watchers(setting: Setting, log: Path | None, model: nn.Module, method: During | None = None) -> list[During]:
    """What measures the network while it is trained, as `train.evaluate_every` says; nothing without a log."""
    return [_Watch(model, method, setting, log)] if log is not None and setting.recipe.train.evaluate_every else []


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
