"""Torch's own generators, by which dropout draws, at a seed: what is drawn does not hang on what ran before.

Everything else in Prunus draws from generators of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor

from prunus.machine import put_back
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
                before.enter_context(put_back(_inside[each], partial(_state, each), partial(_put_, each)))
            torch.default_generator.manual_seed(seed % 2**64)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed % 2**64)
        try:
            yield
        finally:
            with unrecorded():
                before.close()


def _state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _put_(device: torch.device, state: Tensor) -> None:
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
