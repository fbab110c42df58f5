"""ELSA: ADMM on the training loss, weights are pulled to a sparse copy that is chosen anew (Lee et al. 2026)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import keep_allocated, without_inputs
from prunus.layers import parameter_shapes
from prunus.masks import Masks
from prunus.patterns import check_sparsity, parse
from prunus.score import Allocation, Count, Scores, uniform
from prunus.train import During, Plan


class ELSA(During):
    """The alternating direction method of multipliers around training itself: dense weights w, a sparse copy z.

        minimise L(w) + lam / 2 * ||w - z + u||^2,  z sparse        (u: the scaled multipliers)
        every step:              g + lam * (w - z + u) is given to the optimizer, after clipping
        every `interval` steps:  z = P(w + u),  u += w - z          P keeps the best of v * (w + u)^2

    v is Adam's second moment (of other optimizers 1): an entry costs what the loss, as far as Adam knows its curvature,
    loses with it. Weights outside P are pulled to zero ever harder while L says otherwise, and come back where it does
    not give in. At the start z = P(w) and u = 0; at the end w = P(w).

    Since u = (w + u) - z, z lives on what P keeps and u on what it prunes. So both are held in one tensor, z - u, which
    is what w is pulled to.

    pattern: where zeros may lie: unstructured, N:M, block RxC. allocation: how the zeros are shared out, by shapes or
    scores; of patterns that leave it open. lam is meant for clipped gradients (norm 1) and Adam.
    Source: Lee et al., "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM" (ICLR 2026).
    Raises ValueError for a sparsity outside [0, 1) or beside the pattern's, lam <= 0, interval < 1, an allocation that
    looks at inputs, and (in `attach`) layers that the pattern does not fit.

    >>> elsa, optimizer = ELSA(0.7, interval=8), torch.optim.Adam(model.parameters(), lr=1e-3)
    >>> trace = train(model, batches, optimizer, lambda step: 1 - step / 20, steps=20, clip=1.0, during=[elsa])
    >>> masks = elsa.finish()
    """

    def __init__(
        self,
        sparsity: float,
        *,
        pattern: str = "unstructured",
        lam: float = 0.01,
        interval: int = 32,
        allocation: Allocation | Count = uniform,
    ) -> None:
        super().__init__()
        self.pattern = parse(pattern, "layer")
        self.sparsity = check_sparsity(self.pattern, sparsity)
        if not 0 < lam < float("inf") or interval < 1:
            raise ValueError(f"ELSA needs lam > 0 and interval >= 1; got {lam=}, {interval=}")
        self.lam, self.interval, self.allocation = lam, interval, without_inputs(allocation)

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Choose the first sparse copy."""
        self.hold_masks(model, optimizer, plan.views)
        self.views, self.shapes = plan.views, parameter_shapes(dict(model.named_parameters()), plan.views)
        weights = self._weights()
        self.set_masks_(self._best(weights))
        self.goals = nn.Module()
        for place, (name, mask) in enumerate(self.held().items()):
            self.goals.register_buffer(f"goal{place}", torch.where(mask, weights[name], 0.0))

    @torch.no_grad()
    def gradients(self) -> None:
        """Add lam * (w - z + u)."""
        goals = dict(zip(self.pruned_parameters, self.goals.buffers(), strict=True))
        pairs = self.gradients_of()
        away = torch._foreach_sub([weight for weight, _ in pairs.values()], [goals[name] for name in pairs])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_([grad for _, grad in pairs.values()], away, alpha=self.lam)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Choose the sparse copy anew and move the multipliers, when it is time."""
        if (step + 1) % self.interval:
            return
        both = {  # w + u
            name: weight - goal.masked_fill(mask, 0.0)
            for (name, weight), mask, goal in zip(
                self._weights().items(), self.held().values(), self.goals.buffers(), strict=True
            )
        }
        self.set_masks_(self._best(both))
        for mask, goal, each in zip(self.held().values(), self.goals.buffers(), both.values(), strict=True):
            goal.copy_(torch.where(mask, each, -each))

    def finish(self) -> Masks:
        """Keep P(w)."""
        self.set_masks_(self._best(self._weights()))
        self.enforce_()
        return self.masks()

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.pruned_parameters.items()}

    @torch.no_grad()
    def _best(self, values: Mapping[str, Tensor]) -> Masks:
        """The masks of P: of the largest v * value^2."""
        sizes: dict[str, Tensor] = {}
        for name, value in values.items():
            second = self.optimizer.state.get(self.pruned_parameters[name], {}).get("exp_avg_sq")
            square = value.float().square()
            sizes[name] = square if second is None else square.mul_(second)
        scores = Scores({view.name: view.matrix(sizes[view.parameter]) for view in self.views}, self.shapes)
        chosen = keep_allocated(scores, self.sparsity, self.allocation, self.pattern)
        return Masks.of(self.views, chosen, {name: value.shape for name, value in values.items()})
