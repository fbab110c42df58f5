"""How time and memory grow with parameters, tokens and sequence length: fitted exponents.

    python benchmarks/growth.py
    python benchmarks/growth.py --device cpu --scale 0.1    # scales down

Each work runs at three sizes of one quantity, the others fixed: two blocks of width 4,096 to 8,192, or 8,192 to 262,144
tokens, or windows of 512 to 2,048, where arithmetic is what takes the time; an exponent is the slope of the straight
line through log time (or log extra memory, on a GPU) over log size. Parameters grow by the width of layers: a product
with fixed tokens then grows like the parameters (1), a factorisation of (in, in) like their power 1.5, a Gram matrix's
memory like 1. Sequence length grows at a fixed number of tokens, so that what is left is attention: from 0, where it is
nothing beside the products, to 1, where it is all. A row's time is that of its largest size.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from claims import Cost, Row, cost, main, sized
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from prunus.adapt.adapt import adapt
from prunus.blocks.recompute import recomputed
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.patterns import Unstructured
from prunus.score import Criterion
from prunus.score.criteria import wanda
from prunus.solve.sweep import sparsegpt
from prunus.stream.stream import stream
from prunus.train.next_token import next_token_loss

SIZES = {"parameters": (1, 2, 4), "tokens": (1, 4, 32), "length": (1, 2, 4)}
Work = Callable[[argparse.Namespace, int, int, int], Cost]  # (args, width, windows, length)


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """One row for each work and each quantity that grows."""
    base = sized(4096, args), max(1, sized(16, args, 1)), sized(512, args, 16)  # width, windows, length
    works: dict[str, Work] = {
        "Wanda": lambda *sizes: _prune(*sizes, wanda),
        "SparseGPT": lambda *sizes: _prune(*sizes, sparsegpt()),
        "biases and norms, step": lambda *sizes: _step(*sizes, kinds=["biases", "norms"]),
        "MaskLoRA, step": lambda *sizes: _step(*sizes, kinds=["mask_lora"]),
    }
    for name, work in works.items():
        for grows in _GROWING:
            yield _swept(name, work, grows, base, args)


_GROWING: dict[str, Callable[[int, int, int, int], tuple[int, int, int]]] = {
    "parameters": lambda k, width, windows, length: (_wider(width, k), windows, length),
    "tokens": lambda k, width, windows, length: (width, windows * k, length),
    "length": lambda k, width, windows, length: (width, windows * max(SIZES["length"]) // k, length * k),
}


def _head(width: int) -> int:
    """Entries of an attention head: that of most models, or so few that tiny widths have some."""
    return 64 if width >= 512 else 16


def _wider(width: int, k: int) -> int:
    """The width of k times the parameters."""
    return round(width * math.sqrt(k) / _head(width)) * _head(width)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The slope of log value over log size, by least squares.

    >>> exponent([1, 2, 4], [3.0, 12.0, 48.0])
    2.0
    """
    x, y = torch.tensor([sizes, values], dtype=torch.float64).log()
    x = x - x.mean()
    return round(float(x @ y / (x @ x)), 6)


def _swept(name: str, work: Work, grows: str, base: tuple[int, int, int], args: argparse.Namespace) -> Row:
    shapes = [_GROWING[grows](k, *base) for k in SIZES[grows]]
    costs = [work(args, *shape) for shape in shapes]
    sizes: Sequence[float] = [w**2 for w, _, _ in shapes] if grows == "parameters" else SIZES[grows]
    note = f"time grows like {grows}^{exponent(sizes, [each.ms for each in costs]):.2f}"
    extra = [each.extra_bytes for each in costs if each.extra_bytes]
    if len(extra) == len(costs):
        note += f", extra memory like {grows}^{exponent(sizes, extra):.2f}"
    note += " (" + ", ".join(f"{each.ms:.3g}" for each in costs) + " ms)"
    spelt = "; ".join(f"width {w}, {n} x {length}" for w, n, length in (shapes[0], shapes[-1]))
    return Row(f"{name}: {grows}", spelt, "", costs[-1].ms, extra_bytes=costs[-1].extra_bytes, note=note)


def _build(args: argparse.Namespace, width: int, length: int) -> OPTForCausalLM:
    """Two blocks."""
    torch.manual_seed(args.seed)
    config = OPTConfig(
        vocab_size=256, hidden_size=width, ffn_dim=4 * width, num_hidden_layers=2,
        num_attention_heads=width // _head(width), word_embed_proj_dim=width, max_position_embeddings=length,
        dropout=0.0,
    )  # fmt: skip
    dtype = torch.bfloat16 if torch.device(args.device).type == "cuda" else torch.float32
    with torch.device(args.device):  # drawn where it is used: a CPU would draw longer than a GPU prunes
        return OPTForCausalLM(config).to(dtype).eval()


def _tokens(args: argparse.Namespace, windows: int, length: int) -> Tensor:
    return torch.randint(4, 256, (windows, length), generator=torch.Generator().manual_seed(args.seed))


def _prune(args: argparse.Namespace, width: int, windows: int, length: int, criterion: Criterion) -> Cost:
    model, tokens = _build(args, width, length), _tokens(args, windows, length)

    def run() -> None:
        stream(model, criterion, Unstructured(criterion.compare), 0.5, tokens=tokens, batch_size=max(1, 8192 // length))

    return cost(run, args, repeats=1)


def _step(args: argparse.Namespace, width: int, windows: int, length: int, *, kinds: list[str]) -> Cost:
    model, ids = _build(args, width, length), _tokens(args, windows, length).to(args.device)
    views = find_layers(model)
    drawn = {"generator": torch.Generator(args.device).manual_seed(args.seed), "device": args.device}
    masks = Masks({view.parameter: torch.rand(view.shape, **drawn) < 0.5 for view in views})
    masks.apply_(model)
    adapt(model, kinds, masks=masks, views=views, rank=8)
    model.train()

    def run() -> None:
        model.zero_grad()
        next_token_loss(model, ids).backward()

    with recomputed(model):
        return cost(run, args, repeats=3)


if __name__ == "__main__":
    main(__doc__, measure)
