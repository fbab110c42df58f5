"""How good a classifier is: accuracy, loss, and whether its confidence can be believed.

    calibration error  sum_b n_b / N * |acc_b - conf_b|     its maximum  max_b |acc_b - conf_b|     over the bins b

of equal width in the largest softmax probability, conf; empty bins count nothing (Guo et al. 2017, Eq. 3 and 5).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.blocks import uncompiled
from prunus.machine import Precision, autocast, class_logits, in_mode


@dataclass(frozen=True)
class Accuracy:
    """What `accuracy` measures. Shares are in [0, 1].

    top1, top5: images whose class has the largest logit, or is among the five largest (None for fewer than 6 classes).
    loss: mean negative log-likelihood, in nats. worst_class: smallest top1 of a class that occurs.

    >>> Accuracy(0.9, None, 0.3, 0.02, 0.1, 0.8, 100).top1
    0.9
    """

    top1: float
    top5: float | None
    loss: float
    calibration_error: float
    maximum_calibration_error: float
    worst_class: float
    images: int


@torch.no_grad()
def accuracy(
    model: nn.Module, batches: Iterable[tuple[Any, Tensor]], *, precision: Precision = "fp32", bins: int = 15
) -> Accuracy:
    """The Accuracy of `model` on batches (x, y (B,) int64), in evaluation mode; its modes stay as they were.

    x: (B, ...), or keywords that a tokenizer made.
    Products are done in `precision`, softmax and loss in float32, sums in float64. The device is waited for once, at
    the end.
    Raises: ValueError without an image or a bin; FloatingPointError for logits that are not finite.

    >>> model = nn.Linear(2, 3)
    >>> accuracy(model, [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))]).images
    4
    """
    if bins < 1:
        raise ValueError(f"calibration needs at least 1 bin; got {bins}")
    parts: list[Tensor] = []
    classes = 0
    with in_mode(model, training=False), uncompiled(model) as plain:  # a program for each shape of a last batch costs
        for x, y in batches:
            with autocast(next(model.parameters(), y).device, precision):
                logits = class_logits(plain, x)
            classes = logits.shape[1]
            parts.append(_seen(logits.float(), y.to(logits.device)))
    if not parts:
        raise ValueError("accuracy needs at least one batch; there was none")
    return _summary(torch.cat(parts, dim=1).cpu(), classes, bins)


def _seen(logits: Tensor, y: Tensor) -> Tensor:
    """What the summary needs of each image, (5, B) float64: class, right, among five, loss, confidence."""
    loss = nn.functional.cross_entropy(logits, y, reduction="none")
    confidence, chosen = logits.softmax(1).max(1)
    among = (logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]).any(1)
    return torch.stack([each.double() for each in (y, chosen == y, among, loss, confidence)])


def _summary(seen: Tensor, classes: int, bins: int) -> Accuracy:
    y, right, among, loss, confidence = seen.unbind(0)
    if not bool((loss.isfinite() & confidence.isfinite()).all()):
        wrong = int((~(loss.isfinite() & confidence.isfinite())).sum())
        raise FloatingPointError(f"the model's outputs are not finite for {wrong} of {len(y)} images")
    count, y = len(y), y.long()
    of_class = torch.bincount(y, minlength=classes)
    right_of_class = torch.bincount(y, right, minlength=classes)
    # Bins are (low, high]. Torchmetrics' are [low, high) and one more for a confidence of exactly 1, which float32
    # gives often: other numbers, from a package larger than what it would save here.
    place = (confidence * bins).ceil().long().sub_(1).clamp_(0, bins - 1)
    in_bin = torch.bincount(place, minlength=bins).clamp(min=1)
    gaps = (torch.bincount(place, right - confidence, minlength=bins) / in_bin).abs()
    return Accuracy(
        top1=float(right.mean()),
        top5=float(among.mean()) if classes > 5 else None,
        loss=float(loss.mean()),
        calibration_error=float((gaps * torch.bincount(place, minlength=bins)).sum() / count),
        maximum_calibration_error=float(gaps.max()),
        worst_class=float((right_of_class / of_class)[of_class > 0].min()),
        images=count,
    )
