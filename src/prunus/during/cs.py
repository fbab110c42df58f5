"""CS: continuous sparsification, a gate for every weight that hardens while training (Savarese et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.learned import check_rates, finish_learned_, train_with_
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.train import During, Plan


class CS(During):
    """Continuous sparsification: each weight is multiplied by a sigmoid gate, which grows steeper until it is a mask.

        forward c * w * sigmoid(beta_t * q)     loss + penalty * sum sigmoid(beta_t * q)
        beta_t = beta^(t / (steps - 1)),  c = 1 / sigmoid(init)

    Savarese et al. 2020 ("Winning the Lottery with Continuous Sparsification", its relaxation; c is in the
    authors' code). q starts at `init` (lower: sparser), has the learning rate `lr` (None: that of the optimizer's first
    group) and no weight decay. The sparsity follows from init and penalty and cannot be set. With exact=True the end is
    magnitude pruning of the gated weights to `sparsity`: of those with q > 0, and if they are too few, the others by q.
    What CS reached by itself, the share of q <= 0, is in the buffer `reached`.
    Deviations: beta rises by the step, not the epoch; one round, without going back to early weights; the final weights
    are those of the last forward pass, gates included, so that they agree with the statistics of BatchNorm.
    Raises ValueError for a sparsity outside [0, 1), beta <= 0, penalty < 0 or lr <= 0.

    >>> cs = CS(0.9, penalty=1e-6)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[cs])
    >>> masks = cs.finish()
    """

    beta_now: Tensor

    def __init__(
        self,
        sparsity: float,
        *,
        penalty: float = 1e-8,
        beta: float = 200.0,
        init: float = 0.0,
        lr: float | None = None,
        exact: bool = True,
    ) -> None:
        super().__init__()
        kept_of(0, sparsity)
        if beta <= 0 or penalty < 0:
            raise ValueError(f"CS needs beta > 0 and penalty >= 0; got {beta=}, {penalty=}")
        check_rates(self, lr=lr)
        self.sparsity, self.strength, self.beta, self.init = sparsity, penalty, beta, init
        self.lr, self.exact = lr, exact

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Make the gates and train them with the model."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        if self.exact:
            self.kept_at(self.sparsity)
        self.last = max(1, plan.steps - 1)
        weights = self.pruned_parameters.values()
        wide = ((weight, torch.promote_types(weight.dtype, torch.float32)) for weight in weights)  # steps are small
        self.gates = nn.ParameterList(torch.full_like(weight, self.init, dtype=dtype) for weight, dtype in wide)
        self.scale = 1 + math.exp(-self.init)  # 1 / sigmoid(init)
        self.register_buffer("beta_now", torch.ones((), device=next(iter(weights)).device))
        self.register_buffer("reached", torch.tensor(torch.nan))
        train_with_(optimizer, self.gates, lr=self.lr, weight_decay=0.0)

    def before_step(self, step: int) -> None:
        """Make the gates steeper."""
        self.beta_now.fill_(self.beta ** (step / self.last))

    def weights(self) -> dict[str, Tensor]:
        """The gated weights."""
        pairs = zip(self.pruned_parameters.items(), self.gates, strict=True)
        gated = ((name, weight, (self.beta_now * gate).sigmoid()) for (name, weight), gate in pairs)
        return {name: (weight * gate * self.scale).to(weight.dtype) for name, weight, gate in gated}

    def penalty(self) -> Tensor:
        """The sum of all gates, times the penalty's strength."""
        return self.strength * torch.stack([(self.beta_now * gate).sigmoid().sum() for gate in self.gates]).sum()

    @torch.no_grad()
    def finish(self) -> Masks:
        """Write the gated weights into the model."""
        effective = self.weights()
        pairs = zip(effective.items(), self.gates, strict=True)
        scores = {name: torch.where(gate > 0, weight.abs(), gate) for (name, weight), gate in pairs}
        return finish_learned_(self, effective, scores, self.sparsity if self.exact else None)
