"""BatchNorm statistics counted anew, for a network whose weights were changed: pruned, averaged, merged.

Mean and variance of each BatchNorm's inputs are pooled over everything that it sees, as if it were one batch:

    n = n_a + n_b     mean = mean_a + d n_b / n     M2 = M2_a + M2_b + d^2 n_a n_b / n,     d = mean_b - mean_a

(Chan et al. 1979). A running average with momentum would remember what it replaces, and weigh the last batches most.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.blocks import uncompiled
from prunus.machine import Precision, autocast, hooked, in_mode


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Any], *, precision: Precision = "fp32") -> int:
    """Set all running statistics of `model` to those of `batches` (x, or tuples that begin with x); gives images seen.

    BatchNorms normalise by each batch's own statistics meanwhile, as in training; all else, dropout too, is as in
    evaluation. running_mean is the pooled mean, running_var the pooled unbiased variance, float64 sums; a BatchNorm
    that no batch reaches keeps its own. Modes, momentum and weights stay. Several processes count each for itself.
    Source: Li et al. 2020 (EagleEye: adaptive batch normalization); pooled here, where they keep the momentum.
    Raises, with the statistics as they were: ValueError for no batches, FloatingPointError for inputs that are not
    finite. A model without running statistics sees no image.

    >>> model = nn.Sequential(nn.BatchNorm1d(2))
    >>> recalibrate_(model, [torch.tensor([[0.0, 1.0], [2.0, 1.0]])]), model[0].running_mean.tolist()
    (2, [1.0, 1.0])
    """
    norms = {
        name: each for name, each in model.named_modules() if isinstance(each, _BatchNorm) and each.track_running_stats
    }
    if not norms:
        return 0
    device, images, seen = _device(norms), 0, 0
    with _counting(model, norms) as pooled, uncompiled(model) as plain, autocast(device, precision):
        for batch in batches:
            x: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
            plain(x.to(device))
            images, seen = images + len(x), seen + 1
    if not seen:
        raise ValueError("BatchNorm cannot be recalibrated from no batch; give at least one (a share above 0)")
    _check(pooled)
    for name, norm in norms.items():
        if name in pooled:
            _write_(norm, pooled[name], seen)
    return images


@dataclass
class _Pooled:
    count: int
    mean: Tensor  # (channels,) float64
    squares: Tensor  # (channels,) float64: sum of squared distances to the mean

    def add_(self, other: _Pooled) -> None:
        total, apart = self.count + other.count, other.mean - self.mean
        self.mean += apart * (other.count / total)
        self.squares += other.squares + apart.square() * (self.count * other.count / total)
        self.count = total


@contextmanager
def _counting(model: nn.Module, norms: dict[str, _BatchNorm]) -> Generator[dict[str, _Pooled], None, None]:
    """What each BatchNorm receives while it normalises by the batch and leaves its running statistics alone."""
    pooled: dict[str, _Pooled] = {}

    def watch(name: str) -> Any:
        def count(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            other = _pool(inputs[0])
            if name in pooled:
                pooled[name].add_(other)
            else:
                pooled[name] = other

        return count

    try:
        with in_mode(model, training=False), hooked((norm, watch(name)) for name, norm in norms.items()):
            for norm in norms.values():
                norm.training, norm.track_running_stats = True, False
            yield pooled
    finally:
        for norm in norms.values():
            norm.track_running_stats = True


def _pool(x: Tensor) -> _Pooled:
    """x: (B, channels, ...), any float dtype."""
    over = [place for place in range(x.ndim) if place != 1]
    variance, mean = torch.var_mean(x.float(), over, correction=0)
    count = x.numel() // x.shape[1]
    return _Pooled(count, mean.double(), variance.double() * count)


def _check(pooled: dict[str, _Pooled]) -> None:
    for name, each in pooled.items():
        if not bool(each.squares.isfinite().all()):
            raise FloatingPointError(f"'{name}' received NaN or infinite inputs: its statistics cannot be counted")


def _device(norms: dict[str, _BatchNorm]) -> torch.device:
    mean = next(iter(norms.values())).running_mean
    assert mean is not None
    return mean.device


def _write_(norm: _BatchNorm, pooled: _Pooled, batches: int) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.copy_(pooled.mean)
    norm.running_var.copy_(pooled.squares / max(1, pooled.count - 1))
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.fill_(batches)
