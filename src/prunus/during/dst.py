"""DST: dynamic sparse training, every output learns a threshold for its weights (Liu et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.learned import check_rates, finish_learned_, train_with_
from prunus.layers import View
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.train import During, Plan

_LEAST_DENSITY = 0.01  # a layer with no more than this share of its weights starts anew (the paper's 1 %)


class DST(During):
    """Dynamic sparse training: weights below a trained threshold of their output row are masked, and may come back.

        forward w_ij * H(|w_ij| - t_i)     loss + penalty * sum exp(-t_i)
        dH/dx taken as 2 - 4|x| for |x| <= 0.4, 0.4 for 0.4 < |x| <= 1, else 0

    Liu et al. 2020 ("Dynamic Sparse Training", trainable masked layers, long-tailed derivative estimator,
    sparse regularisation). t starts at 0; a layer that keeps at most 1 % of its weights has its t set back to 0. A row
    is an output neuron or a filter. The gradient of w is that through w and through the mask.
    The penalty decides the sparsity, which cannot be set. With exact=True the end is magnitude pruning of the masked
    weights to `sparsity`: where there are too many zeros, the mask keeps the weights nearest to their threshold, which
    are 0 until trained again. What DST reached by itself is in the buffer `reached`.
    lr: of t; None is that of the optimizer's first group.
    Deviations: t has no weight decay, which would pull it to 0 against the penalty; the density of a layer is looked at
    after the optimizer's step, on the device.
    Raises ValueError for a sparsity outside [0, 1), penalty < 0 or lr <= 0.

    >>> dst = DST(0.9, penalty=1e-4)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[dst])
    >>> masks = dst.finish()
    """

    def __init__(self, sparsity: float, *, penalty: float = 5e-6, lr: float | None = None, exact: bool = True) -> None:
        super().__init__()
        kept_of(0, sparsity)
        if penalty < 0:
            raise ValueError(f"DST's penalty is at least 0; got {penalty}")
        check_rates(self, lr=lr)
        self.sparsity, self.strength, self.lr, self.exact = sparsity, penalty, lr, exact

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Make a threshold for every output row and train it with the model."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        if self.exact:
            self.kept_at(self.sparsity)
        parameters = self.pruned_parameters
        self.shapes = [_of_rows(parameters[name], name, plan.views) for name in parameters]
        count = sum(shape.numel() for shape in self.shapes)
        self.t = nn.Parameter(torch.zeros(count, device=next(iter(parameters.values())).device))
        self.register_buffer("reached", torch.tensor(torch.nan))
        train_with_(optimizer, [self.t], lr=self.lr, weight_decay=0.0)

    def weights(self) -> dict[str, Tensor]:
        """The masked weights."""
        thresholds = self._thresholds()
        return {name: _Masked.apply(weight, thresholds[name]) for name, weight in self.pruned_parameters.items()}  # pyright: ignore[reportReturnType]

    def penalty(self) -> Tensor:
        """The sum of exp(-t), times the penalty's strength."""
        return self.strength * (-self.t).exp().sum()

    @torch.no_grad()
    def follow(self) -> None:
        """Set the thresholds of a layer back to 0 when hardly anything of it is left."""
        thresholds = self._thresholds()
        for name, weight in self.pruned_parameters.items():
            density = (weight.abs() > thresholds[name]).float().mean()
            thresholds[name].mul_(density > _LEAST_DENSITY)

    @torch.no_grad()
    def finish(self) -> Masks:
        """Write the masked weights into the model."""
        thresholds, effective = self._thresholds(), self.weights()
        scores = {
            name: torch.where(weight != 0, weight.abs(), self.pruned_parameters[name].abs() - thresholds[name])
            for name, weight in effective.items()
        }
        return finish_learned_(self, effective, scores, self.sparsity if self.exact else None)

    def _thresholds(self) -> dict[str, Tensor]:
        """Parameter name -> its rows' thresholds, in a shape that broadcasts; views of t."""
        parts = self.t.split([shape.numel() for shape in self.shapes])
        shaped = (part.view(shape) for part, shape in zip(parts, self.shapes, strict=True))
        return dict(zip(self.pruned_parameters, shaped, strict=True))


def _of_rows(parameter: Tensor, name: str, views: Sequence[View]) -> torch.Size:
    """The parameter's shape with 1 for all but its output rows (and experts)."""
    view = next(view for view in views if view.parameter == name)
    experts = 0 if view.index is None else 1  # leading dimensions that are not of the matrix
    rows = experts + (1 if view.transposed else 0)
    return torch.Size(size if place in (rows, experts - 1) else 1 for place, size in enumerate(parameter.shape))


class _Masked(torch.autograd.Function):
    """w * H(|w| - t); keeps only w and t, which are parameters."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(weight, threshold)
        return weight * (weight.abs() > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, threshold = ctx.saved_tensors
        over = weight.abs() - threshold
        away = over.abs()
        slope = torch.where(away <= 0.4, 2 - 4 * away, 0.4 * (away <= 1))
        through_mask = grad * weight * slope  # dL/d(|w| - t)
        return grad * (over > 0) + through_mask * weight.sign(), -through_mask.sum_to_size(threshold.shape)
