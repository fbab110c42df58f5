"""Stochastic weight averaging: the mean of snapshots of one run, taken every so often towards its end.

    mean_n = mean_(n-1) + (weights - mean_(n-1)) / n     (Izmailov et al. 2018, algorithm 1)

The baseline of one run for soups, whose members are several runs. A running mean that forgets is in `ema`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.train.hooks import During, Plan

__all__ = ["Swa"]


class Swa(During):
    """The uniform mean of snapshots of all parameters and floating buffers; `finish` writes it into the model.

    start: share of the run before the first snapshot, in [0, 1). every: steps between snapshots; None: the
    `epoch_steps` that `train` was told. The first snapshot is taken after the step that completes the share.
    Zeros that are zero in every snapshot stay +0.0, so let the masks be final before `start`; call `finish` before that
    of a method that prunes. BatchNorm's statistics do not fit a mean of weights: `batchnorm.recalibrate_` afterwards.
    Raises ValueError for a start or a distance outside its range.

    >>> swa = Swa(start=0.5, every=10)
    >>> train(model, batches, optimizer, lr, steps=100, during=[swa])
    >>> swa.finish()
    """

    taken: Tensor  # snapshots in the mean, int64 on the CPU

    def __init__(self, start: float = 0.75, every: int | None = None) -> None:
        super().__init__()
        if not 0 <= start < 1:
            raise ValueError(f"Swa's start is a share of the run, in [0, 1); got {start}")
        if every is not None and every < 1:
            raise ValueError(f"Swa's every is a number of steps, at least 1; got {every}")
        self.start, self.every = start, every

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Note the tensors that are followed, and when."""
        self.first = max(1, round(self.start * plan.steps))
        self.distance = self.every or plan.epoch_steps
        everything = [*model.parameters(), *model.buffers()]
        self.followed = [tensor.detach() for tensor in everything if tensor.is_floating_point()]
        self.means = nn.Module()
        for place, tensor in enumerate(self.followed):
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            self.means.register_buffer(f"mean{place}", torch.zeros_like(tensor, dtype=wide))
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Add a snapshot to the mean when it is time."""
        past = step + 1 - self.first
        if past < 0 or past % self.distance:
            return
        number = past // self.distance + 1
        for mean, tensor in zip(self.means.buffers(), self.followed, strict=True):
            mean.lerp_(tensor.to(mean.dtype), 1 / number)
        self.taken.fill_(number)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the mean into the model; a run that was cut short before the first snapshot leaves it as it is."""
        if int(self.taken) == 0:
            return
        for tensor, mean in zip(self.followed, self.means.buffers(), strict=True):
            tensor.copy_(mean)
