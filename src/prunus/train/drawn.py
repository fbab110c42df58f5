"""Torch's own generators, by which dropout draws, at a seed: what is drawn does not hang on what ran before.

    seeded(seed, device)       the process's generators, for all that is drawn: of one thread at a time
    drawn_from(generator)      another one for what this thread draws on the CPU, such as fresh weights

Everything else in Prunus draws from generators of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.machine import generator_state, put_back, set_generator_state
from prunus.train.capture import unrecorded

_CPU = torch.device("cpu")
_inside: defaultdict[torch.device, list[list[Tensor]]] = defaultdict(list)


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Context in which torch's generators, of the CPU and of a device, begin at a seed; they are as before afterwards.

    They are the process's: threads that draw at once disturb each other, and the last one that leaves puts them back.

    >>> with seeded(0, torch.device("cpu")):
    ...     first = torch.rand(1)
    >>> with seeded(0, torch.device("cpu")):
    ...     bool(torch.rand(1) == first)
    True
    """
    with ExitStack() as before:
        with unrecorded():
            for each in {_CPU: None, device: None}:
                now, put = partial(generator_state, each), partial(set_generator_state, each)
                before.enter_context(put_back(_inside[each], now, put))
            torch.default_generator.manual_seed(seed % 2**64)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed % 2**64)
        try:
            yield
        finally:
            with unrecorded():
                before.close()


def drawn_from(generator: torch.Generator) -> AbstractContextManager[Any]:
    """Context in which this thread draws on the CPU from a generator, where torch would take the process's.

    The bits are those of the process's at the same state; what other threads draw meanwhile changes nothing.

    >>> with drawn_from(torch.Generator().manual_seed(0)):
    ...     layer = torch.nn.Linear(3, 2)
    """
    return _DrawnFrom(generator)


class _DrawnFrom(TorchDispatchMode):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        taking = _taking(func)
        if taking is None or kwargs.get("generator") is not None or _device(args, kwargs) != _CPU:
            return func(*args, **kwargs)
        return taking(*args, **kwargs | {"generator": self.generator})


@cache
def _taking(func: Any) -> Any:
    """The overload of an operation that is told its generator; None for one that draws nothing."""
    if any(argument.name == "generator" for argument in func._schema.arguments):
        return func
    name = {"default": "generator", "low": "low_generator"}.get(func._overloadname, "")
    return getattr(func.overloadpacket, name) if name in func.overloadpacket.overloads() else None


def _device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    given = next((each.device for each in args if isinstance(each, Tensor)), None)
    return torch.device(kwargs.get("device") or given or _CPU)
