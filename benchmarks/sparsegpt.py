"""SparseGPT of one layer

    python benchmarks/sparsegpt.py
    python benchmarks/sparsegpt.py --device cpu --scale 0.03    # scales down

From weight and Gram matrix to new weight and mask, factorisation included. The textbook algorithm is the published one:
two Cholesky factorisations around an explicit inverse, then a Python loop over the columns of every block of 128. Both
choose half of the weights over each block of columns (the published code by a threshold, and one too many per block),
or 2:4. The note compares ||X (W - W')||^2.

Floor: operations at the rate of a large float32 product measured here, n^3/3 for one factorisation, n^3/3 for the
inverse of a triangle, and rows n^2 for the updates.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from claims import Row, cost, main, sized
from torch import Tensor

from prunus.layers import Inputs, Layer
from prunus.patterns import NM, Pattern, Unstructured
from prunus.solve.sweep import sparsegpt

SHAPES = ((7168, 28672, 5), (4096, 4096, 15))  # out, in, how many times faster is aimed at


def textbook(weight: Tensor, gram: Tensor, pattern: Pattern, damping: float = 0.01, blocksize: int = 128) -> Tensor:
    """The published algorithm, at 50 % or N:M; returns the new weight."""
    W, H = weight.float(), gram.clone()
    columns = W.shape[1]
    dead = H.diagonal() == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    H.diagonal().add_(damping * H.diagonal().mean())
    U = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    for start in range(0, columns, blocksize):
        stop = min(start + blocksize, columns)
        block, own = W[:, start:stop].clone(), U[start:stop, start:stop]
        solved, errors = torch.zeros_like(block), torch.zeros_like(block)
        pruned = torch.zeros_like(block, dtype=torch.bool)
        if not isinstance(pattern, NM):
            score = block**2 / own.diagonal()[None] ** 2
            pruned = score <= score.flatten().sort().values[score.numel() // 2]
        for j in range(stop - start):
            if isinstance(pattern, NM) and j % pattern.m == 0:
                group = block[:, j : j + pattern.m] ** 2 / own.diagonal()[None, j : j + pattern.m] ** 2
                pruned.scatter_(1, j + group.topk(pattern.m - pattern.n, dim=1, largest=False).indices, True)
            column = block[:, j].clone()
            solved[:, j] = column.masked_fill(pruned[:, j], 0)
            error = (column - solved[:, j]) / own[j, j]
            block[:, j:] -= error[:, None] * own[j, j:][None]
            errors[:, j] = error
        W[:, start:stop] = solved
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W.to(weight.dtype)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Both shapes, half of the weights and 2:4."""
    rate = float32_rate(args)
    for out, in_, target in SHAPES:
        for pattern in (Unstructured("layer"), NM(2, 4)):
            yield _row(args, rate, sized(out, args), sized(in_, args), pattern, target)


def _row(args: argparse.Namespace, rate: float, out: int, in_: int, pattern: Pattern, target: float) -> Row:
    layer = make_layer(args, out, in_)
    assert layer.inputs is not None
    gram = layer.inputs.gram
    assert gram is not None
    kept = out * in_ // 2
    ours = cost(lambda: sparsegpt().solve(layer, pattern, kept), args, repeats=3)
    published = cost(lambda: textbook(layer.weight, gram, pattern), args, repeats=1)
    found = output_error(layer.weight, sparsegpt().solve(layer, pattern, kept)[0], gram)
    expected = output_error(layer.weight, textbook(layer.weight, gram, pattern), gram)
    floor = (2 * in_**3 / 3 + out * in_**2) / rate
    return Row(
        f"SparseGPT, {'2:4' if isinstance(pattern, NM) else '50 %'}", f"{out} x {in_} bfloat16", "published algorithm",
        ours.ms, published.ms, floor, ours.extra_bytes, published.extra_bytes, target,
        note=f"layer error {found / expected - 1:+.2%} of the textbook's",
    )  # fmt: skip


def make_layer(args: argparse.Namespace, out: int, in_: int) -> Layer:
    """Random weights, and inputs of unequal scale that share a component, 4,096 tokens at full scale."""
    torch.manual_seed(args.seed)
    inputs = Inputs(in_, gram=True, device=args.device)
    scale = torch.randn(in_, device=args.device).mul_(0.5).exp_()
    for _ in range(2):
        x = torch.randn(sized(2048, args), in_, device=args.device)
        x += torch.randn(len(x), 1, device=args.device)
        inputs.add_((x * scale).bfloat16())
    return Layer("layer", torch.randn(out, in_, device=args.device).mul_(0.02).bfloat16(), inputs)


def output_error(weight: Tensor, new: Tensor, gram: Tensor) -> float:
    """||X (W - W')^T||^2."""
    change = weight.float() - new.float()
    return float(((change @ gram) * change).sum(dtype=torch.float64))


def float32_rate(args: argparse.Namespace) -> float:
    """Operations a millisecond of a large float32 product."""
    n = sized(8192, args)
    x = torch.randn(n, n, device=args.device)
    return 2 * n**3 / cost(lambda: x @ x, args).ms


if __name__ == "__main__":
    main(__doc__, measure)
