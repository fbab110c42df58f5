"""How well numbers and embeddings of a network agree with those that they should be: correlations and cosines.

    Spearman's correlation: r(rank(x), rank(y)), r that of Pearson; equal values have the mean of their ranks

An encoder of texts is held against labels (`agreement`), or against the dense encoder it was pruned from (`fidelity`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.machine import Precision, autocast, class_logits, in_mode
from prunus.train import Pooling, embeddings

HEADLINES = ("accuracy", "cosine", "spearman")  # shares, of which the first that was measured counts most


@dataclass(frozen=True)
class Agreement:
    """Of predicted values with labels: Spearman's and Pearson's correlation, mean squared error."""

    spearman: float
    pearson: float
    loss: float
    texts: int


@dataclass(frozen=True)
class Fidelity:
    """Of an encoder with another one. cosine: mean of that between the two embeddings of the same text; spearman: of
    the cosines of pairs of texts, here and there."""

    cosine: float
    spearman: float
    texts: int


def spearman(x: Tensor, y: Tensor) -> float:
    """Spearman's rank correlation of x (n,) and y (n,); nan where all values of one are equal.

    >>> round(spearman(torch.tensor([1.0, 2.0, 30.0]), torch.tensor([0.1, 0.2, 0.3])), 6)
    1.0
    """
    return pearson(_ranks(x), _ranks(y))


def pearson(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of x (n,) and y (n,), in float64.

    >>> round(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0])), 6)
    1.0
    """
    x, y = (each.double() - each.double().mean() for each in (x, y))
    return float((x @ y) / (x.norm() * y.norm()))


@torch.no_grad()
def agreement(model: nn.Module, batches: Iterable[tuple[Any, Tensor]], *, precision: Precision = "fp32") -> Agreement:
    """The Agreement of a model's values with labels. batches: (inputs, labels (b,)); the model returns logits (b, 1).

    Raises ValueError without two texts; FloatingPointError for values that are not finite.

    >>> agreement(nn.Linear(2, 1), [(torch.randn(4, 2), torch.arange(4.0))]).texts
    4
    """
    found: list[Tensor] = []
    with in_mode(model, training=False):
        for inputs, labels in batches:
            with autocast(labels.device, precision):
                z = class_logits(model, inputs).flatten().double()
            found.append(torch.stack([z, labels.to(z.device).double()]).cpu())
    values, labels = _whole(found, dim=1)
    loss = float((values - labels).square().mean())
    return Agreement(spearman(values, labels), pearson(values, labels), loss, len(labels))


@torch.no_grad()
def fidelity(
    model: nn.Module,
    dense: nn.Module,
    batches: Iterable[tuple[Mapping[str, Tensor], Any]],
    pooling: Pooling = "mean",
    *,
    precision: Precision = "fp32",
) -> Fidelity:
    """The Fidelity of an encoder's embeddings with those of another. batches: (keywords of a tokenizer, anything).

    Pairs of texts are those that lie half of all texts apart. Raises as `agreement`.

    >>> fidelity(pruned, dense, [(tokenizer(["one text", "another"], padding=True, return_tensors="pt"), None)])
    """
    found: list[Tensor] = []
    with in_mode(model, training=False), in_mode(dense, training=False):
        for keywords, _ in batches:
            with autocast(next(model.parameters()).device, precision):
                found.append(
                    torch.stack([embeddings(each, keywords, pooling).double().cpu() for each in (model, dense)])
                )
    both = _whole(found, dim=1)  # (2, texts, d)
    half = both.shape[1] // 2
    pairs = (both[:, :half] * both[:, half : 2 * half]).sum(-1)
    return Fidelity(float((both[0] * both[1]).sum(-1).mean()), spearman(*pairs), both.shape[1])


def headline(found: Mapping[str, Any]) -> tuple[str, float]:
    """Name and value, in [-1, 1], of what counts most among the numbers of a measurement.

    >>> headline({"top1": 0.9, "loss": 0.3})
    ('accuracy', 0.9)
    """
    known = {"accuracy": found["top1"], **found} if "top1" in found else found
    name = next(name for name in HEADLINES if name in known)
    return name, float(known[name])


def _ranks(x: Tensor) -> Tensor:
    """The rank (n,) float64 of each value, from 1; equal ones have the mean of theirs."""
    _, place, counts = x.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def _whole(found: list[Tensor], dim: int) -> Tensor:
    """All batches as one tensor."""
    both = torch.cat(found, dim) if found else torch.zeros(2, 0)
    if both.shape[1] < 2:
        raise ValueError(f"a correlation needs two texts at least; there are {both.shape[1]}")
    if not bool(both.isfinite().all()):
        raise FloatingPointError("the model's outputs are not finite")
    return both
