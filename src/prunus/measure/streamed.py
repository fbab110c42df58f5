"""Perplexity of a model larger than memory: all windows go through one block before the next block is read.

The number is that of `perplexity` (same windows, same mean); only the order of the work differs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from prunus.blocks import Source, embed, find_blocks, finish, run_block
from prunus.data import Tokens
from prunus.machine import Precision, autocast, in_mode
from prunus.measure.perplexity import cut, exp_of, summed_loss
from prunus.stream import ahead


@torch.no_grad()
def streamed_perplexity(
    model: nn.Module,
    tokens: Tensor | Tokens,
    *,
    window: int,
    source: Source,
    device: torch.device,
    batch_size: int = 1,
    precision: Precision = "fp32",
    on_block: Callable[[str], None] | None = None,
) -> float:
    """The perplexity of a causal language model whose blocks `source` brings to `device` one at a time.

    tokens: a stream (N,), cut as by `perplexity`. The hidden states of all windows are kept: N * d numbers.
    Raises ValueError as `perplexity`, and for a model whose blocks are not found.
    """
    rows, wanted, predicted = cut(tokens, window)
    names = find_blocks(model)
    with in_mode(model, training=False), autocast(device, precision):
        hidden, arguments = embed(model, names, rows, source=source, device=device, batch_size=batch_size)
        with ahead(source, names, device) as moving:
            for name in names:
                block = moving.load(name, device)
                hidden = [run_block(block, x, call) for x, call in zip(hidden, arguments[name], strict=True)]
                moving.release(name)
                if on_block is not None:
                    on_block(name)
        total = torch.zeros((), dtype=torch.float64)
        with source.outside(device):
            for ids, targets, leaving in zip(rows.split(batch_size), wanted.split(batch_size), hidden, strict=True):
                total += summed_loss(finish(model, names, ids.to(device), leaving).logits, targets.long()).cpu()
    return exp_of(total.item() / predicted)
