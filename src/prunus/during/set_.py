"""SET: sparse evolutionary training, sparse throughout, connections grow at random (Mocanu et al. 2018)."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from prunus.during.choose import without_inputs
from prunus.during.topology import exchange, random_scores, random_topology
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.score import Allocation, Count, erk, limited
from prunus.train import During, Plan


class SET(During):
    """Sparse evolutionary training: a random sparse network, of which the smallest weights are replaced by random ones.

        every `delta` steps (None: every epoch) but the last, in each layer:
        drop the zeta * active smallest |w|, grow as many others at random, at weight 0

    Mocanu et al. 2018 ("Scalable training of artificial neural networks with adaptive sparse connectivity",
    zeta = 0.3). topology: how the zeros are shared out: `erk` (the paper's Erdos-Renyi, for convolutions too) or
    `uniform`.
    Deviations: new weights start at 0 as in RigL, where the paper draws them; dropped are the smallest |w|, where the
    paper takes a share of the positive and of the negative ones; chance may grow again what was just dropped; a frozen
    layer exchanges nothing, because what it grew would stay at 0.
    Raises ValueError for a sparsity outside [0, 1), zeta outside (0, 1], delta < 1, a topology that looks at inputs, or
    (in `attach`) masks of the training that leave fewer weights, or (in `check`) too short a training.

    >>> method = SET(0.9, delta=5)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[method])
    >>> masks = method.finish()
    """

    def __init__(
        self,
        sparsity: float,
        *,
        topology: Allocation | Count = erk,
        zeta: float = 0.3,
        delta: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        kept_of(0, sparsity)
        if not 0 < zeta <= 1 or (delta is not None and delta < 1):
            raise ValueError(f"SET needs zeta in (0, 1] and delta >= 1; got {zeta=}, {delta=}")
        self.sparsity, self.zeta, self.delta, self.seed = sparsity, zeta, delta, seed
        self.topology = without_inputs(topology)

    def check(self, steps: int, epoch_steps: int) -> None:
        """Raises ValueError for steps that are too few for one exchange."""
        every = self.delta or epoch_steps
        if every >= steps:
            raise ValueError(
                f"SET changes connections every {every} steps, and training has {steps}: make delta smaller, "
                "or say how long an epoch is (epoch_steps)"
            )

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Choose the random topology; the weights are masked before the first step."""
        self.check(plan.steps, plan.epoch_steps)
        self.plan, self.every = plan, self.delta or plan.epoch_steps
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        self.zero_when_resumed()
        self.set_masks_(random_topology(model, plan, self.sparsity, self.topology, self.seed))

    def before_step(self, step: int) -> None:
        """Start from the sparse network."""
        if step == 0:
            self.enforce_()

    def follow(self) -> None:
        """Hold pruned weights at zero."""
        self.enforce_()

    def after_step(self, step: int) -> None:
        """Exchange connections, when it is time."""
        done = step + 1
        views = [view for view in self.plan.views if self.pruned_parameters[view.parameter].requires_grad]
        if done % self.every == 0 and done < self.plan.steps and views:
            drawn = random_scores(self.plan.views, [self.seed, done])
            growth = {view.name: limited(drawn[view.name], view, self.plan.masks) for view in views}
            self.set_masks_(exchange(views, self.pruned_parameters, self.held(), growth, self.zeta))
            self.enforce_()

    def finish(self) -> Masks:
        """The masks of the last topology."""
        self.enforce_()
        return self.masks()
