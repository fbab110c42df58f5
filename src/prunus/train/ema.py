"""A running mean of the weights while they are trained, which takes their place at the end.

mean <- decay * mean + (1 - decay) * weights     after every step
"""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from prunus.train.hooks import During, Plan

__all__ = ["Ema"]


class Ema(During):
    """The exponential moving average of all parameters and floating buffers; `finish` writes it into the model.

    decay: share of the old mean that stays in each step, in (0, 1). It starts at the weights after the first step.
    Entries that a mask holds at zero from the start are zero in the mean. Raises ValueError for another decay.

    >>> ema, optimizer = Ema(0.999), torch.optim.SGD(model.parameters(), lr=0.1)
    >>> trace = train(model, batches, optimizer, linear_warmup_decay(100), steps=100, during=[ema])
    >>> ema.finish()
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        if not 0 < decay < 1:
            raise ValueError(f"Ema's decay lies in (0, 1); got {decay}. 0.999 averages about 1,000 steps.")
        self.decay = decay

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Start the mean at the model as it is."""
        everything = [*model.parameters(), *model.buffers()]
        self.followed = [tensor.detach() for tensor in everything if tensor.is_floating_point()]
        self.means = nn.Module()
        for place, tensor in enumerate(self.followed):
            self.means.register_buffer(f"mean{place}", tensor.clone())

    @torch.no_grad()
    def follow(self) -> None:
        """Move the mean towards the weights by 1 - decay."""
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(self.means.buffers()), self.followed, 1 - self.decay
        )

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """After the first step the mean is the weights."""
        if step == 0:
            for mean, tensor in zip(self.means.buffers(), self.followed, strict=True):
                mean.copy_(tensor)

    @torch.no_grad()
    def finish(self) -> None:
        """Write the mean into the model."""
        for tensor, mean in zip(self.followed, self.means.buffers(), strict=True):
            tensor.copy_(mean)
