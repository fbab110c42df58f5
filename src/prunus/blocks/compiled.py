"""Blocks of a network compiled in place by torch.compile, and the network as it was for a while.

    [block][block]...[block]     blocks of one class and shape share one program, within a network and between networks

So compiling costs the same for 20 layers as for 200, and once a process for a whole grid. Parameters, names, state dict
and hooks of the network stay what they were.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

_PROGRAMS = 64  # of one forward: shapes of blocks, times training and evaluation; torch gives up at 8


def compile_blocks_(model: nn.Module, *, backend: str = "inductor") -> int:
    """Compile the repeated blocks of `model` in place; how many there are.

    A block is the outermost module of a class, not one of torch.nn's, that occurs more than once in the model. Nothing
    is traced before the first call. Threads must not run compiled models at the same time (see `capture.unrecorded`).
    Raises ValueError for a model without such blocks.

    >>> from prunus.data import build_model
    >>> compile_blocks_(build_model("resnet20", classes=10))
    9
    """
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no blocks of one class that repeat, so nothing would be compiled: leave "
            "compile out, or hand over a model that is compiled already"
        )
    allow_programs()
    for block in blocks:
        block.compile(backend=backend)
    return len(blocks)


def allow_programs() -> None:
    """Lets one forward have as many programs as a network has shapes of blocks."""
    torch._dynamo.config.recompile_limit = max(_PROGRAMS, torch._dynamo.config.recompile_limit)


@contextmanager
def uncompiled(model: nn.Module) -> Generator[nn.Module]:
    """Context with the model to call so that no part of it runs compiled, which hooks set since would not notice.

    >>> with uncompiled(torch.compile(nn.Linear(2, 1))) as plain:
    ...     type(plain).__name__
    'Linear'
    """
    plain = model._modules.get("_orig_mod") or model
    compiled = {module: call for module in plain.modules() if (call := module._compiled_call_impl) is not None}
    try:
        for module in compiled:
            module._compiled_call_impl = None
        yield plain
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def _blocks(model: nn.Module) -> list[nn.Module]:
    kinds = Counter(type(module) for module in model.modules() if not type(module).__module__.startswith("torch.nn."))
    found: list[nn.Module] = []

    def look(parent: nn.Module) -> None:
        for child in parent.children():
            if kinds[type(child)] > 1:
                found.append(child)
            else:
                look(child)

    look(model)
    return found
