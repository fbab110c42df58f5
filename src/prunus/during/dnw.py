"""DNW: discovering neural wirings, the largest weights of every step are the network (Wortsman et al. 2019)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import keep_global, magnitudes
from prunus.during.straight import straight_through
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.train import During, Plan


class DNW(During):
    """Discovering neural wirings: every forward pass uses the largest |w| of that moment; all weights are updated.

        forward w * [w among the `kept` largest |w| of all layers]      backward as if all had been used

    Wortsman et al. 2019 ("Discovering Neural Wirings"), edges read as weights, as in its part on sparse networks. The
    sparsity is the final one from the first step on.
    Deviations: one selection over all layers, where the paper selects in each; exact counts, ties to the lower index.
    Mind: BatchNorm behind a neuron without weights enlarges their gradients, see `DPF`; clip gradients if need be.
    Raises ValueError for a sparsity outside [0, 1).

    >>> dnw = DNW(0.9)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[dnw])
    >>> masks = dnw.finish()
    """

    def __init__(self, sparsity: float) -> None:
        super().__init__()
        kept_of(0, sparsity)
        self.sparsity = sparsity

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Hold masks, which every forward pass overwrites."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        self.kept_weights = self.kept_at(self.sparsity)

    def weights(self) -> dict[str, Tensor]:
        """The largest weights, their gradient straight through to all."""
        self.set_masks_(keep_global(self.within(magnitudes(self.pruned_parameters)), self.kept_weights))
        return straight_through(self.pruned_parameters, self.held())

    def finish(self) -> Masks:
        """Keep the largest weights that the last step left."""
        return self.prune_by_magnitude_(self.sparsity)
