"""STR: soft threshold reparametrisation, every layer learns its own threshold (Kusupati et al. 2020)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.learned import check_rates, finish_learned_, train_with_
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.train import During, Plan


class STR(During):
    """Soft threshold weight reparametrisation: the forward pass uses shrunken weights, their threshold is trained.

        S(w, s_l) = sign(w) * relu(|w| - sigmoid(s_l))     one s_l a layer    (Kusupati et al. 2020)

    Weight decay on s_l drives it up to 0, and so the sparsity; that cannot be set, only steered by `init`, the learning
    rate and `weight_decay`. With exact=True the end is magnitude pruning of the shrunken weights to `sparsity`: where
    there are too many zeros, the mask keeps the weights nearest to their threshold, which are 0 until trained again.
    What STR reached by itself is in the buffer `reached`.
    init: s at the start. lr, weight_decay: of s; None, as in the paper, is what the optimizer's first group has.
    per: "layer", or "model" for one threshold in all.
    Deviation: the paper starts from s = -3200 in 100 epochs of ImageNet; -10 suits training of some 10,000 steps.
    Raises ValueError for a sparsity outside [0, 1), an unknown `per`, lr <= 0 or weight_decay < 0.

    >>> method = STR(0.9, init=-5.0)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[method])
    >>> masks = method.finish()
    """

    def __init__(
        self,
        sparsity: float,
        *,
        init: float = -10.0,
        lr: float | None = None,
        weight_decay: float | None = None,
        per: Literal["layer", "model"] = "layer",
        exact: bool = True,
    ) -> None:
        super().__init__()
        kept_of(0, sparsity)
        if per not in ("layer", "model"):
            raise ValueError(f"STR has a threshold per 'layer' or per 'model'; got {per!r}")
        check_rates(self, lr=lr, weight_decay=weight_decay)
        self.sparsity, self.init, self.per, self.exact = sparsity, init, per, exact
        self.lr, self.weight_decay = lr, weight_decay

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Make the thresholds and train them with the model."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        if self.exact:
            self.kept_at(self.sparsity)
        device = next(iter(self.pruned_parameters.values())).device
        count = len(self.pruned_parameters) if self.per == "layer" else 1
        self.s = nn.Parameter(torch.full((count,), float(self.init), device=device))
        self.register_buffer("reached", torch.tensor(torch.nan))
        train_with_(optimizer, [self.s], lr=self.lr, weight_decay=self.weight_decay)

    def weights(self) -> dict[str, Tensor]:
        """The shrunken weights."""
        thresholds = self._thresholds()
        return {name: _SoftThreshold.apply(weight, thresholds[name]) for name, weight in self.pruned_parameters.items()}  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def finish(self) -> Masks:
        """Write the shrunken weights into the model."""
        thresholds = self._thresholds()
        scores = {name: weight.abs() - thresholds[name] for name, weight in self.pruned_parameters.items()}
        return finish_learned_(self, self.weights(), scores, self.sparsity if self.exact else None)

    def _thresholds(self) -> dict[str, Tensor]:
        each = self.s.sigmoid().expand(len(self.pruned_parameters)).unbind()
        return dict(zip(self.pruned_parameters, each, strict=True))


class _SoftThreshold(torch.autograd.Function):
    """sign(w) relu(|w| - t) for a scalar t; keeps only its result, which the layer keeps too."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, threshold: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        shrunken = weight - weight.clamp(-threshold, threshold)
        ctx.save_for_backward(shrunken)
        return shrunken

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (shrunken,) = ctx.saved_tensors
        return grad * (shrunken != 0), -(grad * shrunken.sign()).sum()
