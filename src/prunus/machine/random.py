"""The process's generators of random numbers: how they stand, and as they stood."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["random_state", "set_random_state"]


def random_state() -> dict[str, Tensor]:
    """The states of the CPU's generator and, where CUDA is in use, of the current device's."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {})


def set_random_state(states: Mapping[str, Tensor]) -> None:
    """Put the generators back to what `random_state` returned; CUDA's is left out where there is none."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
