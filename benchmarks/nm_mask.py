"""N:M masks: the best n of every m consecutive weights.

    python benchmarks/nm_mask.py
    python benchmarks/nm_mask.py --device cpu --scale 0.02     # scales down

The textbook algorithm is that of the published Wanda and SparseGPT code: one topk and one scatter for every m columns.
Ours is checked against the plain functions, bit for bit, at full size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from claims import Cost, Row, cost, floor_ms, main, sized
from torch import Tensor

from prunus.kernels.switch import kernels
from prunus.patterns import NM, mask_scaled, scaled


def textbook(score: Tensor, n: int, m: int) -> Tensor:
    """The mask, group of columns by group of columns."""
    pruned = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, score.shape[1], m):
        worst = score[:, start : start + m].topk(m - n, dim=1, largest=False).indices
        pruned.scatter_(1, start + worst, True)
    return ~pruned


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """From a float32 score, and from weight and norms at once, at two shapes; other groups at one."""
    tall, wide = sized(28672, args), sized(7168, args)
    yield from compare(args, tall, wide, NM(2, 4), target=100)
    yield from compare(args, wide, tall, NM(2, 4), target=100)
    yield from compare(args, tall, wide, NM(4, 8))
    yield from compare(args, tall, wide, NM(16, 32))


def compare(args: argparse.Namespace, out: int, in_: int, pattern: NM, target: float | None = None) -> list[Row]:
    """One row for a score that is there, one for Wanda's from a bfloat16 weight."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    weight = torch.randn(out, in_, generator=generator, device=args.device).mul_(0.02).bfloat16()
    norms = torch.randn(in_, generator=generator, device=args.device).exp_()
    return [of_a_score(args, scaled(weight, norms), pattern, target), of_a_weight(args, weight, norms, pattern, target)]


def of_a_score(args: argparse.Namespace, score: Tensor, pattern: NM, target: float | None) -> Row:
    """From a score to its mask."""
    kept = pattern.counts((score.shape[0], score.shape[1]))
    with kernels(False):
        plain = pattern.choose(score, kept)
    check(pattern.choose(score, kept), plain)
    ours = cost(lambda: pattern.choose(score, kept), args)
    return row(args, f"{pattern} mask of a score", score, score, ours, pattern, target)


def of_a_weight(args: argparse.Namespace, weight: Tensor, norms: Tensor, pattern: NM, target: float | None) -> Row:
    """From weight and norms to the mask."""
    kept = pattern.counts((weight.shape[0], weight.shape[1]))
    with kernels(False):
        plain = mask_scaled(pattern, weight, norms, kept)
    check(mask_scaled(pattern, weight, norms, kept), plain)
    ours = cost(lambda: mask_scaled(pattern, weight, norms, kept), args)
    return row(args, f"{pattern} Wanda, from the weight", weight, scaled(weight, norms), ours, pattern, target)


def row(
    args: argparse.Namespace, name: str, read: Tensor, score: Tensor, ours: Cost, pattern: NM, target: float | None
) -> Row:
    """The line of the table; the textbook algorithm is given the score."""
    plain = cost(lambda: textbook(score, pattern.n, pattern.m), args, repeats=2)
    shape = f"{read.shape[0]} x {read.shape[1]} {str(read.dtype)[6:]}"
    floor = floor_ms(args, moved=read.numel() * (read.element_size() + 1))
    against = f"a topk and a scatter for every {pattern.m} columns"
    return Row(name, shape, against, ours.ms, plain.ms, floor, ours.extra_bytes, plain.extra_bytes, target)


def check(ours: Tensor, plain: Tensor) -> None:
    """Stop if the masks differ."""
    if not torch.equal(ours, plain):
        raise AssertionError(f"the program's mask differs from the plain function's in {int((ours != plain).sum())}")


if __name__ == "__main__":
    main(__doc__, measure)
