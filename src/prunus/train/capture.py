"""A training step recorded once as a CUDA graph and replayed: small networks are bound by launches, not by arithmetic.

    the first steps run as they are ─▶ one is recorded ─▶ every later one copies its batch in and replays it

Learning rates are tensors on the device while a step is captured, because a number would be recorded too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

_AHEAD = 8  # replays that may wait for the device: a recording waits for what all threads have queued by then
_WARM = 3  # steps that run as they are: cuDNN chooses its algorithms, the optimizer makes its state
# Two things wait for the whole device, which no thread may do while another records: the beginning of a recording, and
# cuDNN when it tries its algorithms, as it does the first time that it meets a shape.
_RECORDING = threading.RLock()
# One stream a device warms up and records for all threads, one at a time. It has a priority of its own because torch
# deals streams out of a pool for each priority, in turns: the 33rd is the first again, and may be the one on which
# another thread works.
_STREAMS: dict[int, torch.cuda.Stream] = {}


@contextmanager
def unrecorded() -> Generator[None]:
    """Context in which no other thread records a step: for work on a GPU that meets new shapes (an evaluation, say).

    >>> with unrecorded():
    ...     found = accuracy(model, batches)
    """
    with _RECORDING:
        yield


@contextmanager
def settled(device: torch.device | None) -> Generator[None]:
    """Context that ends, also by an exception, when the device has done what this thread gave it; None: at once.

    A graph's memory is free for other threads when the graph is dropped, whether or not it still runs.
    """
    try:
        yield
    finally:
        if device is not None:
            with suppress(RuntimeError):  # of a device that failed: the first error says more
                torch.cuda.current_stream(device).synchronize()


class CapturedStep:
    """`step(parts)` as a CUDA graph; parts: the tensors of a step, in lists, tuples or dicts, always of one shape.

    step: runs forward, backward and optimizer, and returns the loss (scalar on the device).
    Raises ValueError for a batch of another shape than the recorded one.
    """

    def __init__(self, step: Callable[[list[Any]], Tensor], device: torch.device) -> None:
        self.step = step
        self.device = device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: list[Any] = []
        self.loss: Tensor | None = None
        self.done = 0
        self.queued: deque[torch.cuda.Event] = deque()

    def __call__(self, parts: list[Any]) -> Tensor:
        """The loss of one step, a tensor of its own."""
        if self.done < _WARM:
            self.done += 1
            return self._plain(parts)
        if self.graph is None:
            self._record(parts)
        else:
            for old, new in zip(_tensors(self.static), _tensors(parts), strict=True):
                if old.shape != new.shape:
                    raise ValueError(
                        f"A captured step was recorded with a batch of {tuple(old.shape)} and got one of "
                        f"{tuple(new.shape)}: leave out the ragged last batch, or train with capture=False."
                    )
                old.copy_(new, non_blocking=True)
        assert self.graph is not None
        assert self.loss is not None
        self.graph.replay()
        loss = self.loss.clone()
        self._wait()
        return loss

    def _wait(self) -> None:
        """Wait for the replay before the last `_AHEAD` ones."""
        event = torch.cuda.Event(blocking=True)  # without it a waiting thread keeps a core busy
        event.record(torch.cuda.current_stream(self.device))
        self.queued.append(event)
        if len(self.queued) > _AHEAD:
            self.queued.popleft().synchronize()

    def _plain(self, parts: list[Any]) -> Tensor:
        # On the stream that will record: lazily made workspaces belong to a stream.
        here = torch.cuda.current_stream(self.device)
        with unrecorded():
            stream = _stream(self.device)
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                loss = self.step(parts)
            here.wait_stream(stream)
        return loss

    def _record(self, parts: list[Any]) -> None:
        self.static = [_cloned(part) for part in parts]
        graph = torch.cuda.CUDAGraph()
        with unrecorded(), torch.cuda.graph(graph, stream=_stream(self.device), capture_error_mode="thread_local"):
            self.loss = self.step(self.static)
        self.graph = graph


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that warms up and records; only inside `unrecorded`."""
    with torch.cuda.device(device):  # which may be "cuda", without a number
        place = torch.cuda.current_device()
        if place not in _STREAMS:
            _STREAMS[place] = torch.cuda.Stream(priority=-1)
    return _STREAMS[place]


def check_capture(model: nn.Module, optimizer: torch.optim.Optimizer, *, shared: bool, scaled: bool) -> None:
    """Raise ValueError when a step of this run cannot be recorded."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        raise ValueError(f"capture=True records a CUDA graph, and the model is on {device}; use capture=False.")
    if shared or scaled:
        raise ValueError("capture=True goes with one process and with bf16 or fp32; use capture=False.")
    if not all(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
        raise ValueError(
            f"capture=True needs an optimizer that reads its learning rate on the device: make it with fused=True "
            f"(SGD) or capturable=True (Adam), not {type(optimizer).__name__} as it is; or use capture=False."
        )


def set_rates_(optimizer: torch.optim.Optimizer, rates: list[float], captured: bool) -> None:
    """Set the learning rate of each group: a number, or when the step is captured the tensor that it reads."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if not captured:
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor) and group["lr"].is_cuda:
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, dtype=torch.float32, device=group["params"][0].device)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(part) for key, part in value.items()}
    return type(value)(_cloned(part) for part in value) if isinstance(value, list | tuple) else value
