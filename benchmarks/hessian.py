"""Gram matrix X^T X of calibration inputs

    python benchmarks/hessian.py
    python benchmarks/hessian.py --device cpu --scale 0.03    # scales down

4,096 tokens of bfloat16 are added to a float32 matrix of 28,672 columns. The textbook algorithm is the published one:
it rescales the sums and adds a float32 product of float32 copies. Products of two 16-bit numbers are exact in float32:
nothing is lost by leaving the operands as they are. The note gives both errors against float64.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from claims import Cost, Row, cost, floor_ms, main, sized
from torch import Tensor

from prunus.layers import Inputs


def textbook_(hessian: Tensor, x: Tensor, seen: int) -> None:
    """The running mean of 2 x x^T over sequences, one more added."""
    hessian *= seen / (seen + 1)
    rows = x.t().float() * (2 / (seen + 1)) ** 0.5
    hessian += rows.matmul(rows.t())


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """One batch added, and the upper half completed once."""
    columns, tokens = sized(28672, args), sized(4096, args)
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(args.seed)).to(args.device, torch.bfloat16)
    shape = f"{tokens} tokens x {columns} bfloat16"
    errors = f"relative errors {_error(x, True):.1e}, textbook {_error(x, False):.1e}"
    added, completed = _ours(args, x)
    textbook = _textbook(args, x)
    half = 4 * columns * (columns + 1) // 2  # bytes of a triangle
    floor = floor_ms(args, moved=2 * half + x.nbytes, operations=tokens * columns * (columns + 1))
    yield from [
        Row("Gram matrix, one batch added", shape, "float32 products of float32 copies", added.ms, textbook.ms,
            floor, added.extra_bytes, textbook.extra_bytes, target=10, note=errors),
        Row("Gram matrix, completed once when read", f"{columns} x {columns} float32", "", completed.ms, None,
            floor_ms(args, moved=2 * half), completed.extra_bytes),
    ]  # fmt: skip


def _ours(args: argparse.Namespace, x: Tensor) -> tuple[Cost, Cost]:
    inputs = Inputs(x.shape[1], gram=True, device=args.device)

    def complete() -> None:
        inputs._half = True  # what add_ leaves on a GPU: reading then mirrors the lower triangle
        assert inputs.gram is not None

    return cost(lambda: inputs.add_(x), args), cost(complete, args)


def _textbook(args: argparse.Namespace, x: Tensor) -> Cost:
    hessian = torch.zeros(x.shape[1], x.shape[1], device=args.device)
    return cost(lambda: textbook_(hessian, x, 1), args, repeats=5)


def _error(x: Tensor, ours: bool) -> float:
    """||H - x^T x|| / ||x^T x|| over the first columns."""
    part = x[:, :1024]
    exact = part.double().T @ part.double()
    if ours:
        inputs = Inputs(part.shape[1], gram=True, device=x.device)
        inputs.add_(part)
        assert inputs.gram is not None
        found = inputs.gram.double()
    else:
        hessian = torch.zeros(part.shape[1], part.shape[1], device=x.device)
        textbook_(hessian, part, 0)
        found = hessian.double() / 2
    return float((found - exact).norm() / exact.norm())


if __name__ == "__main__":
    main(__doc__, measure)
