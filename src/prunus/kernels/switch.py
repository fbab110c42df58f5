"""Whether a tensor's work goes to the Triton programs of this folder or to the plain functions beside them.

Programs take CUDA tensors where the package `triton` is installed (torch brings it on Linux) and finds the C compiler
that it starts programs with, unless PRUNUS_KERNELS=0 is in the environment; everything else takes the plain path. A
program that fails raises: nothing falls back by itself.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager

from torch import Tensor

_AVAILABLE = (
    os.environ.get("PRUNUS_KERNELS") != "0"
    and importlib.util.find_spec("triton") is not None
    and bool(os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"))
)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_forced: bool | None = None  # a plain global: backward runs in threads that inherit no context


def uses_kernels(x: Tensor) -> bool:
    """Whether work on `x` goes to Triton programs."""
    if _forced is None:
        return x.is_cuda and _AVAILABLE
    return _forced and (x.is_cuda or _INTERPRETED)


@contextmanager
def kernels(on: bool) -> Generator[None]:
    """While active, programs run for every tensor they can take (`on`) or for none, in all threads of the process.

    They can take CUDA tensors; and those of a CPU in Triton's interpreter, which TRITON_INTERPRET=1 turns on if it is
    in the environment before Triton and this module are imported.

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
