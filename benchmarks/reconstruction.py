"""Reconstruction of blocks: recorded steps in bfloat16, against steps that are launched, in float32, and recorded anew

    python benchmarks/reconstruction.py
    python benchmarks/reconstruction.py --device cpu --scale 0.03    # scales down; nothing is recorded on a CPU

Everything in a block of OPT-6.7B's shape, and of OPT-125M's, pruned 2:4 (random weights, bfloat16), is fitted in 64
steps of 2 x 2,048 tokens as `stream` does it, errors before and after included; then several of them in turn, through
one recorded step and each through its own (milliseconds a block). Floor: the products of the steps alone.
On an H200, in bfloat16, recording is worth three times at width 768 and nothing at 4096, where arithmetic is the time.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Iterator
from functools import partial
from unittest import mock

import torch
from claims import Row, cost, floor_ms, main, sized
from transformers import OPTConfig, OPTForCausalLM

from prunus.blocks import Arguments
from prunus.layers import find_layers
from prunus.patterns import NM
from prunus.prune import prune
from prunus.stream import Fit
from prunus.train import StandIns, train

RECONSTRUCT = sys.modules["prunus.stream.reconstruct"]
STEPS, EXAMPLES, BLOCKS = 64, 8, 6


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """Both shapes, against each of the others."""
    for hidden in (4096, 768):
        yield from _rows(args, sized(hidden, args))


def _rows(args: argparse.Namespace, hidden: int) -> Iterator[Row]:
    torch.manual_seed(args.seed)
    heads, length = max(1, hidden // 128), sized(2048, args)
    config = OPTConfig(
        hidden_size=hidden, word_embed_proj_dim=hidden, ffn_dim=4 * hidden, num_hidden_layers=1, dropout=0.0,
        num_attention_heads=heads, vocab_size=64, max_position_embeddings=length,
    )  # fmt: skip
    with torch.device(args.device):
        model = OPTForCausalLM(config).bfloat16().eval()
    name = "model.decoder.layers.0"
    dense = copy.deepcopy(model.get_submodule(name))
    views = [view for view in find_layers(model) if view.name.startswith(name)]
    masks = prune(model, pattern=NM(2, 4), views=views)
    inputs = [torch.randn(2, length, hidden, device=args.device).bfloat16() for _ in range(EXAMPLES)]
    with torch.no_grad():
        passing = RECONSTRUCT.Passing(inputs, [Arguments()] * EXAMPLES, [dense(x) for x in inputs], None)

    steps = STEPS if args.scale == 1 else 4

    def fit(precision: str, stand_ins: StandIns | None = None, **changes: object) -> tuple[float, float]:
        asked = Fit(steps=steps, precision=precision)  # type: ignore[arg-type]
        block, how = copy.deepcopy(model.get_submodule(name)), {"stand_ins": stand_ins, "prefix": name}
        with mock.patch.object(RECONSTRUCT, "train", partial(_train, changes)):
            return RECONSTRUCT.reconstruct(block, dense, asked, passing, views=views, masks=masks, **how)

    def in_turn(once: bool) -> set[float]:
        stand_ins = StandIns(wanted=once)
        return {fit("bf16", stand_ins)[1] for _ in range(BLOCKS)}

    before, after = fit("bf16")
    ours = cost(lambda: fit("bf16"), args, repeats=2)
    shape = f"width {hidden}, 64 steps of 2 x {length} tokens"
    floor = floor_ms(args, operations=6 * 12 * hidden**2 * 2 * length * steps)
    for precision, against in (("bf16", "not recorded"), ("fp32", "not recorded, products in float32")):
        other = cost(lambda precision=precision: fit(precision, capture=False), args, repeats=1)
        yield Row(
            "a block fitted", shape, against, ours.ms, other.ms, floor, ours.extra_bytes, other.extra_bytes, 2.0,
            note=f"error {before:.3g} to {after:.3g}",
        )  # fmt: skip
    once, anew = (cost(partial(in_turn, once), args, repeats=2) for once in (True, False))
    ends = max(abs(end / after - 1) for end in in_turn(True) | in_turn(False))
    yield Row(
        f"one of {BLOCKS} blocks fitted in turn", shape, "each recorded anew", once.ms / BLOCKS, anew.ms / BLOCKS,
        floor, once.extra_bytes, anew.extra_bytes, note=f"errors differ by at most {ends:.1g} of themselves",
    )  # fmt: skip


def _train(changes: dict[str, object], *args: object, **kwargs: object) -> object:
    return train(*args, **(kwargs | changes))  # type: ignore[arg-type]


if __name__ == "__main__":
    main(__doc__, measure)
