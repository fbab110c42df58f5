"""A training step recorded once as a CUDA graph and replayed: small networks are bound by launches, not by arithmetic.

    the first steps run as they are ─▶ one is recorded ─▶ every later one copies its batch in and replays it
                                           └ not possible, and capture is "auto": all run as they are

Which step is which goes by its number, so that a run that goes on has the bits of the unbroken one: it warms up on a
batch, takes its state from the checkpoint once more, and records. Learning rates are tensors on the device while a step
is captured, because a number would be recorded too.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only

from prunus.train.sharded import asked as sharded

log = logging.getLogger(__name__)

_AHEAD = 8  # replays that may wait for the device: a recording waits for what all threads have queued by then
_SENT = 1 << 30  # bytes of gradients: sending that many after the backward pass costs less than launching the step
_WARM = 3  # steps 0, 1, 2 run as they are: cuDNN chooses its algorithms, the optimizer makes its state
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
    """`step(parts)` as a CUDA graph; parts: the batches of a step, trees of tensors of always the same shapes.

    step: runs forward, backward and optimizer, and returns the loss (scalar on the device).
    done: steps that the run has made already.
    forget: called where recording fails and need not succeed (`must`): drops what the recording left, the gradients.
        From then on steps run as they are, and `failure` says why.
    agree: why this process could not record, or nothing -> why any of those that step together could not.
    A batch of other shapes than the recorded one runs as it is, or raises ValueError where recording `must` succeed.
    """

    def __init__(
        self,
        step: Callable[[list[Any]], Tensor],
        device: torch.device,
        *,
        done: int = 0,
        must: bool = True,
        forget: Callable[[], None] = lambda: None,
        agree: Callable[[str], str] = str,
    ) -> None:
        self.step = step
        self.device = device
        self.done = done
        self.must = must
        self.forget = forget
        self.agree = agree
        self.failure = ""
        self.like: list[Any] | None = None  # what a batch to record must be like; any, where there is none
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static: list[Any] = []
        self.loss: Tensor | None = None
        self.told: dict[Any, set[bool]] = {}  # of `_attending`
        self.queued: deque[torch.cuda.Event] = deque()

    def warm_(self, parts: list[Any]) -> None:
        """Runs as many steps as come before a recording, which change what steps change and are not counted."""
        for _ in range(_WARM):
            self._plain(parts)

    def __call__(self, parts: list[Any]) -> Tensor:
        """The loss of one step, a tensor of its own."""
        if self.done < _WARM or self.failure:
            self.done += 1
            return self._plain(parts)
        if self.graph is None:
            if self.like is not None and not fits(self.like, parts):
                return self._plain(parts)
            self._record(parts)
            if self.failure:
                return self._plain(parts)
        elif not _copied(self.static, parts):
            if self.must:
                raise ValueError(
                    f"A captured step was recorded with a batch of {_shapes(self.static)} and got one of "
                    f"{_shapes(parts)}: leave out the ragged last batch, or train with capture=False."
                )
            return self._plain(parts)
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
            with torch.cuda.stream(stream), _attending(self.told, recording=False, masked=_masked(parts)):
                loss = self.step(parts)
            here.wait_stream(stream)
        return loss

    def _record(self, parts: list[Any]) -> None:
        self.static = [tree_map_only(Tensor, torch.clone, part) for part in parts]
        self.failure = self.agree(self._attempt(_masked(parts)))
        if self.failure:
            _tell(self.failure)
            self.graph, self.loss = None, None
            self.static.clear()
            self.forget()

    def _attempt(self, masked: bool) -> str:
        """Record the graph of a step on the static batch, or say why it cannot be."""
        graph, wrong = torch.cuda.CUDAGraph(), list[str]()
        with torch.cuda.device(self.device):
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
        before = generator.clone_state()  # after a recording that failed, its own would wait for the end for ever
        try:
            with unrecorded(), _attending(self.told, recording=True, masked=masked):
                stream = _stream(self.device)
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"), _telling(wrong):
                    self.loss = self.step(self.static)
        except (RuntimeError, NotImplementedError) as error:
            if self.must:
                raise
            generator.graphsafe_set_state(before)
            return _in_a_line((wrong or [str(error)])[0])
        self.graph = graph
        return ""


@dataclass
class Kept:
    """Where `train(capture=Kept(...))` leaves its recorded step to the next run of the same model and optimizer.

    As `capture="auto"` otherwise. Every step on a batch like `batch` is a replay, of every run: those that come before
    a recording are made beforehand, and then `again` puts model and optimizer back to where the run begins. A replay
    reads the tensors with which it was recorded: the model's, the optimizer's state, masks that were held before
    `train`, and the learning rates that are kept here.
    """

    batch: Any = None
    again: Callable[[], object] = lambda: None
    captured: CapturedStep | None = None
    rates: list[Tensor] = field(default_factory=list)

    def step(self, fresh: CapturedStep, optimizer: torch.optim.Optimizer) -> CapturedStep:
        """The step that is kept, which runs as the fresh one does where it is no replay; at first the fresh one."""
        if self.captured is None:
            self.captured = fresh
            fresh.done, fresh.like = _WARM, [outline(self.batch)]
            set_rates_(optimizer, [0.0] * len(optimizer.param_groups), True)
            self.rates = [group["lr"] for group in optimizer.param_groups]
        for group, rate in zip(optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate
        self.captured.step, self.captured.forget = fresh.step, fresh.forget
        return self.captured


Capture = bool | Literal["auto"] | Kept


def _masked(parts: list[Any]) -> bool:
    """Whether batches may bring masks of their own: those that name their parts do."""
    return any(isinstance(part, dict) for part in parts)


def _in_a_line(message: str) -> str:
    """The first line of a message, and the second where that only announces it."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])


