"""Perplexity by the protocol that everyone quotes, and said in full.

The texts are joined and tokenised once, the stream of N tokens is cut into floor(N / L) windows of L tokens that do not
overlap, and  perplexity = exp( mean over all windows of -log p(x_i | x_1 .. x_{i-1}), i = 2 .. L ):  the mean is over
the L - 1 predicted tokens of each window. (Scripts that multiply each window's mean by L and divide by the number of
windows times L give the same number, since all windows are equally long.)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from prunus.data import windows
from prunus.machine import in_mode


def perplexity(
    model: nn.Module,
    tokens: Tensor,
    *,
    window: int,
    batch_size: int = 1,
    device: torch.device | str | None = None,
) -> float:
    """The perplexity of a causal language model on the stream tokens (N,), in windows of `window` tokens.

    The model runs where it is (inputs go to `device`, by default that of its first parameter), in evaluation mode, in
    its own precision; losses are taken in float32 and summed in float64.
    Raises: ValueError when the tokens hold no window, or a window holds fewer than 2 tokens.

    >>> perplexity(model, tokenize(read_texts("embedded", split="test"), tokenizer), window=512)
    """
    if window < 2:
        raise ValueError(f"A window of {window} tokens predicts nothing; use at least 2.")
    place = torch.device(device) if device is not None else next(model.parameters()).device
    rows = windows(tokens, window)
    total = torch.zeros((), dtype=torch.float64, device=place)
    with torch.no_grad(), in_mode(model, training=False):
        for ids in rows.split(batch_size):
            ids = ids.to(place).long()
            total += summed_loss(model(input_ids=ids, use_cache=False).logits, ids)
    return math.exp(total.item() / (rows.shape[0] * (window - 1)))


def summed_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """The summed negative log-likelihood, scalar float64 where `ids` is; logits: (batch, length, vocabulary)."""
    losses = [  # row by row: the float32 copy of the logits is of one window only
        nn.functional.cross_entropy(row[:-1].float(), targets[1:].to(row.device), reduction="none").double().sum()
        for row, targets in zip(logits, ids, strict=True)
    ]
    return torch.stack(losses).sum().to(ids.device)
