"""Wanda, half of each row: the largest scores of every row.

    python benchmarks/row_selection.py
    python benchmarks/row_selection.py --device cpu --scale 0.02     # scales down

The textbook algorithm is that of the published Wanda code: a stable sort of every row's scores and a scatter of the
first half of the indices. Ours is checked against the plain functions, bit for bit, at full size.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from claims import Row, cost, floor_ms, main, sized
from torch import Tensor

from prunus.kernels.switch import kernels
from prunus.patterns import Unstructured, mask_scaled, scaled

PATTERN = Unstructured("row")
AGAINST = "a stable sort of each row and a scatter"
LIMIT = 500_000_000  # bytes beside the matrix that ours may take


def textbook(score: Tensor, kept: int) -> Tensor:
    """The mask by sorting the rows."""
    worst = score.sort(dim=1, stable=True).indices[:, : score.shape[1] - kept]
    return ~torch.zeros_like(score, dtype=torch.bool).scatter_(1, worst, True)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Weights of 16 and 32 bits, many short rows and few long ones; magnitude, whose 16-bit scores tie; a score."""
    tall, wide = sized(28672, args), sized(7168, args)
    yield compare(args, tall, wide, torch.bfloat16)
    yield compare(args, tall, wide, torch.float16)
    yield compare(args, tall, wide, torch.float32)
    yield compare(args, wide, tall, torch.bfloat16)
    yield compare(args, sized(4096, args), sized(11008, args), torch.bfloat16)
    yield compare(args, tall, wide, torch.bfloat16, wanda=False)
    yield of_a_score(args, tall, wide)


def compare(args: argparse.Namespace, out: int, in_: int, dtype: torch.dtype, wanda: bool = True) -> Row:
    """From weight (and norms) to mask."""
    weight, norms = drawn(args, out, in_, dtype)
    scale, kept = norms if wanda else None, out * (in_ // 2)
    mask = mask_scaled(PATTERN, weight, scale, kept)
    with kernels(False):
        check(mask, PATTERN.choose(scaled(weight, scale), kept))
    del mask
    ours = cost(lambda: mask_scaled(PATTERN, weight, scale, kept), args)
    plain = cost(lambda: textbook(scaled(weight, scale), in_ // 2), args, repeats=5)
    name = "Wanda, half of each row" if wanda else "magnitude, half of each row"
    floor = floor_ms(args, moved=weight.numel() * (weight.element_size() + 1))
    note = "" if ours.extra_bytes is None or ours.extra_bytes < LIMIT else f"more than {LIMIT / 1e9} GB extra"
    return Row(
        name, f"{out} x {in_} {str(dtype)[6:]}", AGAINST, ours.ms, plain.ms, floor, ours.extra_bytes,
        plain.extra_bytes, target=20, note=note,
    )  # fmt: skip


def of_a_score(args: argparse.Namespace, out: int, in_: int) -> Row:
    """From a float32 score to its mask."""
    score, kept = scaled(*drawn(args, out, in_, torch.bfloat16)), out * (in_ // 2)
    ours = cost(lambda: PATTERN.choose(score, kept), args)
    plain = cost(lambda: textbook(score, in_ // 2), args, repeats=5)
    floor = floor_ms(args, moved=score.numel() * 5)
    return Row(
        "half of each row of a score", f"{out} x {in_} float32", AGAINST, ours.ms, plain.ms, floor,
        ours.extra_bytes, plain.extra_bytes, target=20,
    )  # fmt: skip


def drawn(args: argparse.Namespace, out: int, in_: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A random weight and input norms that differ by column."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    weight = torch.randn(out, in_, generator=generator, device=args.device).mul_(0.02).to(dtype)
    return weight, torch.randn(in_, generator=generator, device=args.device).exp_()


def check(ours: Tensor, plain: Tensor) -> None:
    """Stop if the masks differ."""
    if not torch.equal(ours, plain):
        raise AssertionError(f"the program's mask differs from the plain function's in {int((ours != plain).sum())}")


if __name__ == "__main__":
    main(__doc__, measure)
