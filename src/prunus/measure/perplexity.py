"""Perplexity by the protocol that everyone quotes, and said in full.

The texts are joined and tokenised once, the stream of N tokens is cut into floor(N / L) windows of L tokens that do not
overlap, and  perplexity = exp( mean over all windows of -log p(x_i | x_1 .. x_{i-1}), i = 2 .. L ):  the mean is over
the L - 1 predicted tokens of each window. (Scripts that multiply each window's mean by L and divide by the number of
windows times L give the same number, since all windows are equally long.)

Where the stream has a head, such as a start token, it stands at the head of each window, among its L tokens, and is not
predicted; where it has answers, the mean is over their tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from prunus.blocks import check_ids
from prunus.data import IGNORED, Tokens, labels, windows
from prunus.machine import in_mode


def perplexity(
    model: nn.Module,
    tokens: Tensor | Tokens,
    *,
    window: int,
    batch_size: int = 1,
    device: torch.device | str | None = None,
) -> float:
    """The perplexity of a causal language model on a stream of tokens (N,), in windows of `window` tokens.

    The model runs where it is (inputs go to `device`, by default that of its first parameter), in evaluation mode, in
    its own precision; losses are taken in float32 and summed in float64.
    Raises: ValueError when the tokens hold no window, a window holds fewer than 2 tokens, or a token is not in the
    model's vocabulary.

    >>> perplexity(model, tokenize(read_texts("embedded", split="test"), tokenizer), window=512)
    """
    rows, wanted, predicted = cut(tokens, window)
    check_ids(model, rows)
    place = torch.device(device) if device is not None else next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=place)
    with torch.no_grad(), in_mode(model, training=False):
        for ids, targets in zip(rows.split(batch_size), wanted.split(batch_size), strict=True):
            logits = model(input_ids=ids.to(place).long(), use_cache=False).logits
            total += summed_loss(logits, targets.to(place).long())
    return exp_of(total.item() / predicted)


@torch.no_grad()
def target_perplexity(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> float:
    """The perplexity of an encoder-decoder's targets: exp of the mean loss of all labels that are not -100.

    batches: what the model is called with, `labels` among it; the model shifts them itself. It runs in evaluation mode,
    the batches on its device.
    Raises: ValueError where nothing is predicted.

    >>> target_perplexity(encoder_decoder, [{"input_ids": ids, "labels": targets}])
    """
    place, total, predicted = next(model.parameters()).device, 0.0, 0
    with in_mode(model, training=False):
        for batch in batches:
            wanted = batch["labels"].to(place)
            logits = model(**{key: each.to(place) for key, each in batch.items()}).logits.float()
            losses = nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="none")
            total += losses.double().sum().item()
            predicted += int((wanted != IGNORED).sum())
    if not predicted:
        raise ValueError("No batch has labels other than -100, so there is nothing to measure.")
    return exp_of(total / predicted)


def exp_of(loss: float) -> float:
    """The perplexity of a mean loss; infinite beyond what a float holds.

    >>> exp_of(1e4)
    inf
    """
    return math.inf if loss > 700 else math.exp(loss)


def cut(tokens: Tensor | Tokens, window: int) -> tuple[Tensor, Tensor, int]:
    """The windows (n, window), their labels, and how many tokens of them are predicted."""
    if window < 2:
        raise ValueError(f"A window of {window} tokens predicts nothing; use at least 2.")
    wanted = labels(tokens, window)
    predicted = int((wanted[:, 1:] != IGNORED).sum())
    if not predicted:
        raise ValueError(f"No window of {window} tokens holds a part of an answer, so there is nothing to measure.")
    return windows(tokens, window), wanted, predicted


def summed_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The summed negative log-likelihood, scalar float64 where the labels are; logits: (batch, length, vocabulary)."""
    losses = [  # row by row: the float32 copy of the logits is of one window only
        nn.functional.cross_entropy(row[:-1].float(), wanted[1:].to(row.device), reduction="none").double().sum()
        for row, wanted in zip(logits, targets, strict=True)  # what is IGNORED adds 0
    ]
    return torch.stack(losses).sum().to(targets.device)
