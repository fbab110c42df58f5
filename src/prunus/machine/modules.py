"""Modules and tensors as the process has them: in a mode for a while, a rank's part of what is sharded, extras."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor, nn

__all__ = ["import_extra", "in_mode", "local_part"]


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Generator[None]:
    """Context in which every module is in training or in evaluation mode; afterwards each is in its own again.

    >>> with in_mode(nn.Dropout(), training=False):
    ...     pass
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.train(training)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this rank has; an ordinary tensor itself."""
    if type(tensor) in (Tensor, nn.Parameter):
        return tensor
    from torch.distributed.tensor import DTensor  # slow to import, and loaded where there is one

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def import_extra(module: str, extra: str, needed: str) -> Any:
    """An optional package. Raises ImportError with what `needed` it and how to install it.

    >>> import_extra("math", "images", "pi is needed").pi
    3.141592653589793
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"{needed}: pip install 'prunus[{extra}]'") from error
