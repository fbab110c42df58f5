"""What a training run needs to go on after a kill with the same bits, in one file that is complete or absent.

trained parameters and buffers, optimizer, methods that take part, step, losses so far, random state
"""

from __future__ import annotations

import logging
import pickle
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunus.machine import atomic, random_state, ranks, set_random_state
from prunus.masks import Masks, pack
from prunus.train.hooks import During
from prunus.train.sharded import like, whole
from prunus.train.watch import Watched

_logger = logging.getLogger(__name__)

_APART = ("params", "lr", "fused", "foreach", "capturable", "differentiable")  # lr is compared by itself


@dataclass(frozen=True)
class Checkpoint:
    """The file of one run; `plan` is what must agree between the run that wrote it and the one that reads it.

    methods: modules (`During`) whose buffers and parameters belong to the run's state. options: of `options_of`.
    """

    path: Path | None
    plan: dict[str, Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    methods: Sequence[nn.Module]
    options: Mapping[str, Any]
    watched: Watched
    shared: bool

    def load(self) -> tuple[int, dict[str, Any]]:
        """Put the stored state back, if there is one; returns the first step to do and the trace so far.

        Raises ValueError for the checkpoint of another run, and for a damaged one.
        """
        if self.path is None or not self.path.exists():
            return 0, {}
        state = _read(self.path)
        tensors = resumable(self.model)
        found = {name: tuple(tensor.shape) for name, tensor in state["tensors"].items()}
        if (by := state.get("by", self._by)) != self._by:
            raise ValueError(
                f"{self.path} belongs to another run: it was trained by {', '.join(by)}, this run is by "
                f"{', '.join(self._by)}. Delete it to start anew, or restore the run's settings."
            )
        other = {key: value for key, value in state["plan"].items() if value != self.plan.get(key)}
        options = state.get("options", {}).items()
        other |= {key: value for key, value in options if value != self.options.get(key, value)}
        if other or found != {name: tuple(t.shape) for name, t in tensors.items()}:
            own = {key: {**self.plan, **self.options}.get(key) for key in other}
            raise ValueError(
                f"{self.path} belongs to another run: it has {other} and {len(found)} tensors, this run {own} and "
                f"{len(tensors)}. Delete it to start anew, or restore the run's settings."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(like(state["tensors"][name], tensor))
        for method, stored in zip(self._stateful, filter(None, state["methods"]), strict=True):
            method.load_state_dict(stored)
        self.watched.load_state(state["watched"])
        self.optimizer.load_state_dict(_placed(state["optimizer"], self.optimizer))
        if self.scaler is not None:
            self.scaler.load_state_dict(state["scaler"])
        states, own = state["random"], ranks.index() if self.shared else 0
        if own < len(states):  # a process that those who wrote it had not, draws as its caller began it
            set_random_state(states[own], self.model)
        _logger.info("Resuming from %s after step %d.", self.path, state["step"])
        return state["step"], state["trace"]

    def save(self, step: int, trace: dict[str, Any]) -> None:
        """Write the state after `step` steps beside its place and move it there: a kill leaves the old or the new."""
        if self.path is None:
            return
        mine = [random_state(self.model)]
        random = gather_object(mine) if self.shared else mine
        tensors = {name: self._on_host(tensor.detach()) for name, tensor in resumable(self.model).items()}
        stepped = tree_map_only(Tensor, self._on_host, self.optimizer.state_dict())
        if self._writes:
            state = {
                "plan": self.plan,
                "options": dict(self.options),
                "by": self._by,
                "step": step,
                "trace": trace,
                "tensors": tensors,
                "methods": [method.state_dict() for method in self.methods],
                "watched": self.watched.state(),
                "optimizer": stepped,
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "random": random,
            }
            with atomic(self.path) as partial:
                try:
                    torch.save(state, partial)
                except RuntimeError as error:  # torch's own, where the system refuses to write
                    raise OSError(f"{self.path} cannot be written ({error}): is the disk full?") from error
        if self.shared:
            ranks.wait()

    @property
    def _writes(self) -> bool:
        return ranks.is_main() or not self.shared

    @property
    def _stateful(self) -> list[nn.Module]:
        return [method for method in self.methods if method.state_dict()]

    @property
    def _by(self) -> list[str]:
        """The names of the optimizer and of the methods whose states are kept, which belong to no others."""
        return [type(each).__name__ for each in (self.optimizer, *self._stateful)]

    def _on_host(self, tensor: Tensor) -> Tensor:
        """Gathered from all ranks, and kept by the one that writes: no device ever holds more than one in full."""
        gathered = whole(tensor)
        return gathered.cpu() if self._writes else torch.empty(0)


def held(optimizer: torch.optim.Optimizer, masks: Masks | None) -> dict[str, Any]:
    """What a run may not change when it goes on: the optimizer's settings, but for those of speed, and the masks.

    >>> held(torch.optim.SGD([torch.ones(1)], lr=0.1), None)["optimizer"][0]["momentum"]
    0
    """
    settings = [
        {key: said for key, value in group.items() if key not in _APART for said in _said(value)}
        for group in optimizer.param_groups
    ]
    bits = {name: zlib.crc32(pack(mask.flatten()).cpu().numpy().data) for name, mask in (masks or {}).items()}
    return {"optimizer": settings, "masks": f"{zlib.crc32(repr(sorted(bits.items())).encode()):08x}"}


def options_of(methods: Sequence[nn.Module]) -> dict[str, list[Any]]:
    """Type and name of each option -> its values in methods that are not attached yet, and in those inside them.

    What attaching to an earlier training left in one is among them, so only what two runs both have is compared.

    >>> options_of([Ema(0.99)])
    {'Ema.decay': [0.99]}
    """
    found: dict[str, list[Any]] = {}
    for each in (part for method in methods for part in method.modules() if isinstance(part, During)):
        for name, value in vars(each).items():
            for said in _said(value) if not name.startswith("_") and name != "training" else ():
                found.setdefault(f"{type(each).__name__}.{name}", []).append(said)
    return found


def _said(value: Any) -> Iterator[Any]:
    """An option as a checkpoint may hold it, a pattern or a set in words; nothing of tensors, functions and modules."""
    if type(value) in (bool, int, float, str, type(None)):  # torch reads no numbers of numpy back
        yield value
    elif isinstance(value, tuple | list):
        parts = cast("Sequence[Any]", value)
        found = tuple(said for each in parts for said in _said(each))
        if len(found) == len(parts):
            yield found
    elif is_dataclass(value) and not isinstance(value, type):
        own = {each.name: getattr(value, each.name) for each in fields(value)}
        told = (f"{name}={_rounded(said)}" for name, each in own.items() for said in _said(each))
        yield f"{type(value).__name__}({', '.join(told)})"


def _rounded(said: Any) -> str:
    """A radius may be a norm, of which devices differ in the last digits."""
    return f"{said:.6g}" if isinstance(said, float) else repr(said)


class Clock:
    """Says after which steps so many seconds have passed since the last checkpoint.

    Of several ranks the main one's time counts. They ask each other seldom: when, at the pace so far, it is time, and
    after at most twice as many steps as before, because first steps are slow. Writing takes a twentieth of the time at
    most; with 0 seconds it is done after every step.
    """

    def __init__(self, seconds: float, step: int, *, shared: bool) -> None:
        self.seconds, self.shared = seconds, shared
        self.begun, self.step, self.next = time.monotonic(), step, step + 1
        self.asked = self.begun

    def is_due(self, step: int) -> bool:
        """Whether it is time for a checkpoint after `step` steps; every rank asks alike."""
        if step < self.next:
            return False
        self.asked = time.monotonic()
        passed = self.asked - self.begun
        if not self.shared:
            return passed >= self.seconds
        done = step - self.step
        further = min(done, int(done * (self.seconds - passed) / max(passed, 1e-9)))
        due, self.next = ranks.agree((passed >= self.seconds, step + max(1, further)))
        return due

    def restart(self, step: int) -> None:
        """Begin anew, after a checkpoint that was written after `step` steps."""
        now = time.monotonic()
        self.seconds = max(self.seconds, 20 * (now - self.asked)) if self.seconds else 0.0
        self.begun, self.step, self.next = now, step, step + 1


def _read(path: Path) -> dict[str, Any]:
    """A stored state whose checksums are right: torch.save writes them, torch.load does not look."""
    try:
        with zipfile.ZipFile(path) as file:
            bad = file.testzip()
        if bad is None:
            return torch.load(path, map_location="cpu", weights_only=True)
    except (zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, NotImplementedError) as error:
        bad = str(error)
    raise ValueError(f"{path} is damaged ({bad}); delete it to begin this training anew")


def resumable(model: nn.Module) -> dict[str, Tensor]:
    """What training can change: parameters that require gradients, and buffers (boolean ones are masks, and fixed)."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if buffer.dtype != torch.bool}


def _placed(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's stored state, sharded as the parameters are that it belongs to."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def place(index: int, value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.shape == parameters[index].shape
        return like(value, parameters[index]) if fits else value

    stored = {index: {key: place(index, each) for key, each in own.items()} for index, own in state["state"].items()}
    return {**state, "state": stored}
