"""Torch's own generators, by which dropout draws, at a seed: what is drawn does not hang on what ran before.

Everything else in Prunus draws from generators of its own.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import torch

from prunus.train.capture import unrecorded


@contextmanager
def seeded(seed: int, device: torch.device) -> Generator[None]:
    """Context in which torch's generators, of the CPU and of a device, begin at a seed; they are as before afterwards.

    They are the process's: threads that draw at once disturb each other.

    >>> with seeded(0, torch.device("cpu")):
    ...     first = torch.rand(1)
    >>> with seeded(0, torch.device("cpu")):
    ...     bool(torch.rand(1) == first)
    True
    """
    cuda = device.type == "cuda"
    with unrecorded():
        before = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None
        torch.default_generator.manual_seed(seed % 2**64)
        with torch.cuda.device(device) if cuda else nullcontext():
            torch.cuda.manual_seed(seed % 2**64) if cuda else None
    try:
        yield
    finally:
        with unrecorded():
            torch.set_rng_state(before[0])
            if before[1] is not None:
                torch.cuda.set_rng_state(before[1], device)
