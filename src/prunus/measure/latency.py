"""How long a forward pass takes on the machine at hand, as it is run: not in theory."""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor, nn

from prunus.machine import Precision, autocast, in_mode

_WARM = 3


@torch.no_grad()
def latency(model: nn.Module, x: Tensor, *, precision: Precision = "fp32", repeats: int = 20) -> float:
    """The median seconds of a forward pass over the batch x (B, ...), in eval mode, on the device of both.

    Zeros in a weight save no time on dense hardware, and none is pretended here. A GPU is waited for before and after
    each pass, and what else runs on the machine counts. Raises ValueError for repeats below 1.

    >>> latency(nn.Linear(4, 4), torch.zeros(2, 4), repeats=3) > 0
    True
    """
    if repeats < 1:
        raise ValueError(f"latency needs at least 1 repeat; got {repeats}")
    found: list[float] = []
    with in_mode(model, training=False), autocast(x.device, precision):
        for _ in range(_WARM + repeats):
            started = _now(x.device)
            model(x)
            found.append(_now(x.device) - started)
    return statistics.median(found[_WARM:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
