"""Models of one shape trained one after the other through one of them, whose recorded step is replayed for all.

    model ── its tensors are copied in ──▶ stand-in ── every step is a replay ──▶ copied back ──▶ model
                                              └ masks, learning rates, the optimizer's state begin anew, in place

A recorded step reads and writes the tensors that it was recorded with. What lies in tensors is copied there; what does
not (classes, settings, hooks, the arguments of a call) must be the same, or the model is trained where it is. Whole
numbers may differ, for modules bear their place in the network: so what both compute is compared, too.

A stand-in takes the memory of its model in training, between two models as well: it is dropped where the device was
more than half full.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.machine import in_mode, random_state, set_random_state
from prunus.masks import Masks
from prunus.train.capture import Capture, Kept, fits, outline, unrecorded

log = logging.getLogger(__name__)

_ALIKE = 1e-3  # relative: two models of the same tensors have one loss, to rounding
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, eq=False)
class Trained:
    """A model, the optimizer of its parameters, whose state begins as zeros, and the masks that hold meanwhile."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    masks: Masks | None = None


class StandIn:
    """A model trained in the place of others: `take_` one, train `own` with `kept`, `give_` it what was trained.

    own: of no other use; its masks are held from now on, and it is trained without.
    """

    def __init__(self, own: Trained) -> None:
        self.kept = Kept()
        self.own = Trained(own.model, own.optimizer)
        self.hold = None if own.masks is None else own.masks.hold(own.model, own.optimizer)

    @torch.no_grad()
    def take_(self, other: Trained) -> bool:
        """Become another model, before its first step; False where its tensors are others."""
        mine, theirs = _tensors(self.own.model), _tensors(other.model)
        if not fits(mine, theirs) or (self.hold is None) != (other.masks is None):
            return False
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])
        for state in self.own.optimizer.state.values():
            for value in state.values():
                value.zero_()
        if self.hold is not None and other.masks is not None:
            self.hold.change_(other.masks)
        return True

    @torch.no_grad()
    def give_(self, other: Trained) -> None:
        """The other model's tensors become those that were trained."""
        mine = _tensors(self.own.model)
        for name, tensor in _tensors(other.model).items():
            tensor.copy_(mine[name])


@dataclass(eq=False)
class _Known:
    """A stand-in with what a model must be like: its kind, and the arguments of its calls, whose tensors are empty."""

    kind: Hashable
    example: Any
    stand_in: StandIn
    used: bool = True


@dataclass(eq=False)
class StandIns:
    """The stand-ins of a chain of blocks, for whatever is trained of each: no more than the last block needed.

    wanted: whether there are any.

    >>> stand_ins = StandIns()
    >>> for block in blocks:
    ...     stand_ins.next_block()
    ...     stand_in = stand_ins.find(block, "all of it", batch, lambda: prepare(copy.deepcopy(block)))
    ...     stand_ins.train_(stand_in, prepare(block), loss, run, batch)
    """

    wanted: bool = True
    _known: list[_Known] = field(default_factory=list)

    def next_block(self) -> None:
        """What the block before did not use may go when this one needs others."""
        for known in self._known:
            known.used = False

    def find(self, model: nn.Module, how: Hashable, example: Any, make: Callable[[], Trained]) -> StandIn | None:
        """The stand-in for a model that is to be trained, or a new one; None where there can be none.

        how: what else decides what is trained.   example: a batch.   make: a copy of the model, ready to be trained.
        """
        kind = _kind(model) if self.wanted else None
        if kind is None:
            return None
        for known in self._known:
            if known.kind == (kind, how) and fits(known.example, example):
                known.used = True
                return known.stand_in
        self._known = [known for known in self._known if known.used]
        self._known.append(_Known((kind, how), outline(example), StandIn(make())))
        return self._known[-1].stand_in

    def train_(
        self,
        stand_in: StandIn | None,
        other: Trained,
        loss: Callable[[nn.Module, Any], Tensor],
        run: Callable[[Trained, Capture], object],
        example: Any,
    ) -> None:
        """Do `run(trained, capture)`, which trains, through the stand-in where it can stand for the model.

        loss: of a model and the example, by which the two are compared.
        """
        if stand_in is None:
            run(other, "auto")
        elif not stand_in.take_(other) or not _alike(stand_in.own.model, other.model, loss, example):
            self.stop("models of one shape compute different things")
            run(other, "auto")
        else:
            kept = stand_in.kept
            kept.batch, kept.again = example, partial(_begin_again, stand_in, other, random_state(other.model))
            try:
                run(stand_in.own, kept)
            finally:
                kept.batch, kept.again = None, lambda: None  # which hold what the next models do not need
            stand_in.give_(other)
            if kept.captured is not None and kept.captured.failure:
                self.stop("none could be recorded")
            elif _is_crowded(next(other.model.parameters()).device):
                self.stop("more than half of the device's memory was in use")

    def stop(self, why: str) -> None:
        """No more stand-ins."""
        log.info("steps are recorded anew for each block: %s", why)
        self.wanted = False
        self._known.clear()


def _begin_again(stand_in: StandIn, other: Trained, states: Mapping[str, Tensor]) -> None:
    """As if nothing had been run since the stand-in took the other model, and the random states were these."""
    stand_in.take_(other)
    now = random_state(other.model)
    if any(not torch.equal(state, now[key]) for key, state in states.items()):
        with unrecorded():
            set_random_state(states, other.model)


def _is_crowded(device: torch.device) -> bool:
    """Whether more than half of a GPU's memory was in use since the last run of `train` began."""
    if device.type != "cuda":
        return False
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    return 2 * (others + torch.cuda.max_memory_allocated(device)) > total


@torch.no_grad()
def _alike(one: nn.Module, other: nn.Module, loss: Callable[[nn.Module, Any], Tensor], example: Any) -> bool:
    """Whether two models have one loss when they are evaluated, where nothing is random."""
    with in_mode(one, training=False), in_mode(other, training=False):
        return torch.allclose(loss(one, example), loss(other, example), rtol=_ALIKE, atol=0.0, equal_nan=True)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Name -> every tensor of a model: parameters, buffers, and what its modules hold besides."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, module in model.named_modules():
        found |= {f"{name}.{key}": value for key, value in vars(module).items() if isinstance(value, Tensor)}
    return found


def _kind(model: nn.Module) -> Hashable | None:
    """What two models must have in common, besides what they compute; None where a tensor cannot be written to."""
    tensors = _tensors(model)
    if any(type(each) not in (Tensor, nn.Parameter) or 0 in each.stride() for each in tensors.values()):
        return None
    modules = ((name, type(module).__name__, _settings(module)) for name, module in model.named_modules())
    layout = ((name, each.shape, each.stride(), each.dtype, each.device) for name, each in tensors.items())
    return tuple(modules), tuple(layout), tuple(name for name, each in tensors.items() if each.requires_grad)


def _settings(module: nn.Module) -> Hashable:
    plain = ((key, value) for key, value in vars(module).items() if isinstance(value, bool | float | str | None))
    return frozenset(plain), tuple(len(getattr(module, hooks)) for hooks in _HOOKS)
