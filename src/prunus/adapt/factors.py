"""The factors A and B that an adapter starts from, and the matrices of a parameter that they are for."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Init", "matrices", "new_factors"]

Init = Literal["kaiming", "gaussian"]


def new_factors(
    shape: tuple[int, ...], rank: int, *, product: bool, init: Init, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A (..., r, in) and B (..., out, r), float32 on the CPU, for which the adapter changes nothing yet.

    Sums (LoRA, MaskLoRA): B = 0; A uniform in +-1/sqrt(in) ("kaiming", a = sqrt 5) or normal with deviation 1/r
    ("gaussian"). Products (ScaleLoRA): every entry r^-1/2 ("kaiming", as published), so BA = 1. The r components are
    then equal and get equal gradients, so BA keeps rank one whatever r is; "gaussian" adds to A noise that sums to
    zero over the components: BA is still 1 and the components part.
    """
    *stack, out, in_ = shape
    if product:
        noise = torch.zeros(*stack, rank, in_)
        if init == "gaussian":
            noise.normal_(0, rank**-0.5, generator=generator)
            noise -= noise.mean(-2, keepdim=True)
        return noise + rank**-0.5, torch.full((*stack, out, rank), rank**-0.5)
    start, bound = torch.empty(*stack, rank, in_), 1 / math.sqrt(in_)
    if init == "kaiming":
        start.uniform_(-bound, bound, generator=generator)
    else:
        start.normal_(0, 1 / rank, generator=generator)
    return start, torch.zeros(*stack, out, rank)


def matrices(stored: Tensor, *, stacked: bool, transposed: bool) -> Tensor:
    """A stored parameter seen as (out, in), or a stack of them as (experts, out, in)."""
    if stacked:
        return stored.mT if transposed else stored
    return stored.t() if transposed else stored.flatten(1)
