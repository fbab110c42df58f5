"""The factors of a low-rank adapter, and the modules that compute with them.

    MaskLoRA, ScaleLoRA   the effective weight of `effective`
    LoRA                  y = x W^T + c (x A^T) B^T      two thin products, nothing of the weight's size

Where an adapter sits in a model and how it is merged is in `sites`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.adapt.effective import Terms, effective_linear, effective_parameter, effective_weight
from prunus.machine import no_autocast, product_dtype

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


class Factors(nn.Module):
    """A and B of one weight with the rule that joins them to it: `scale` (None: product) and `mask` (None: all True).

    A matrix's mask is packed, a stack's is bool. It is no buffer: data-parallel training would send it to every process
    at every step. It follows the module from device to device all the same.

    `keep`: hold the effective weight from one step's first forward pass to its end, at the price of its memory.
    """

    def __init__(self, A: Tensor, B: Tensor, *, scale: float | None, mask: Tensor | None) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.scale = scale
        self.mask = mask
        self.keep = False
        self.held: Tensor | None = None  # the kept weight, while a compiled program runs: it cannot ask `built`
        self._built: tuple[tuple[Any, ...], Tensor] = ((), A)

    def terms(self, weight: Tensor) -> Terms:
        """What the effective weight of `weight` is made of."""
        return Terms(weight, self.A, self.B, self.mask, self.scale)

    @torch.no_grad()
    def built(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The effective weight in `dtype`; the same tensor until A, B or the weight are changed in place."""
        parts = (weight, self.A, self.B)
        state = (dtype, *((part.data_ptr(), part._version) for part in parts))
        if self._built[0] != state:
            self._built = ((), weight)  # frees the old one first
            with no_autocast(weight):
                self._built = (state, effective_weight(self.terms(weight), dtype))
        return self._built[1]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factors:
        super()._apply(fn, recurse)
        self.mask = None if self.mask is None else fn(self.mask)
        return self

    def extra_repr(self) -> str:
        """Shapes and rule, for print(model)."""
        rule = "W*(BA)" if self.scale is None else f"W + {self.scale:g} {'BA' if self.mask is None else 'M*(BA)'}"
        return f"{tuple(self.B.shape)} x {tuple(self.A.shape)}, {rule}"


class _AdaptedLinear(nn.Module):
    """What both adapter modules hold: the layer's own weight and bias, and the factors."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, factors: Factors, *, transposed: bool) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias
        self.factors = factors
        self.transposed = transposed
        self.out_features, self.in_features = factors.B.shape[0], factors.A.shape[1]

    def matrix(self) -> Tensor:
        """The weight seen as (out, in)."""
        return self.weight.t() if self.transposed else self.weight


class EffectiveLinear(_AdaptedLinear):
    """A linear layer (stored (out, in), or (in, out) where `transposed`) that computes with its effective weight."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        weight, held = self.matrix(), None
        if torch.compiler.is_compiling():
            held = self.factors.held if self.factors.keep and torch.is_grad_enabled() else None
        elif self.factors.keep and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            held = self.factors.built(weight, product_dtype(weight))
        return effective_linear(x, self.factors.terms(weight), self.bias, held=held)


class LowRankLinear(_AdaptedLinear):
    """A linear layer with a low-rank path beside it, y = x W^T + c (x A^T) B^T: no matrix of the weight's size."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        f = self.factors
        assert f.scale is not None
        weight = self.matrix()
        flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
        y = F.linear(flat, weight, None if self.bias is None else self.bias.to(weight.dtype))
        h = F.linear(flat, f.A.to(x.dtype))  # (tokens, r)
        y.addmm_(h.to(y.dtype), (f.B * f.scale).to(y.dtype).t())  # in place: the sum costs no pass of its own
        return y.view(*x.shape[:-1], y.shape[-1])


class AdaptedWeight(nn.Module):
    """The parametrization of a weight that no linear module owns alone: stacked experts, convolutions, tied weights.

    Maps the stored parameter to the effective one, of the same shape and dtype. Between `open_` and `close_` (one
    forward of the owner) it is built once: experts are read one by one.
    """

    def __init__(self, factors: Factors, *, transposed: bool, experts: tuple[int, ...] | None) -> None:
        super().__init__()
        self.factors = factors
        self.transposed = transposed
        self.experts = experts  # None: every one, or the parameter is a single matrix
        self._open = 0
        self._built: Tensor | None = None

    def forward(self, stored: Tensor) -> Tensor:
        """The effective parameter, in the stored shape and dtype."""
        if self._built is not None:
            return self._built
        f = self.factors
        W = matrices(stored, stacked=f.A.ndim == 3, transposed=self.transposed)
        if self.experts is None:
            effective = effective_parameter(f.terms(W))
        else:
            index = torch.tensor(self.experts, device=W.device)
            effective = W.index_copy(0, index, effective_parameter(f.terms(W[index])))
        effective = (effective.mT if self.transposed else effective).reshape(stored.shape)
        if self._open:
            self._built = effective
        return effective

    def open_(self, *_: Any) -> None:
        """Forward pre-hook of the owner."""
        self._open += 1

    def close_(self, *_: Any) -> None:
        """Forward hook of the owner, run even after an error."""
        self._open = max(0, self._open - 1)
        if not self._open:
            self._built = None
