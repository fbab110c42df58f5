"""Means of the weights of one run, which take their place at the end.

    Ema   mean <- decay * mean + (1 - decay) * weights                 after every step
    Swa   mean <- mean + (weights - mean) / n       of n snapshots     (Izmailov et al. 2018, algorithm 1)

The formulas are `torch.optim.swa_utils`'; its AveragedModel is not used, because it asks the device at every update,
which no captured step may. Soups, whose members are several runs, are in `soup`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from prunus.train.hooks import During, Plan


class Ema(During):
    """The exponential moving average of all parameters and floating buffers; `finish` writes it into the model.

    decay: share of the old mean that stays in each step, in (0, 1). It starts at the weights after the first step.
    Entries that a mask holds at zero from the start are zero in the mean; beside a method that prunes meanwhile, call
    `finish` before that one's, which zeroes what the mean has there. Raises ValueError for another decay.

    >>> ema, optimizer = Ema(0.999), torch.optim.SGD(model.parameters(), lr=0.1)
    >>> trace = train(model, batches, optimizer, linear_warmup_decay(100), steps=100, during=[ema])
    >>> ema.finish()
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"Ema's decay lies in (0, 1); got {decay}. 0.999 averages about 1,000 steps.")
        self.decay, self.move_ = decay, get_ema_multi_avg_fn(decay)

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Start the mean at the model as it is."""
        self.followed = _floating(model)
        self.means = _buffers(tensor.to(_wide(tensor), copy=True) for tensor in self.followed)

    def follow(self) -> None:
        """Move the mean towards the weights by 1 - decay."""
        means = tuple(self.means.buffers())
        self.move_(means, _cast(self.followed, means), 0)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After the first step the mean is the weights."""
        if step == 0:
            for mean, tensor in zip(self.means.buffers(), self.followed, strict=True):
                mean.copy_(tensor)

    def finish(self) -> None:
        """Write the mean into the model."""
        _write_(self.followed, self.means)


class Swa(During):
    """The uniform mean of snapshots of all parameters and floating buffers; `finish` writes it into the model.

    start: share of the run before the first snapshot, in [0, 1). every: steps between snapshots; None: the
    `epoch_steps` that `train` was told. The first snapshot is taken after the step that completes the share.
    Zeros that are zero in every snapshot stay +0.0, so let the masks be final before `start`; call `finish` before that
    of a method that prunes. BatchNorm's statistics do not fit a mean of weights: `batchnorm.recalibrate_` afterwards.
    Raises ValueError for a start or a distance outside its range.

    >>> swa = Swa(start=0.5, every=10)
    >>> layer, x = nn.Linear(2, 1), torch.ones(1, 2)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> trace = train(layer, lambda step: x, optimizer, lambda step: 1.0, steps=20,
    ...               loss=lambda layer, x: layer(x).sum(), during=[swa])
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
        self.move_ = get_swa_multi_avg_fn()

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Note the tensors that are followed, and when."""
        self.first = max(1, round(self.start * plan.steps))
        self.distance = self.every or plan.epoch_steps
        self.followed = _floating(model)
        self.means = _buffers(torch.zeros_like(tensor, dtype=_wide(tensor)) for tensor in self.followed)
        self.register_buffer("taken", torch.zeros((), dtype=torch.int64))

    def after_step(self, step: int) -> None:
        """Add a snapshot to the mean when it is time."""
        past = step + 1 - self.first
        if past < 0 or past % self.distance:
            return
        number, means = past // self.distance, tuple(self.means.buffers())
        self.move_(means, _cast(self.followed, means), number)
        self.taken.fill_(number + 1)

    def finish(self) -> None:
        """Write the mean into the model; a run that was cut short before the first snapshot leaves it as it is."""
        if int(self.taken):
            _write_(self.followed, self.means)


def _floating(model: nn.Module) -> list[Tensor]:
    everything = (*model.parameters(), *model.buffers())
    return [tensor.detach() for tensor in everything if tensor.is_floating_point()]


def _wide(tensor: Tensor) -> torch.dtype:
    """What a mean is kept in: a 16-bit one would not move by a thousandth of its distance."""
    return torch.promote_types(tensor.dtype, torch.float32)


def _cast(tensors: Sequence[Tensor], means: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(each.to(mean.dtype) for each, mean in zip(tensors, means, strict=True))


def _buffers(tensors: Iterable[Tensor]) -> nn.Module:
    """A module of so many buffers, which checkpoints save."""
    held = nn.Module()
    for place, tensor in enumerate(tensors):
        held.register_buffer(f"mean{place}", tensor)
    return held


@torch.no_grad()
def _write_(followed: Sequence[Tensor], means: nn.Module) -> None:
    for tensor, mean in zip(followed, means.buffers(), strict=True):
        tensor.copy_(mean)
