"""Low-rank adapters of one weight: the effective weight, its gradients, and the modules that use them.

    MaskLoRA   y = x (W + c M*(BA))^T       G = dL/dW_eff = g^T x,  dB = c (M*G) A^T,  dA = c B^T (M*G)
    ScaleLoRA  y = x (W * (BA))^T                                   dB =   (W*G) A^T,  dA =   B^T (W*G)
    LoRA       y = x W^T + c (x A^T) B^T    two thin products, nothing of the weight's size

One autograd function serves the first two. It keeps x, A and B (and refers to W and M, which live anyway), rebuilds
W_eff in backward, and reduces G by row tiles straight into dA and dB; on CUDA by programs (`kernels/effective.py`).
W_eff is rounded exactly as the merged weight will be, so merging changes nothing. Which parameters train, and merging,
are in `adapt.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prunus.adapt.factors import matrices
from prunus.kernels import uses_kernels
from prunus.machine import no_autocast, product_dtype
from prunus.masks import kept_rows

__all__ = ["effective_weight", "mask_lora_linear", "scale_lora_linear"]

_RANK, _RANK_WIDE = 64, 32  # largest of an adapter in kernels, of float32 weights: more would not fit into registers
_TILE = 1 << 22  # entries of W_eff and G formed at once: 16 MiB of float32, wide enough to keep a GPU busy


def effective_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The weight that an adapter stands for: W + scale * M*(BA), or W * (BA) where `scale` is None.

    Formed by tiles in A's dtype (float32), rounded to W's dtype, then cast to `dtype` (default: W's).

    Args:
        weight: (out, in) or (experts, out, in), any float dtype, any strides.
        A, B: (r, in) and (out, r), or with a leading experts dimension; float32.
        mask: bool, shape of `weight`, True kept, or that of a matrix packed by `bits.pack`; None is all True.
    """
    out = torch.empty_like(weight, dtype=dtype or weight.dtype, requires_grad=False)
    if _in_kernels(weight, A):
        from prunus.kernels import build_

        build_(out, weight, A, B if scale is None else B * scale, mask, product=scale is None)
        return out
    for rows in tiles(weight):
        update = (B[rows] if scale is None else B[rows] * scale) @ (A[rows] if A.ndim == 3 else A)
        if scale is None:
            update.mul_(weight[rows])
        elif mask is None:
            update.add_(weight[rows])
        else:
            update.mul_(kept_rows(mask, rows, weight.shape[1])).add_(weight[rows])
        out[rows] = update.to(weight.dtype)
    return out


def mask_lora_linear(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *, mask: Tensor | None, scale: float, bias: Tensor | None = None
) -> Tensor:
    """x (W + scale * M*(BA))^T + bias   (MaskLoRA; Zimmer et al. 2023, PERP, section 3).

    Args:
        x: (..., in) in the weight's dtype; under autocast any float dtype.
        weight: (out, in), gets no gradient.   A: (r, in).   B: (out, r).   bias: (out,) or None.
        mask: (out, in) bool, True kept, or packed by `bits.pack`; None is all True.
    """
    return _linear(x, weight, mask, A, B, bias, scale)


