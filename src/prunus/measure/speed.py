"""How fast a model is on the machine at hand, measured, not counted: a forward pass, and how a language model answers.

prefill   all tokens of a prompt in one pass: limited by products
decode    one token after another, each by a pass over the keys and values so far: limited by memory or launching
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import Timer
from typing import Any

import torch
from torch import Tensor, nn

from prunus.blocks import longest
from prunus.machine import Precision, autocast, in_mode

_PEAK = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux: written to, the peak begins anew
_RUNS = 3  # at least, after one that warms up
_WARM = 3  # forward passes of `latency` that are not counted


@dataclass(frozen=True)
class Speed:
    """Tokens a second of both phases (medians; of all sequences of a batch together), and memory in bytes.

    spread: the larger interquartile range of the two, as a share of its median. weights: of parameters and buffers.
    peak: on a GPU what tensors took at most, on Linux what the process did; None elsewhere.
    """

    prefill: float
    decode: float
    spread: float
    weights: int
    peak: int | None


@torch.no_grad()
def speed(
    model: Any,
    *,
    prompt: int = 512,
    tokens: int = 32,
    batch_size: int = 1,
    seconds: float = 2.0,
    precision: Precision = "fp32",
) -> Speed:
    """The Speed of a causal language model of transformers where it is, in eval mode.

    prompt: tokens that are read at once, the same random ones for models of one vocabulary. tokens: that are decoded
    after them, greedily, by a plain loop with a cache. seconds: how long each phase is repeated, at least 3 times.
    Scattered zeros save no time, and none is pretended. What else runs on the machine counts.

    Raises ValueError for counts below 1, and for a prompt and tokens beyond the model's length.

    >>> speed(model, prompt=4, tokens=2, seconds=0.01).decode > 0
    True
    """
    check_pace(model, prompt, tokens, batch_size)
    device = next(model.parameters()).device
    words = model.get_input_embeddings().num_embeddings
    ids = torch.randint(words, (batch_size, prompt), generator=torch.Generator().manual_seed(0)).to(device)

    def read() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def write(begun: Any) -> None:
        for _ in range(tokens):
            last = begun.logits[:, -1:].argmax(-1)
            begun = model(input_ids=last, past_key_values=begun.past_key_values, use_cache=True)

    _begin_peak(device)
    with in_mode(model, training=False), autocast(device, precision):
        clock = partial(_now, device)
        prefill = _timed(Timer("read()", "pass", clock, {"read": read}), seconds)
        decode = _timed(Timer("write(begun)", "begun = read()", clock, {"read": read, "write": write}), seconds)
    return Speed(
        batch_size * prompt / statistics.median(prefill),
        batch_size * tokens / statistics.median(decode),
        max(_spread(each) for each in (prefill, decode)),
        sum(each.nbytes for each in (*model.parameters(), *model.buffers())),
        _peak(device),
    )


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


def check_pace(model: Any, prompt: int, tokens: int, batch_size: int) -> None:
    """Raise ValueError for what `speed` would; the model may be empty.

    >>> check_pace(model, 4, 2, 1)
    """
    for name, value in {"prompt": prompt, "tokens": tokens, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    most = longest(model.config) or math.inf
    if prompt + tokens > most:
        raise ValueError(f"prompt {prompt} and {tokens} tokens are more than the model's {most}; give fewer")


def _timed(timer: Timer, seconds: float) -> list[float]:
    """The seconds of each run; the setup is made anew for each, because a run fills the cache, and is not counted."""
    timer.timeit(1)
    found: list[float] = []
    while len(found) < _RUNS or sum(found) < seconds:
        found.append(timer.timeit(1))
    return found


def _spread(found: Sequence[float]) -> float:
    """The interquartile range as a share of the median."""
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return (high - low) / middle


def _begin_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):
        _PEAK[0].write_text("5")


def _peak(device: torch.device) -> int | None:
    """Bytes at most since `_begin_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        line = next((line for line in _PEAK[1].read_text().splitlines() if line.startswith("VmHWM")), None)
        return None if line is None else int(line.split()[1]) * 1024
    return None


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
