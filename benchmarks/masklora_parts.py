"""Where the time of a MaskLoRA step goes, and what other tiles would make of it

    python benchmarks/masklora_parts.py
    python benchmarks/masklora_parts.py --device cpu --scale 0.03    # scales down; no programs, so no other tiles

The parts of the step of `masklora.py`, one by one: W_eff is built twice, there are three products, and dA and dB are
reduced from tiles of the third. Where Triton programs run, each of theirs is timed with other tiles, too: the name says
rows x columns and warps of a program, how many tiles a program that builds takes in turn, and how many entries of G are
formed at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from claims import Row, cost, floor_ms, main
from masklora import RANK, SCALE, layer
from torch import Tensor

from prunus.adapt.effective import Terms, effective_weight, weight_gradients
from prunus.kernels.switch import uses_kernels
from prunus.masks import pack

BUILD = ((64, 64, 4, 1), (64, 64, 4, 4), (64, 64, 4, 8), (128, 64, 8, 4), (32, 128, 4, 4))
REDUCE = ((64, 128, 4), (64, 64, 4), (32, 128, 4), (64, 128, 8))
ENTRIES = (1 << 25, 1 << 26, 1 << 27, 1 << 28)
DEPTHS = (256, 512, 1024)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Products, building, reducing; then the programs with other tiles."""
    W, M, A, B, x, g = layer(args)
    bits = pack(M)
    del M
    terms = Terms(W, A, B, bits, SCALE)
    (out, in_), tokens = W.shape, len(x)
    operations, shape = 2 * tokens * out * in_, f"{out} x {in_} bfloat16, {tokens} tokens, r = {RANK}"

    def row(name: str, run: Callable[[], object], **floor: int) -> Row:
        found = cost(run, args)
        return Row(name, shape, "", found.ms, None, floor_ms(args, **floor), found.extra_bytes)

    def build() -> Tensor:
        return effective_weight(terms)

    def reduce() -> tuple[Tensor, Tensor]:
        return weight_gradients(g, x, terms)

    yield row("y = x W^T", lambda: x @ W.t(), operations=operations)
    yield row("dx = g W", lambda: g @ W, operations=operations)
    yield row("G = g^T x", lambda: g.t() @ x, operations=operations)
    yield row("W_eff", build, moved=2 * W.nbytes + bits.nbytes)
    yield row("G, and dA and dB from it", reduce, operations=operations)
    if not uses_kernels(W):
        return
    for tile in BUILD:
        with _set(_BUILD=tile):
            yield row(f"W_eff, {_spelt(tile)}", build, moved=2 * W.nbytes + bits.nbytes)
    for entries in ENTRIES:
        rows = min(out, -(-entries // in_))
        yield row(f"G by {entries:,}", lambda n=rows: _tiles(g, x, n), operations=operations)
    for entries in ENTRIES:
        with _set(_TILE=entries):
            yield row(f"G, dA and dB by {entries:,}", reduce, operations=operations)
    for tile in REDUCE:
        for depth in DEPTHS:
            with _set(_REDUCE=tile, _DEPTH=depth):
                yield row(f"G, dA and dB, {_spelt(tile)}, {depth} rows deep", reduce, operations=operations)


def _set(**constants: Any) -> Any:
    """While active, the program has other constants."""
    from prunus.kernels import effective

    return mock.patch.multiple(effective, **constants)


def _spelt(tile: tuple[int, ...]) -> str:
    turns = f", {tile[3]} in turn" if tile[3:] else ""
    return f"{tile[0]} x {tile[1]}, {tile[2]} warps{turns}"


def _tiles(g: Tensor, x: Tensor, rows: int) -> None:
    """G in tiles of rows, each into the same memory, as the reduction has it."""
    tile = torch.empty(rows, x.shape[1], dtype=x.dtype, device=x.device)
    for part in g.split(rows, dim=1):
        torch.mm(part.t(), x, out=tile[: part.shape[1]])


if __name__ == "__main__":
    main(__doc__, measure)