@contextmanager
def _telling(wrong: list[str]) -> Generator[None]:
    """Context that notes why it is left: the end of a recording that has failed says only that it did."""
    try:
        yield
    except Exception as error:
        wrong.append(str(error))
        raise


def _stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that warms up and records; only inside `unrecorded`."""
    with torch.cuda.device(device):  # which may be "cuda", without a number
        place = torch.cuda.current_device()
        if place not in _STREAMS:
            _STREAMS[place] = torch.cuda.Stream(priority=-1)
    return _STREAMS[place]


# What a transformers model asks before it attends, and the answer with which it needs no mask of all pairs of tokens.
_ASKED = {
    "find_packed_sequence_indices": None,
    "_ignore_causal_mask_sdpa": True,
    "_ignore_bidirectional_mask_sdpa": True,
}


@contextmanager
def _attending(told: dict[Any, set[bool]], *, recording: bool, masked: bool) -> Generator[None]:
    """Context in which a transformers model attends alike whether or not the stream records.

    While it does, the model may not look into its positions and masks. It would form a mask of all pairs of tokens,
    for an attention that is slower and rounds otherwise; and blocks compiled without a mask would be compiled anew,
    which no recording survives. What it was told in steps before is noted in `told`, and holds; unless batches are
    `masked`, which bring masks of their own, for each may have other ones.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    own = {name: getattr(masking, name) for name in _ASKED if hasattr(masking, name)}
    try:
        for name, ask in own.items():
            setattr(masking, name, _remembering(name, ask, told, recording=recording, masked=masked))
        yield
    finally:
        for name, ask in own.items():
            setattr(masking, name, ask)


def _remembering(
    name: str, ask: Callable[..., Any], told: dict[Any, set[bool]], *, recording: bool, masked: bool
) -> Callable[..., Any]:
    """`ask(tensor, sizes...)`, whose answers are noted, or, in a recording, are those of before.

    Of this thread alone: the models of others ask, too.
    """
    plain, mine = _ASKED[name], threading.get_ident()

    def answer(*given: Any, **named: Any) -> Any:
        if threading.get_ident() != mine:
            return ask(*given, **named)
        each = (*given, *(named[key] for key in sorted(named)))
        key = (name, *(size for size in each if not isinstance(size, Tensor)))
        if not recording:
            found = ask(*given, **named)
            told.setdefault(key, set()).add(found is plain)
            return found
        other = masked and any(isinstance(size, Tensor) for size in each)
        return plain if told.get(key) == {True} and not other else ask(*given, **named)

    return answer


