"""GMP: gradual magnitude pruning, a little more after every interval (Zhu & Gupta 2017)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import keep_allocated, magnitudes, without_inputs
from prunus.during.schedule import cubic
from prunus.layers import parameter_shapes
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.score import Allocation, Count, Scores, global_, limited
from prunus.train import During, Plan


class GMP(During):
    """Gradual magnitude pruning: at n moments of the training the smallest weights go, up to `sparsity`.

        s_k = S - S * (1 - k / n)^3    (Zhu & Gupta 2017, "To prune, or not to prune", initial sparsity 0)

    every, start, stop: shares of the training; the k-th pruning follows step (start + k * every) * steps.
    variant: "hard", what is pruned stays zero; "recover", pruned weights keep their stored value, get no gradient (but
    weight decay) and may come back at the next pruning, as in the paper's code. Momentum of pruned weights is zeroed.
    allocation: one that looks at scores or shapes. The paper prunes every layer to the same sparsity (`uniform`); the
    default compares all layers (`global_`).
    Raises ValueError for a sparsity outside [0, 1), an unknown variant, an allocation that looks at inputs, or shares
    that allow no pruning.

    >>> gmp = GMP(0.9, every=0.05, stop=0.75)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[gmp])
    >>> masks = gmp.finish()
    """

    def __init__(
        self,
        sparsity: float,
        *,
        every: float = 0.1,
        start: float = 0.0,
        stop: float = 0.9,
        variant: Literal["hard", "recover"] = "hard",
        allocation: Allocation | Count = global_,
    ) -> None:
        super().__init__()
        kept_of(0, sparsity)
        cubic(sparsity, 1, every=every, start=start, stop=stop)  # refuses what it does before any work
        if variant not in ("hard", "recover"):
            raise ValueError(f"GMP's variant is 'hard' or 'recover'; got {variant!r}")
        self.sparsity, self.variant, self.allocation = sparsity, variant, without_inputs(allocation)
        self.every, self.start, self.stop = every, start, stop

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Hold masks that keep all that those of the training do."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        if self.variant == "hard":
            self.zero_when_resumed()
        self.views, self.shapes = plan.views, parameter_shapes(dict(model.named_parameters()), plan.views)
        self.kept_at(self.sparsity)
        events = cubic(self.sparsity, plan.steps, every=self.every, start=self.start, stop=self.stop)
        least = self.masks().sparsity  # moments that ask for less than the masks of the training prune leave those
        self.events = {step: max(share, least) for step, share in events.items()}

    def weights(self) -> dict[str, Tensor]:
        """Masked weights when they may recover: the model's own keep their values."""
        if self.variant == "hard":
            return {}
        return {name: self.pruned_parameters[name] * mask for name, mask in self.held().items()}

    def follow(self) -> None:
        """Hold pruned weights at zero when they may not recover."""
        if self.variant == "hard":
            self.enforce_()

    def after_step(self, step: int) -> None:
        """Prune, if this is one of the moments."""
        if step + 1 in self.events:
            self.set_masks_(self._choose(self.events[step + 1]))
            self.enforce_() if self.variant == "hard" else self.clear_state_()

    def finish(self) -> Masks:
        """Zero what is pruned."""
        self.enforce_()
        return self.masks()

    def _choose(self, sparsity: float) -> Masks:
        held, weights = self.held(), magnitudes(self.pruned_parameters)
        earlier = held if self.variant == "hard" else self.given
        scores = {view.name: limited(view.matrix(weights[view.parameter]), view, earlier) for view in self.views}
        chosen = keep_allocated(Scores(scores, self.shapes), sparsity, self.allocation)
        return Masks.of(self.views, chosen, {name: mask.shape for name, mask in held.items()})
