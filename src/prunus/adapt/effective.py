"""The effective weight of a low-rank adapter, the product with it, and the gradients of both.

    MaskLoRA   y = x (W + c M*(BA))^T       G = dL/dW_eff = g^T x,  dB = c (M*G) A^T,  dA = c B^T (M*G)
    ScaleLoRA  y = x (W * (BA))^T                                   dB =   (W*G) A^T,  dA =   B^T (W*G)

W_eff is rebuilt in backward, and G reduced by row tiles straight into dA and dB; on CUDA by programs
(`kernels/effective.py`). W_eff is rounded exactly as the merged weight will be, so merging changes nothing.

Each function stands here twice: as an autograd function, which saves least, and as an operator that torch.compile
leaves alone, so that a block stays one program around its adapters and what is inside has the same bits:

    program:  norm ── effective_linear ── relu ── effective_linear ── + ...

Both take their terms flat, as torch demands. The modules that hold the factors are in `adapters`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from prunus.kernels import uses_kernels
from prunus.machine import no_autocast, product_dtype
from prunus.masks import kept_rows

_RANK, _RANK_WIDE = 64, 32  # largest of an adapter in kernels, of float32 weights: more would not fit into registers
_TILE = 1 << 22  # entries of W_eff and G formed at once: 16 MiB of float32, wide enough to keep a GPU busy


class Terms(NamedTuple):
    """What an effective weight is made of: W + scale * M*(BA), or W * (BA) where `scale` is None.

    weight: (out, in) or (experts, out, in), any float dtype, any strides; gets no gradient.
    A, B: (r, in) and (out, r), or with a leading experts dimension; float32.
    mask: bool, shape of `weight`, True kept, or that of a matrix packed by `masks.pack`; None is all True.
    """

    weight: Tensor
    A: Tensor
    B: Tensor
    mask: Tensor | None
    scale: float | None


def effective_weight(terms: Terms, dtype: torch.dtype | None = None) -> Tensor:
    """W_eff, formed by tiles in A's dtype (float32), or float64 for such a W, rounded to W's dtype, then cast to
    `dtype` (default: W's).

    >>> effective_weight(Terms(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 1), None, 0.5))
    tensor([[1.5000, 1.5000]])
    """
    weight, A, B, mask, scale = terms
    out = torch.empty_like(weight, dtype=dtype or weight.dtype, requires_grad=False)
    if _in_kernels(weight, A):
        from prunus.kernels import build_

        build_(out, weight, A, B, mask, scale=1.0 if scale is None else scale, product=scale is None)
        return out
    wide = torch.promote_types(weight.dtype, A.dtype)
    for rows in tiles(weight):
        left = (B[rows] if scale is None else B[rows] * scale).to(wide)  # as LoRA's own path rounds it
        update = left @ (A[rows] if A.ndim == 3 else A).to(wide)
        if scale is None:
            update.mul_(weight[rows])
        elif mask is None:
            update.add_(weight[rows])
        else:
            update.mul_(kept_rows(mask, rows, weight.shape[1])).add_(weight[rows])
        out[rows] = update.to(weight.dtype)
    return out


def effective_linear(x: Tensor, terms: Terms, bias: Tensor | None = None, *, held: Tensor | None = None) -> Tensor:
    """x W_eff^T + bias   (MaskLoRA and ScaleLoRA; Zimmer et al. 2023, PERP, section 3).

    x: (..., in) in the weight's dtype; under autocast any float dtype. bias: (out,).
    held: the effective weight in the product's dtype, where it is built already.

    >>> W, A, B = torch.ones(3, 4), torch.ones(2, 4), torch.zeros(3, 2)
    >>> effective_linear(torch.ones(1, 4), Terms(W, A, B, None, 1.0))
    tensor([[4., 4., 4.]])
    """
    dtype = product_dtype(terms.weight)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(dtype)
    flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
    if torch.compiler.is_compiling():
        y = _linear(flat, bias, dtype, held, *terms)
    else:
        needs_x = None
        if any(each.requires_grad for each in (flat, terms.A, terms.B)) and torch.is_grad_enabled():
            needs_x = flat.requires_grad
            flat = _Saved.apply(flat, *terms[:4])
        y = _Linear.apply(flat, bias, _How(dtype, held, needs_x), *terms)  # (tokens, out)
    return y.view(*x.shape[:-1], y.shape[-1])  # a view made inside the function could not be changed in place


def effective_parameter(terms: Terms) -> Tensor:
    """W_eff itself, in the weight's shape and dtype: for weights that a module reads as a parameter."""
    return _parameter(*terms) if torch.compiler.is_compiling() else _Parameter.apply(*terms)  # type: ignore[no-any-return]


