"""DPF: dynamic pruning with feedback, pruned weights go on learning (Lin et al. 2020)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import keep_global, magnitudes
from prunus.during.schedule import cubic, sparsity_after
from prunus.during.straight import straight_through
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.train import During, Plan


class DPF(During):
    """Dynamic model pruning with feedback: the gradient at the pruned weights moves the dense ones.

        w <- w - lr * g(m * w)    m = the largest |w| over all layers, chosen anew every `refresh` steps

    Lin et al. 2020 ("Dynamic Model Pruning with Feedback"); the sparsity of m rises as in `GMP`, at the same
    moments (every, start, stop: shares of the training). A weight that was pruned by mistake is fed back and returns.
    Deviations: the optimizer's momentum and weight decay act on the dense weights as on any. No copy of the model is
    made: the forward pass multiplies, and the gradient goes straight through.
    Mind: behind a neuron or filter of which every weight is masked, BatchNorm divides by sqrt(eps), so its dense
    weights get gradients some 300 times as large and outgrow all others. Clip gradients where that happens (small or
    very sparse layers).
    Raises ValueError for a sparsity outside [0, 1), refresh < 1, or (in `attach`) shares that allow no pruning.

    >>> dpf = DPF(0.9)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    >>> trace = train(model, batches, optimizer, lambda step: 1.0, steps=20, during=[dpf])
    >>> masks = dpf.finish()
    """

    def __init__(
        self, sparsity: float, *, refresh: int = 16, every: float = 0.1, start: float = 0.0, stop: float = 0.9
    ) -> None:
        super().__init__()
        kept_of(0, sparsity)
        cubic(sparsity, 1, every=every, start=start, stop=stop)  # refuses what it does before any work
        if refresh < 1:
            raise ValueError(f"DPF chooses its mask every `refresh` steps, at least 1; got {refresh}")
        self.sparsity, self.refresh = sparsity, refresh
        self.every, self.start, self.stop = every, start, stop

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Hold masks that keep all that those of the training do."""
        self.hold_masks(model, optimizer, plan.views, within=plan.masks)
        self.kept_at(self.sparsity)
        self.total = sum(parameter.numel() for parameter in self.pruned_parameters.values())
        self.events = cubic(self.sparsity, plan.steps, every=self.every, start=self.start, stop=self.stop)

    def weights(self) -> dict[str, Tensor]:
        """The masked weights, their gradient straight through to the dense ones."""
        return straight_through(self.pruned_parameters, self.held())

    def after_step(self, step: int) -> None:
        """Choose the mask anew, when it is time."""
        done = step + 1
        if done in self.events or done % self.refresh == 0:
            kept = kept_of(self.total, sparsity_after(self.events, done))
            self.set_masks_(keep_global(self.within(magnitudes(self.pruned_parameters)), kept))

    def finish(self) -> Masks:
        """Zero what the last mask prunes."""
        self.enforce_()
        return self.masks()
