"""RigL: rigging the lottery, sparse throughout, connections grow where the gradient is largest (Evci et al. 2020)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import without_inputs
from prunus.during.topology import exchange, random_topology
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.score import Allocation, Count, erk, limited
from prunus.train import During, Plan


class RigL(During):
    """Rigged lottery: a random sparse network whose smallest weights make room where the gradient is largest.

        every `delta` steps, until `stop` of all T steps, in each layer:
        drop the f(t) * active smallest |w|, grow as many of the largest |dL/dw| among all not kept, at weight 0
        f(t) = alpha / 2 * (1 + cos(pi * t / (stop * T)))     (Evci et al. 2020, "Rigging the Lottery")

    topology: how the zeros are shared out at the start and so ever after: `erk` (Erdos-Renyi-Kernel), `uniform`.
    The gradient at pruned weights comes from the ordinary backward pass (they are in the forward pass, as zeros).
    Deviations: the step at which connections change is an ordinary training step too, where the paper omits it; the
    paper's "uniform" leaves the first layer dense, this one does not; clipping counts the gradient at pruned weights; a
    layer that the step did not reach (an expert) exchanges nothing.
    A connection that is dropped and grown at once keeps its weight, as in the authors' code.
    Raises ValueError for a sparsity outside [0, 1), alpha or stop outside (0, 1], delta < 1, a topology that looks at
    inputs, or (in `attach`) masks of the training that leave fewer weights, or (in `check`) too short a training.

    >>> rigl = RigL(0.9, delta=5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[rigl])
    >>> masks = rigl.finish()
    """

    def __init__(
        self,
        sparsity: float,
        *,
        topology: Allocation | Count = erk,
        alpha: float = 0.3,
        delta: int = 100,
        stop: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__()
        kept_of(0, sparsity)
        if not (0 < alpha <= 1 and 0 < stop <= 1 and delta >= 1):
            raise ValueError(f"RigL needs alpha and stop in (0, 1] and delta >= 1; got {alpha=}, {stop=}, {delta=}")
        self.sparsity, self.topology, self.seed = sparsity, without_inputs(topology), seed
        self.alpha, self.delta, self.stop = alpha, delta, stop

    def check(self, steps: int, epoch_steps: int) -> None:
        """Raises ValueError for steps that are too few for one exchange."""
        end = self.stop * steps
        if self.delta >= end:
            raise ValueError(f"RigL with delta={self.delta} changes nothing before step {end:g}: make delta smaller")

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Choose the random topology; the weights are masked before the first step."""
        self.check(plan.steps, plan.epoch_steps)
        self.plan, self.end = plan, self.stop * plan.steps
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        self.zero_when_resumed()
        self.set_masks_(random_topology(model, plan, self.sparsity, self.topology, self.seed))
        # The step's gradients, and whose they are: written before they are read, so no part of the state.
        self.seen, self.fresh = nn.Module(), frozenset[str]()
        for place, parameter in enumerate(self.pruned_parameters.values()):
            self.seen.register_buffer(f"gradient{place}", torch.zeros_like(parameter), persistent=False)

    def before_step(self, step: int) -> None:
        """Start from the sparse network."""
        if step == 0:
            self.enforce_()

    @torch.no_grad()
    def gradients(self) -> None:
        """Remember the gradients, those at pruned weights too."""
        stored, pairs = self._stored(), self.gradients_of()
        if pairs:
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [stored[name] for name in pairs], [grad for _, grad in pairs.values()]
            )
        self.fresh = frozenset(pairs)

    def follow(self) -> None:
        """Hold pruned weights at zero."""
        self.enforce_()

    def after_step(self, step: int) -> None:
        """Exchange connections, when it is time."""
        done = step + 1
        if done % self.delta or done >= self.end or not self.fresh:
            return
        fraction = self.alpha / 2 * (1 + math.cos(math.pi * done / self.end))
        stored, views = self._stored(), [view for view in self.plan.views if view.parameter in self.fresh]
        growth = {view.name: limited(view.matrix(stored[view.parameter]).abs(), view, self.given) for view in views}
        self.set_masks_(exchange(views, self.pruned_parameters, self.held(), growth, fraction))
        self.enforce_()

    def finish(self) -> Masks:
        """The masks of the last topology."""
        self.enforce_()
        return self.masks()

    def _stored(self) -> dict[str, Tensor]:
        return dict(zip(self.pruned_parameters, self.seen.buffers(), strict=True))