def weight_gradients(g: Tensor, x: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """dL/dA and dL/dB where G = g^T x; g: (tokens, out), x: (tokens, in)."""
    weight, A, B, mask, scale = terms
    if not _in_kernels(weight, A):
        return factor_gradients(_products(g, x, A.dtype), terms)
    from prunus.kernels import reduce

    return reduce(g, x, weight, A, B, mask, scale=1.0 if scale is None else scale, product=scale is None)


def tiles(weight: Tensor) -> Iterator[slice]:
    """Slices of the first dimension (rows, or whole experts) of about _TILE entries."""
    step = max(1, _TILE // max(1, math.prod(weight.shape[1:])))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)


def _in_kernels(weight: Tensor, A: Tensor) -> bool:
    """Whether programs take the adapter: of a matrix, not of a stack, and of a rank that fits into registers."""
    most = {torch.bfloat16: _RANK, torch.float16: _RANK, torch.float32: _RANK_WIDE}.get(weight.dtype, 0)
    return A.ndim == 2 and len(A) <= most and A.dtype == torch.float32 and uses_kernels(weight)


def _effective(terms: Terms, dtype: torch.dtype, held: Tensor | None) -> Tensor:
    return effective_weight(terms, dtype) if held is None else held


def _product(x: Tensor, effective: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, effective, None if bias is None else bias.to(effective.dtype))


def _bias_gradient(g: Tensor, dtype: torch.dtype) -> Tensor:
    return g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(dtype)


def _parameter_gradients(G: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """dL/dA and dL/dB from the whole gradient of W_eff."""
    return factor_gradients(lambda rows: G[rows].to(terms.A.dtype, copy=True), terms)


def _products(g: Tensor, x: Tensor, dtype: torch.dtype) -> Callable[[slice], Tensor]:
    """Row tiles of G = g^T x in `dtype`; on CUDA 16-bit operands are not widened: float32 holds their products."""
    if g.dtype == dtype:
        return lambda rows: g[:, rows].t() @ x
    if g.is_cuda and dtype == torch.float32:
        return lambda rows: torch.mm(g[:, rows].t(), x, out_dtype=torch.float32)
    wide = x.to(dtype)
    return lambda rows: g[:, rows].to(dtype).t() @ wide


def factor_gradients(tile: Callable[[slice], Tensor], terms: Terms) -> tuple[Tensor, Tensor]:
    """dL/dA and dL/dB from row tiles of G = dL/dW_eff, each dropped as soon as it is used."""
    weight, A, B, mask, scale = terms
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
    return _scaled(dA, dB, scale)


def _scaled(dA: Tensor, dB: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    return (dA, dB) if scale is None else (dA.mul_(scale), dB.mul_(scale))


# Autograd functions


class _How(NamedTuple):
    """Besides its terms, what a product needs to know.

    needs_x: where x comes out of `_Saved`, whether what entered there needs a gradient (what leaves it always does);
    None where it does not. held: see `effective_linear`; it lives anyway.
    """

    dtype: torch.dtype
    held: Tensor | None
    needs_x: bool | None


class _Saved(torch.autograd.Function):
    """x itself; its node holds what `_Linear` needs in backward, which has nothing to save afterwards.

    Recomputation of a block stops at the last thing saved, so it need not form the last layer's product again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *terms: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, *terms)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        return (grads[0] if ctx.needs_input_grad[0] else None), None, None, None, None


class _Linear(torch.autograd.Function):
    """x W_eff^T + bias, saving nothing of W_eff's size."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, how: _How, *terms: Any) -> Tensor:
        ctx.dtype, ctx.held, ctx.needs_x = how
        ctx.node = None if how.needs_x is None else x.grad_fn
        if how.needs_x is None:
            ctx.save_for_backward(x, *terms[:4])
        ctx.scale, ctx.bias_dtype = terms[4], None if bias is None else bias.dtype
        with no_autocast(x):
            return _product(x, _effective(Terms(*terms), how.dtype, how.held), bias)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        needs_x, needs_bias, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
        needs_x = needs_x if ctx.needs_x is None else ctx.needs_x
        x, *tensors = (ctx.node or ctx).saved_tensors
        terms = Terms._make((*tensors, ctx.scale))
        g = grads[0].contiguous()  # (tokens, out)
        dx = dA = dB = dbias = None
        with no_autocast(x):
            if needs_x:
                held, ctx.held = ctx.held, None
                dx = g @ _effective(terms, ctx.dtype, held)
                del held
            if needs_A or needs_B:
                dA, dB = weight_gradients(g, x, terms)
            if needs_bias:
                dbias = _bias_gradient(g, ctx.bias_dtype)
        return dx, dbias, None, None, dA, dB, None, None


class _Parameter(torch.autograd.Function):
    """W_eff itself, saving A and B only."""

    @staticmethod
    def forward(ctx: Any, *terms: Any) -> Tensor:
        *tensors, ctx.scale = terms
        ctx.save_for_backward(*tensors)
        with no_autocast(terms[0]):
            return effective_weight(Terms(*terms))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        terms = Terms._make((*ctx.saved_tensors, ctx.scale))
        with no_autocast(terms.weight):
            dA, dB = _parameter_gradients(grads[0], terms)
        return None, dA, dB, None, None


# Operators

_TERMS = "Tensor weight, Tensor A, Tensor B, Tensor? mask, float? scale"


def _operator(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    return torch.library.custom_op(f"prunus::{name}", mutates_args=(), schema=schema)


@_operator("effective_linear", f"(Tensor x, Tensor? bias, ScalarType dtype, Tensor? held, {_TERMS}) -> Tensor")
def _linear(x: Tensor, bias: Tensor | None, dtype: torch.dtype, held: Tensor | None, *terms: Any) -> Tensor:
    with no_autocast(x):
        return _product(x, _effective(Terms(*terms), dtype, held), bias)


@_operator("effective_linear_input", f"(Tensor g, ScalarType dtype, Tensor? held, {_TERMS}) -> Tensor")
def _linear_input(g: Tensor, dtype: torch.dtype, held: Tensor | None, *terms: Any) -> Tensor:
    with no_autocast(g):
        return g @ _effective(Terms(*terms), dtype, held)


@_operator("effective_linear_factors", f"(Tensor g, Tensor x, {_TERMS}) -> (Tensor, Tensor)")
def _linear_factors(g: Tensor, x: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    with no_autocast(g):
        return weight_gradients(g.contiguous(), x, Terms(*terms))


@_operator("effective_parameter", f"({_TERMS}) -> Tensor")
def _parameter(*terms: Any) -> Tensor:
    with no_autocast(terms[0]):
        return effective_weight(Terms(*terms))


@_operator("effective_parameter_factors", f"(Tensor g, {_TERMS}) -> (Tensor, Tensor)")
def _parameter_factors(g: Tensor, *terms: Any) -> tuple[Tensor, Tensor]:
    with no_autocast(g):
        return _parameter_gradients(g, Terms(*terms))


def _like_factors(terms: Terms) -> tuple[Tensor, Tensor]:
    return terms.A.new_empty(terms.A.shape), terms.B.new_empty(terms.B.shape)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.dtype, held, *tensors, ctx.scale = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, held, *tensors)


def _linear_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, held, *tensors = ctx.saved_tensors
    terms = Terms._make((*tensors, ctx.scale))
    needs_x, needs_bias, _, _, _, needs_A, needs_B, *_ = ctx.needs_input_grad
    dx = _linear_input(g, ctx.dtype, held, *terms) if needs_x else None
    dA, dB = _linear_factors(g, x, *terms) if needs_A or needs_B else (None, None)
    dbias = _bias_gradient(g, ctx.bias_dtype) if needs_bias else None
    return dx, dbias, None, None, None, dA, dB, None, None


def _keep_parameter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _parameter_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    return None, *_parameter_factors(g, *ctx.saved_tensors, ctx.scale), None, None


_linear.register_fake(lambda x, *rest: x.new_empty(x.shape[0], rest[3].shape[0]))
_linear_input.register_fake(lambda g, dtype, held, *terms: g.new_empty(g.shape[0], terms[0].shape[1]))
_linear_factors.register_fake(lambda g, x, *terms: _like_factors(Terms(*terms)))
_parameter.register_fake(lambda *terms: torch.empty_like(terms[0]))
_parameter_factors.register_fake(lambda g, *terms: _like_factors(Terms(*terms)))
_linear.register_autograd(_linear_backward, setup_context=_keep_linear)
_parameter.register_autograd(_parameter_backward, setup_context=_keep_parameter)
