"""A method in the first part of a training: it prunes as if all of it were done, and the rest can be done apart."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.masks import Masks
from prunus.train import During, Plan


class Part(During):
    """A method that is told of `steps`, the steps of the whole training, by a `train` that does the first of them.

    Its moments, which are shares of the training, then are where they would be in the whole. What follows is up to the
    caller: copies of the network, say, each trained for the rest under the masks that `finish` gives.
    Raises ValueError (in `attach`) for a part that is longer than the whole.

    >>> part = Part(GMP(0.9, every=0.1, stop=0.5), steps=20)
    >>> trace = train(model, batches, optimizer, linear(20), steps=10, during=[part])
    >>> masks = part.finish()
    """

    def __init__(self, method: During, steps: int) -> None:
        super().__init__()
        self.method, self.steps = method, steps

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Attach the method to the whole training."""
        if plan.steps > self.steps:
            raise ValueError(f"a part of {plan.steps} steps is longer than the whole of {self.steps}")
        self.method.attach(model, optimizer, replace(plan, steps=self.steps))

    def weights(self) -> dict[str, Tensor]:
        """The method's."""
        return self.method.weights()

    def penalty(self) -> Tensor | None:
        """The method's."""
        return self.method.penalty()

    def gradients(self) -> None:
        """The method's."""
        self.method.gradients()

    def follow(self) -> None:
        """The method's."""
        self.method.follow()

    def before_step(self, step: int) -> None:
        """The method's."""
        self.method.before_step(step)

    def after_step(self, step: int) -> None:
        """The method's."""
        self.method.after_step(step)

    def finish(self) -> Masks | None:
        """The method's, after the part."""
        return self.method.finish()
