"""GSM: global sparse momentum, only the most important weights get their gradient (Ding et al. 2019)."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from prunus.during.choose import keep_global
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.train import During, Plan


class GSM(During):
    """Global sparse momentum SGD: all but the most important weights fade, and are removed at the end.

        z <- beta z + eta w + B * dL/dw,  w <- w - lr z     B = 1 for the Q largest |w * dL/dw|, else 0

    Ding et al. 2019 ("Global Sparse Momentum SGD for Pruning Very Deep Neural Networks", its update rule);
    Q = weights to keep, eta = the optimizer's weight decay, beta = its momentum, large in the paper (0.98). The rest is
    the optimizer's own step: use SGD with momentum and weight decay, without which nothing fades.
    Deviations: Q is chosen among the prunable weights alone (biases and norms train as ever), anew in every step; the
    end is exact magnitude pruning over all layers, lossless when the rest has faded.
    Raises ValueError for a sparsity outside [0, 1).

    >>> gsm = GSM(0.9)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.98, weight_decay=1e-4)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[gsm])
    >>> masks = gsm.finish()
    """

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        kept_of(0, sparsity)
        self.sparsity = sparsity

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Remember what is prunable; nothing is masked before the end."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        self.kept_weights = self.kept_at(self.sparsity)

    @torch.no_grad()
    def gradients(self) -> None:
        """Zero the gradient of all prunable weights but the Q with the largest |w * dL/dw|."""
        pairs = self.gradients_of()
        if not pairs:
            return
        grads = [grad for _, grad in pairs.values()]
        scores = torch._foreach_mul([weight for weight, _ in pairs.values()], grads)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_abs_(scores)  # pyright: ignore[reportPrivateImportUsage]
        active = keep_global(dict(zip(pairs, scores, strict=True)), self.kept_weights)
        torch._foreach_mul_(grads, list(active.values()))  # pyright: ignore[reportPrivateImportUsage]

    def finish(self) -> Masks:
        """Remove the smallest weights of all layers."""
        return self.prune_by_magnitude_(self.sparsity)
