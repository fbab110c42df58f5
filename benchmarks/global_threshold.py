"""The largest scores of a whole matrix, and of a whole model: exact counts, ties by index, bounded memory.

    python benchmarks/global_threshold.py
    python benchmarks/global_threshold.py --device cpu --scale 0.02     # scales down

The textbook algorithm concatenates and sorts the scores and compares with the one in the middle; with ties it misses
the count. Ours is checked against the plain functions, bit for bit, at full size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping

import torch
from claims import Row, cost, floor_ms, main, sized
from torch import Tensor

from prunus.kernels.switch import kernels
from prunus.patterns.selection import keep_largest, keep_largest_of_all

AGAINST = "a sort of all scores"


def textbook(scores: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """The masks by one sort."""
    joined = torch.cat([score.flatten() for score in scores.values()])
    threshold = joined.sort().values[len(joined) - kept]
    return {name: score >= threshold for name, score in scores.items()}


def ours(scores: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """The masks, all tensors by one threshold."""
    return keep_largest_of_all(scores, kept)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """One matrix, of distinct scores and of scores that tie, and a small one; the blocks of a model; another share."""
    shape = sized(28672, args), sized(7168, args)
    yield of_a_matrix(args, *shape, torch.float32)
    yield of_a_matrix(args, *shape, torch.bfloat16)
    yield of_a_matrix(args, sized(4096, args), sized(4096, args), torch.float32)
    yield of_a_model(args, blocks=4, share=0.5)
    yield of_a_model(args, blocks=4, share=0.1)


def of_a_matrix(args: argparse.Namespace, out: int, in_: int, dtype: torch.dtype) -> Row:
    """Half of one matrix."""
    scores = {"weight": drawn(args, 0, out, in_).to(dtype)}
    score, kept = scores["weight"], out * in_ // 2
    check(scores, {"weight": keep_largest(score, kept)}, kept)
    mine = cost(lambda: keep_largest(score, kept), args)
    plain = cost(lambda: textbook(scores, kept), args, repeats=3)
    floor = floor_ms(args, moved=score.numel() * (score.element_size() + 1))
    return Row(
        "half of a matrix", f"{out} x {in_} {str(dtype)[6:]}", AGAINST, mine.ms, plain.ms, floor, mine.extra_bytes,
        plain.extra_bytes,
    )  # fmt: skip


def of_a_model(args: argparse.Namespace, blocks: int, share: float) -> Row:
    """A share of the blocks of a model of OPT-6.7B's shape."""
    wide, inner = sized(4096, args), sized(16384, args)
    shapes = [(wide, wide)] * 4 + [(inner, wide), (wide, inner)]
    scores = {f"{i}.{j}": drawn(args, 6 * i + j, *s) for i in range(blocks) for j, s in enumerate(shapes)}
    total = sum(score.numel() for score in scores.values())
    kept = round(share * total)
    check(scores, ours(scores, kept), kept)
    mine = cost(lambda: ours(scores, kept), args)
    plain = cost(lambda: textbook(scores, kept), args, repeats=3)
    return Row(
        f"{share:.0%} of {blocks} blocks together", f"{len(scores)} tensors, {total:,} float32", AGAINST, mine.ms,
        plain.ms, floor_ms(args, moved=total * 5), mine.extra_bytes, plain.extra_bytes,
    )  # fmt: skip


def drawn(args: argparse.Namespace, number: int, out: int, in_: int) -> Tensor:
    """Magnitudes of random weights, of another deviation in each tensor."""
    generator = torch.Generator(args.device).manual_seed(args.seed + number)
    return torch.randn(out, in_, generator=generator, device=args.device).abs_().mul_(0.02 + 0.001 * number)


def check(scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], kept: int) -> None:
    """Stop unless the masks are those of the plain functions."""
    with kernels(False):
        plain = ours(scores, kept)
    if not all(torch.equal(mask, plain[name]) for name, mask in masks.items()):
        raise AssertionError("the programs' masks differ from the plain functions'")


if __name__ == "__main__":
    main(__doc__, measure)
