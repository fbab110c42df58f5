"""A training step of one MaskLoRA layer

    python benchmarks/masklora.py
    python benchmarks/masklora.py --device cpu --scale 0.03    # scales down

Forward and backward of a layer 28,672 x 7,168 in bfloat16 on 4,096 tokens, r = 16, gradients of input, A and B. Against
the reference expression F.linear(x, W + c M (BA)) with all in bfloat16, against the same with A and B in float32 (as
training them wants it, and as ours has them), and against full fine-tuning of the layer.

Floor: three products of 2 x tokens x out x in operations, which full fine-tuning has too: with A and B in float32 no
exact step is faster, because the mask forbids reducing the product g^T x.

On an H100 the reference expression took 11.1 ms and full fine-tuning 6.87: 1.6 times faster than the former would be
6.94 ms, which leaves 0.07 ms to build W_eff twice and to reduce G, whose bytes alone take 0.8: no exact step does it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from claims import Cost, Row, cost, floor_ms, main, sized
from torch import Tensor, nn

from prunus.adapt.adapters import EffectiveLinear, Factors
from prunus.adapt.effective import Terms, effective_linear
from prunus.masks import pack
from prunus.patterns import NM

RANK, SCALE = 16, 2.0


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Ours against the three others."""
    W, M, A, B, x, g = layer(args)
    (out, in_), tokens, bits = W.shape, len(x), pack(M)

    def ours(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return effective_linear(x, Terms(W, A, B, bits, SCALE))

    def expression(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return F.linear(x, (W + SCALE * M * (B @ A)).to(x.dtype))

    A16, B16 = A.bfloat16(), B.bfloat16()
    exact = _step(expression, *(each.double() for each in (x, A, B, g)))
    gaps = [float((a - b).norm() / b.norm()) for a, b in zip(_step(ours, x, A, B, g), exact, strict=True)]
    error = f"relative errors of the gradients of x, A, B: {', '.join(f'{gap:.1e}' for gap in gaps)}"
    del exact
    mine = cost(lambda: _step(ours, x, A, B, g), args)
    kept = _kept(args, W, Factors(A, B, scale=SCALE, mask=bits), x, g)
    full = cost(lambda: _step(F.linear, x, W, g), args)
    rounded = cost(lambda: _step(expression, x, A16, B16, g), args)
    wide = cost(lambda: _step(expression, x, A, B, g), args)
    floor = floor_ms(args, operations=6 * tokens * out * in_)
    shape = f"{out} x {in_} bfloat16, {tokens} tokens, r = {RANK}"
    yield Row(
        "MaskLoRA layer step, W_eff kept until backward", shape, "full fine-tuning of the layer", kept.ms, full.ms,
        floor, kept.extra_bytes, full.extra_bytes, 1 / 1.15,
    )  # fmt: skip
    others = [
        ("full fine-tuning of the layer", full, 1 / 1.15, error),
        ("F.linear(x, W + c M (BA)), A and B bfloat16", rounded, 1.6, ""),
        ("F.linear(x, W + c M (BA)), A and B float32", wide, 1.6, ""),
    ]
    yield from [
        Row(
            "MaskLoRA layer step",
            shape,
            name,
            mine.ms,
            other.ms,
            floor,
            mine.extra_bytes,
            other.extra_bytes,
            target,
            note,
        )
        for name, other, target, note in others
    ]


def layer(args: argparse.Namespace) -> tuple[Tensor, ...]:
    """A 2:4 weight in bfloat16 and its mask, A and B in float32, tokens that enter and their gradient that leaves."""
    torch.manual_seed(args.seed)
    out, in_, tokens = sized(28672, args), sized(7168, args), sized(4096, args)
    W = torch.randn(out, in_, device=args.device).mul_(0.02).bfloat16()
    M = NM(2, 4).choose(W.float().abs(), 0)
    W.mul_(M)
    A, B = torch.randn(RANK, in_, device=args.device) * 0.01, torch.randn(out, RANK, device=args.device) * 0.01
    x, g = (torch.randn(tokens, n, device=args.device).bfloat16() for n in (in_, out))
    return W, M, A, B, x, g


def _step(run: Callable[..., Tensor], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Gradients of all tensors but the last, which is that of the output."""
    *leaves, g = (tensor.detach() for tensor in tensors)
    leaves = [leaf.requires_grad_() for leaf in leaves]
    return torch.autograd.grad(run(*leaves), leaves, g)


def _kept(args: argparse.Namespace, W: Tensor, factors: Factors, x: Tensor, g: Tensor) -> Cost:
    """The step of a layer that builds its effective weight once, after an optimizer has changed the factors."""
    layer = EffectiveLinear(nn.Parameter(W, False), None, factors, transposed=False)
    factors.keep = True
    leaves = [x.detach().requires_grad_(), factors.A, factors.B]

    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            factors.A.mul_(1.0)
        return torch.autograd.grad(layer(leaves[0]), leaves, g)

    return cost(run, args)


if __name__ == "__main__":
    main(__doc__, measure)