def scale_lora_linear(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, *, bias: Tensor | None = None) -> Tensor:
    """x (W * (BA))^T + bias   (ScaleLoRA; Zimmer et al. 2023, PERP, section 3). Zeros of W stay zeros by themselves."""
    return _linear(x, weight, None, A, B, bias, None)


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

    @torch.no_grad()
    def built(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The effective weight in `dtype`; the same tensor until A, B or the weight are changed in place."""
        parts = (weight, self.A, self.B)
        state = (dtype, *((part.data_ptr(), part._version) for part in parts))
        if self._built[0] != state:
            self._built = ((), weight)  # frees the old one first
            with no_autocast(weight):
                new = effective_weight(weight, self.A, self.B, mask=self.mask, scale=self.scale, dtype=dtype)
            self._built = (state, new)
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
        f = self.factors
        compiled = torch.compiler.is_compiling()  # which cannot follow the last question
        keep = f.keep and torch.is_grad_enabled() and (compiled or not torch.is_inference_mode_enabled())
        return _linear(x, self.matrix(), f.mask, f.A, f.B, self.bias, f.scale, f if keep else None)


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
            effective = _weight(W, f.mask, f.A, f.B, f.scale)
        else:
            index = torch.tensor(self.experts, device=W.device)
            effective = W.index_copy(0, index, _weight(W[index], f.mask, f.A, f.B, f.scale))
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


def _linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scale: float | None,
    keeps: Factors | None = None,
) -> Tensor:
    dtype = product_dtype(weight)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(dtype)
    flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
    if torch.compiler.is_compiling():
        from prunus.adapt.operators import effective_linear

        held = None if keeps is None else keeps.held
        y = effective_linear(flat, weight, mask, A, B, bias, scale, dtype, held)
        return y.view(*x.shape[:-1], weight.shape[0])
    needs_x = None
    if any(each.requires_grad for each in (flat, A, B)) and torch.is_grad_enabled():
        needs_x = flat.requires_grad
        flat = _Saved.apply(flat, weight, mask, A, B)
    held = None if keeps is None else keeps.built(weight, dtype)
    y = _Linear.apply(flat, needs_x, weight, mask, A, B, bias, scale, dtype, held)  # (tokens, out)
    return y.view(*x.shape[:-1], weight.shape[0])  # a view made inside the function could not be changed in place


def _weight(weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None) -> Tensor:
    if torch.compiler.is_compiling():
        from prunus.adapt.operators import effective_parameter

        return effective_parameter(weight, mask, A, B, scale)
    return _Weight.apply(weight, mask, A, B, scale)  # type: ignore[no-any-return]


class _Saved(torch.autograd.Function):
    """x itself; its node holds what `_Linear` needs in backward, which has nothing to save afterwards.

    Recomputation of a block stops at the last thing saved, so it need not form the last layer's product again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, mask, A, B)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None, None


class _Linear(torch.autograd.Function):
    """x W_eff^T + bias, saving nothing of W_eff's size.

    needs_x: where x comes out of `_Saved`, whether what entered there needs a gradient (what leaves it always does);
    None where it does not.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        needs_x: bool | None,
        weight: Tensor,
        mask: Tensor | None,
        A: Tensor,
        B: Tensor,
        bias: Tensor | None,
        scale: float | None,
        dtype: torch.dtype,
        effective: Tensor | None,
    ) -> Tensor:
        ctx.needs_x, ctx.node = needs_x, None if needs_x is None else x.grad_fn
        if needs_x is None:
            ctx.save_for_backward(x, weight, mask, A, B)
        ctx.scale, ctx.dtype, ctx.bias_dtype = scale, dtype, None if bias is None else bias.dtype
        ctx.effective = effective  # lives anyway
        with no_autocast(x):
            if effective is None:
                effective = effective_weight(weight, A, B, mask=mask, scale=scale, dtype=dtype)
            return F.linear(x, effective, None if bias is None else bias.to(dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs_x, _, _, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
        needs_x = needs_x if ctx.needs_x is None else ctx.needs_x
        x, weight, mask, A, B = (ctx.node or ctx).saved_tensors
        g = grads[0].contiguous()  # (tokens, out)
        dx = dA = dB = dbias = None
        with no_autocast(x):
            if needs_x:
                effective, ctx.effective = ctx.effective, None
                if effective is None:
                    effective = effective_weight(weight, A, B, mask=mask, scale=ctx.scale, dtype=ctx.dtype)
                dx = g @ effective
                del effective
            if needs_A or needs_B:
                dA, dB = weight_gradients(g, x, weight, mask, A, B, ctx.scale)
            if needs_bias:
                dbias = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(ctx.bias_dtype)
        return dx, None, None, None, dA, dB, dbias, None, None, None


class _Weight(torch.autograd.Function):
    """W_eff itself, saving A and B only: for weights that a module reads as a parameter."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None) -> Tensor:
        ctx.save_for_backward(weight, mask, A, B)
        ctx.scale = scale
        with no_autocast(weight):
            return effective_weight(weight, A, B, mask=mask, scale=scale)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        weight, mask, A, B = ctx.saved_tensors
        with no_autocast(weight):
            dA, dB = reduce_tiles(lambda rows: grads[0][rows].to(A.dtype, copy=True), weight, mask, A, B, ctx.scale)
        return None, None, dA, dB, None


def _in_kernels(weight: Tensor, A: Tensor) -> bool:
    """Whether programs take the adapter: of a matrix, not of a stack, and of a rank that fits into registers."""
    most = {torch.bfloat16: _RANK, torch.float16: _RANK, torch.float32: _RANK_WIDE}.get(weight.dtype, 0)
    return A.ndim == 2 and len(A) <= most and A.dtype == torch.float32 and uses_kernels(weight)


def weight_gradients(
    g: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """dL/dA and dL/dB where G = g^T x."""
    if not _in_kernels(weight, A):
        return reduce_tiles(_products(g, x, A.dtype), weight, mask, A, B, scale)
    from prunus.kernels import reduce

    dA, dB = reduce(g, x, weight, A, B, mask, product=scale is None)
    return (dA, dB) if scale is None else (dA.mul_(scale), dB.mul_(scale))


def _products(g: Tensor, x: Tensor, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """Row tiles of G = g^T x in `dtype`; on CUDA 16-bit operands are not widened: float32 holds their products."""
    if g.dtype == dtype:
        return lambda rows: g[:, rows].t() @ x
    if g.is_cuda and dtype == torch.float32:
        return lambda rows: torch.mm(g[:, rows].t(), x, out_dtype=torch.float32)
    wide = x.to(dtype)
    return lambda rows: g[:, rows].to(dtype).t() @ wide


def reduce_tiles(
    tile: Callable[[slice], Tensor], weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """dL/dA and dL/dB from row tiles of G = dL/dW_eff, each dropped as soon as it is used."""
    dA, dB = torch.zeros_like(A), torch.zeros_like(B)
    for rows in tiles(weight):
        G = tile(rows)
        if scale is None:
            G.mul_(weight[rows])
        elif mask is not None:
            G.mul_(kept_rows(mask, rows, weight.shape[1]))
        if A.ndim == 3:
            dB[rows] = G @ A[rows].mT
            dA[rows] = B[rows].mT @ G
        else:
            dB[rows] = G @ A.t()
            dA += B[rows].t() @ G
    return (dA, dB) if scale is None else (dA.mul_(scale), dB.mul_(scale))


def tiles(weight: Tensor) -> Iterator[slice]:
    """Slices of the first dimension (rows, or whole experts) of about _TILE entries."""
    step = max(1, _TILE // max(1, math.prod(weight.shape[1:])))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