@cache
def _tell(why: str) -> None:
    """Say why steps are not recorded, each reason once in a process: a block after the other is fitted, or a member."""
    log.warning("training steps are not recorded as a CUDA graph: %s", why)


def captures(asked: Capture, model: nn.Module, optimizer: torch.optim.Optimizer, *, shared: bool, scaled: bool) -> bool:
    """Whether the steps of a run are recorded; told where not on a GPU. Raises ValueError when they must be."""
    why = _obstacle(model, optimizer, shared=shared, scaled=scaled) if asked else ""
    if shared and isinstance(asked, Kept):
        why = why or "a step is kept for the next run in one process alone"
    elif shared and asked == "auto":
        why = why or _unhidden(model)
    if why and asked is True:
        raise ValueError(f"{why}; use capture=False.")
    if why and next(model.parameters()).is_cuda:
        _tell(why)
    return bool(asked) and not why


def unrecordable(device: torch.device, *, scaled: bool) -> str:
    """Why steps on a device cannot be recorded, whatever is trained; nothing where they can.

    >>> unrecordable(torch.device("cpu"), scaled=False)
    'capture=True records a CUDA graph, and the model is on cpu'
    """
    if device.type != "cuda":
        return f"capture=True records a CUDA graph, and the model is on {device}"
    if scaled:
        return "capture=True goes with bf16 or fp32: the host looks at what fp16 scales"
    return ""


def _obstacle(model: nn.Module, optimizer: torch.optim.Optimizer, *, shared: bool, scaled: bool) -> str:
    """Why a step of this run cannot be recorded; nothing where it can, as far as one sees without trying."""
    if why := unrecordable(next(model.parameters()).device, scaled=scaled):
        return why
    if shared and sharded():
        return "capture=True goes with whole weights: sharded ones are gathered and freed by the host"
    if shared and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        return "capture=True records no BatchNorm of several processes, which take the statistics of the first"
    if not all(group.get("fused") or group.get("capturable") for group in optimizer.param_groups):
        return (
            f"capture=True needs an optimizer that reads its learning rate on the device: make it with fused=True "
            f"(SGD) or capturable=True (Adam), not {type(optimizer).__name__} as it is"
        )
    return ""


def _unhidden(model: nn.Module) -> str:
    """Why processes had better not record how they average their gradients; nothing where those are few."""
    sent = sum(each.numel() * each.element_size() for each in model.parameters() if each.requires_grad)
    if sent <= _SENT:
        return ""
    return (
        f"capture='auto' leaves processes unrecorded that exchange {sent / 2**30:.1f} GiB of gradients a step, most of "
        "them while others are still computed; capture=True records that they do so afterwards"
    )


def set_rates_(optimizer: torch.optim.Optimizer, rates: list[float], captured: bool) -> None:
    """Set the learning rate of each group: a number, or when the step is captured the tensor that it reads."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if not captured:
            group["lr"] = rate
        elif isinstance(group["lr"], Tensor) and group["lr"].device == group["params"][0].device:
            group["lr"].fill_(rate)
        else:
            group["lr"] = torch.tensor(rate, dtype=torch.float32, device=group["params"][0].device)


def _copied(static: list[Any], parts: list[Any]) -> bool:
    """Whether a batch is of the recorded one's shapes, and now in its place."""
    if not fits(static, parts):
        return False
    for to, value in zip(tree_leaves(static), tree_leaves(parts), strict=True):
        if isinstance(to, Tensor):
            to.copy_(value, non_blocking=True)
    return True


def outline(tree: Any) -> Any:
    """The tree with empty tensors of the same shapes and types."""
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), tree)


def fits(old: Any, new: Any) -> bool:
    """Whether two trees are alike: tensors of the same shapes and types, and everything else equal."""
    (one, its), (other, others) = tree_flatten(old), tree_flatten(new)
    return its == others and all(map(_alike, one, other))


def _alike(old: Any, new: Any) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.shape == new.shape and old.dtype == new.dtype
    return old is new or (type(old) is type(new) and bool(old == new))


def _shapes(parts: list[Any]) -> str:
    return ", ".join(str(tuple(each.shape)) for each in tree_leaves(parts) if isinstance(each, Tensor))
