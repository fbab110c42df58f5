"""The adapters' products as operators that torch.compile leaves alone, so that a block stays one program around them.

    program:  norm ── effective_linear ── relu ── effective_linear ── + ...      each runs as it does uncompiled

What is inside an operator is never traced: the effective weight has the bits that merging gives it, and programs for
GPUs are launched as they are. Outside of torch.compile `adapters` uses its own autograd functions, which save less.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunus.adapt.effective import effective_weight, reduce_tiles, weight_gradients
from prunus.machine import no_autocast

__all__ = ["effective_linear", "effective_parameter"]


@torch.library.custom_op("prunus::effective_linear", mutates_args=())
def effective_linear(
    x: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    scale: float | None,
    dtype: torch.dtype,
    held: Tensor | None,
) -> Tensor:
    """x W_eff^T + bias, (tokens, in) -> (tokens, out). held: the effective weight in `dtype` where it is built already.

    >>> W, A, B = torch.ones(3, 4), torch.ones(2, 4), torch.zeros(3, 2)
    >>> effective_linear(torch.ones(1, 4), W, None, A, B, None, 1.0, torch.float32, None)
    tensor([[4., 4., 4.]])
    """
    with no_autocast(x):
        effective = _effective(weight, mask, A, B, scale, dtype, held)
        return F.linear(x, effective, None if bias is None else bias.to(dtype))


@torch.library.custom_op("prunus::effective_linear_input", mutates_args=())
def _input_gradient(
    g: Tensor,
    weight: Tensor,
    mask: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | None,
    dtype: torch.dtype,
    held: Tensor | None,
) -> Tensor:
    with no_autocast(g):
        return g @ _effective(weight, mask, A, B, scale, dtype, held)


@torch.library.custom_op("prunus::effective_linear_factors", mutates_args=())
def _factor_gradients(
    g: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    with no_autocast(g):
        return weight_gradients(g.contiguous(), x, weight, mask, A, B, scale)


@torch.library.custom_op("prunus::effective_parameter", mutates_args=())
def effective_parameter(weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None) -> Tensor:
    """W_eff itself, in the weight's shape and dtype.

    >>> effective_parameter(torch.ones(1, 2), None, torch.ones(1, 2), torch.ones(1, 1), 0.5)
    tensor([[1.5000, 1.5000]])
    """
    with no_autocast(weight):
        return effective_weight(weight, A, B, mask=mask, scale=scale)


@torch.library.custom_op("prunus::effective_parameter_factors", mutates_args=())
def _parameter_gradients(
    g: Tensor, weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    with no_autocast(weight):
        return reduce_tiles(lambda rows: g[rows].to(A.dtype, copy=True), weight, mask, A, B, scale)


def _effective(
    weight: Tensor,
    mask: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float | None,
    dtype: torch.dtype,
    held: Tensor | None,
) -> Tensor:
    return effective_weight(weight, A, B, mask=mask, scale=scale, dtype=dtype) if held is None else held


@effective_linear.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@_input_gradient.register_fake
def _(g: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return g.new_empty(g.shape[0], weight.shape[1])


@_factor_gradients.register_fake
def _(g: Tensor, x: Tensor, weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None) -> Any:
    return A.new_empty(A.shape), B.new_empty(B.shape)


@effective_parameter.register_fake
def _(weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight)


@_parameter_gradients.register_fake
def _(g: Tensor, weight: Tensor, mask: Tensor | None, A: Tensor, B: Tensor, scale: float | None) -> Any:
    return A.new_empty(A.shape), B.new_empty(B.shape)


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, mask, A, B, bias, ctx.scale, ctx.dtype, held = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight, mask, A, B, held)


def _linear_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, mask, A, B, held = ctx.saved_tensors
    needs_x, _, _, needs_A, needs_B, needs_bias, *_ = ctx.needs_input_grad
    dx = dA = dB = dbias = None
    if needs_x:
        dx = _input_gradient(g, weight, mask, A, B, ctx.scale, ctx.dtype, held)
    if needs_A or needs_B:
        dA, dB = _factor_gradients(g, x, weight, mask, A, B, ctx.scale)
    if needs_bias:
        dbias = g.sum(0, dtype=torch.promote_types(g.dtype, torch.float32)).to(ctx.bias_dtype)
    return dx, None, None, dA, dB, dbias, None, None, None


def _keep_parameter(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _parameter_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    dA, dB = _parameter_gradients(g, *ctx.saved_tensors, ctx.scale)
    return None, None, dA, dB, None


effective_linear.register_autograd(_linear_backward, setup_context=_keep_linear)
effective_parameter.register_autograd(_parameter_backward, setup_context=_keep_parameter)
