"""Blocks of a transformers model retrained through compiled programs, one for all blocks of a class.

    hooks ── forward: kept weights ── program [ recompute? [ norm, attention, effective_linear, ... ] ]

What is small between the products (norms, residuals, activations, casts) is fused; products and adapters run as they do
uncompiled (`effective`). Losses differ by rounding, merged weights keep their zeros. Networks of other kinds are
compiled by `compiled`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from prunus.adapt.adapters import EffectiveLinear
from prunus.blocks import allow_programs, recomputing
from prunus.machine import product_dtype, with_forwards


@contextmanager
def compiled_forward(model: nn.Module, *, backend: str = "inductor") -> Generator[int]:
    """Context in which the forward of each block of a transformers model is compiled; how many blocks there are.

    Inside of their hooks, and with their adapters (see `effective`), recomputation and autocast. A block is the
    innermost module that can recompute itself. Enter it before `recomputed` or after, but after `adapt`.
    Raises ValueError for a model without such blocks.

    >>> with compiled_forward(model) as blocks:
    ...     train(model, batches, optimizer, lr, steps=100)
    """
    blocks = recomputing(model)
    if len(blocks) < 2:
        raise ValueError(
            f"{type(model).__name__} has no repeated blocks that transformers can recompute, which are what is "
            "compiled: leave compile out"
        )
    allow_programs()
    programs = {kind: torch.compile(kind.forward, backend=backend, dynamic=False) for kind in map(type, blocks)}
    # Methods, which are bound to the copy of a block when it is copied.
    forwards = {block: MethodType(_through(programs[type(block)]), block) for block in blocks}
    with with_forwards(forwards), _one_class(blocks):
        yield len(blocks)


@contextmanager
def _one_class(blocks: list[Any]) -> Generator[None]:
    """Context in which modules parametrized alike are of one class, not of one each, which a program could not share.

    Removing a parametrization takes it out of the class, so it is for afterwards.
    """
    own = {inner: type(inner) for block in blocks for inner in block.modules() if parametrize.is_parametrized(inner)}
    shared: dict[Any, type[nn.Module]] = {}
    for module, kind in own.items():
        module.__class__ = shared.setdefault((kind.__bases__, *module.parametrizations), kind)
    try:
        yield
    finally:
        for module, kind in own.items():
            module.__class__ = kind


def _through(program: Any) -> Any:
    """The forward that runs a program with what it may not ask for: kept effective weights."""

    def forward(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        keep = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        kept = [each for each in block.modules() if keep and isinstance(each, EffectiveLinear) and each.factors.keep]
        try:
            for layer in kept:
                weight = layer.matrix()
                layer.factors.held = layer.factors.built(weight, product_dtype(weight))
            return program(block, *args, **kwargs)
        finally:
            for layer in kept:
                layer.factors.held = None

    return forward
