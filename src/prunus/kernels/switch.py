"""Whether a tensor's work goes to the Triton programs of this folder or to the plain functions beside them.

With PRUNUS_KERNELS=1 in the environment, programs take CUDA tensors where the package `triton` is installed (torch
brings it on Linux); everything else takes the plain path. A program that fails raises: nothing falls back by itself.
They are off by default because they have run in Triton's interpreter and through its compiler, but not yet on a GPU.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor

__all__ = ["kernels", "uses_kernels"]

_AVAILABLE = os.environ.get("PRUNUS_KERNELS") == "1" and importlib.util.find_spec("triton") is not None

_forced: bool | None = None  # a plain global: backward runs in threads that inherit no context


def uses_kernels(x: Tensor) -> bool:
    """Whether work on `x` goes to Triton programs."""
    return (x.is_cuda and _AVAILABLE) if _forced is None else _forced


@contextmanager
def kernels(on: bool) -> Generator[None]:
    """While active, programs run for every tensor (`on`) or for none, in all threads of the process.

    On a CPU they run in Triton's interpreter: set TRITON_INTERPRET=1 before Triton is imported.

    >>> with kernels(False):
    ...     uses_kernels(torch.ones(1))
    False
    """
    global _forced
    before, _forced = _forced, on
    try:
        yield
    finally:
        _forced = before
