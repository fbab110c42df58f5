"""Embeddings of texts by an encoder, and the loss that holds a pruned encoder's against those of its teacher.

    e(x) = mean over attended positions of the last hidden state, or its first, to unit length
                                                                                        (Reimers & Gurevych 2019)
    L = mean over texts of 1 - <e_S(x), e_T(x)>

No labels are needed: any texts will do that are like those to come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pooling = Literal["mean", "first"]


def embeddings(model: nn.Module, batch: Mapping[str, Tensor], pooling: Pooling = "mean") -> Tensor:
    """The embeddings (b, d) of a batch of a tokenizer, float32 and of unit length, with their graph.

    model: an encoder of transformers without a head, of width d. batch: its keywords, with an attention_mask
    (b, length) where texts were padded. pooling: over the attended positions, or the first of them alone (CLS).

    >>> batch = tokenizer(["a text", "another, longer one"], padding=True, return_tensors="pt")
    >>> embeddings(model, batch).shape
    torch.Size([2, 384])
    """
    hidden: Tensor = model(**batch).last_hidden_state.float()  # (b, length, d)
    marks = batch.get("attention_mask", hidden.new_ones(hidden.shape[:2])).unsqueeze(-1)
    if pooling == "first":
        marks = marks * (marks.cumsum(1) == 1)
    return F.normalize((hidden * marks).sum(1) / marks.sum(1), dim=-1)


def distilled_embeddings(
    teacher: nn.Module, pooling: Pooling = "mean"
) -> Callable[[nn.Module, Mapping[str, Tensor]], Tensor]:
    """The loss of (model, batch) that holds an encoder's embeddings against a teacher's: 1 less their mean cosine.

    teacher: an encoder of the same width, usually the model before it was pruned; it runs without gradients. pooling:
    as in `embeddings`.

    >>> train(model, batches, optimizer, lr, steps=100, loss=distilled_embeddings(dense), masks=masks)
    """

    def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            taught = embeddings(teacher, batch, pooling)
        return 1 - (embeddings(model, batch, pooling) * taught).sum(-1).mean()

    return loss
