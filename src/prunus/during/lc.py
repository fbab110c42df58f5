"""LC: learning-compression, weights outside the best sparse approximation are pulled to zero (Carreira-Perpinan)."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import Optimizer

from prunus.during.choose import keep_global, magnitudes
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.train import During, Plan


class LC(During):
    """Learning-compression: a penalty pulls the weights towards their best sparse approximation, ever harder.

        minimise L(w) + mu_j / 2 * ||w - P(w)||^2     P keeps the largest |w| of all layers, mu_j = mu * growth^j

    Carreira-Perpinan & Idelbayev 2018 ("Learning-Compression Algorithms for Neural Net Pruning", l0 constraint,
    quadratic penalty), as simplified by Zimmer et al. 2023: P is taken anew in every step, where the paper alternates,
    and the penalty takes the place of weight decay, so that only weights outside P(w) decay. The optimizer, which adds
    decay * w, is given dL/dw + (mu_j [w not in P(w)] - decay) * w. j = 0 .. stages - 1 in equal parts of the training;
    growth = 1 keeps mu.
    mu: None stands for the weight decay of each parameter's group. Decay that does not pass through the gradient
    (AdamW) cannot be taken back, and stays on all weights.
    The end is exact magnitude pruning over all layers.
    Raises ValueError for a sparsity outside [0, 1), mu <= 0, growth < 1, stages < 1, or (in `attach`) when mu is None
    and nothing decays.

    >>> lc = LC(0.9)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[lc])
    >>> masks = lc.finish()
    """

    factor: torch.Tensor  # growth^j of the step

    def __init__(self, sparsity: float, *, mu: float | None = None, growth: float = 1.1, stages: int = 30) -> None:
        super().__init__()
        kept_of(0, sparsity)
        if (mu is not None and mu <= 0) or growth < 1 or stages < 1:
            raise ValueError(f"LC needs mu > 0 (or None), growth >= 1 and stages >= 1; got {mu=}, {growth=}, {stages=}")
        self.sparsity, self.mu, self.growth, self.stages = sparsity, mu, growth, stages

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Read each parameter's weight decay."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        self.steps = plan.steps
        self.kept_weights = self.kept_at(self.sparsity)
        group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        groups = {name: group_of.get(id(parameter), {}) for name, parameter in self.pruned_parameters.items()}
        decays = {name: float(group.get("weight_decay", 0.0)) for name, group in groups.items()}
        if self.mu is None and not any(decays.values()):
            raise ValueError(
                "LC's penalty is the optimizer's weight decay, which is 0: give the optimizer one, or LC a mu"
            )
        self.pulls = {name: decay if self.mu is None else self.mu for name, decay in decays.items()}
        self.cancelled = {
            name: 0.0 if group.get("decoupled_weight_decay") else decays[name] for name, group in groups.items()
        }
        self.register_buffer("factor", torch.ones((), device=next(iter(self.pruned_parameters.values())).device))

    def before_step(self, step: int) -> None:
        """Raise mu at the start of a stage."""
        stage = self.stages * step // self.steps
        if stage != self.stages * (step - 1) // self.steps:
            self.factor.fill_(self.growth**stage)

    @torch.no_grad()
    def gradients(self) -> None:
        """Add the penalty's gradient at the weights outside P(w), and take weight decay away."""
        pairs = self.gradients_of()
        if not pairs:
            return
        weights, grads = [weight for weight, _ in pairs.values()], [grad for _, grad in pairs.values()]
        scores = self.within(magnitudes(self.pruned_parameters))  # also of what no step reached
        best = keep_global(scores, self.kept_weights)
        outside = torch._foreach_mul(weights, [~best[name] for name in pairs])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(outside, [self.pulls[name] for name in pairs])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(outside, self.factor)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(grads, outside)  # pyright: ignore[reportPrivateImportUsage]
        decay = torch._foreach_mul(weights, [self.cancelled[name] for name in pairs])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_sub_(grads, decay)  # pyright: ignore[reportPrivateImportUsage]

    def finish(self) -> Masks:
        """Keep P(w)."""
        return self.prune_by_magnitude_(self.sparsity)
