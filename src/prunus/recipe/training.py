"""How a classifier is trained: the section `train`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, create_model, model_validator

from prunus.recipe.images import Augmentation
from prunus.recipe.names import ScheduleName, optimizers, schedules
from prunus.recipe.optimizers import OneOptimizer, Optimizer, Pull, Sgd
from prunus.recipe.plain import Strict
from prunus.recipe.values import Count, Positive, Whole

__all__ = ["OptimizerChoice", "Training"]

if TYPE_CHECKING:
    OptimizerChoice = OneOptimizer
else:
    _fields: dict[str, Any] = {name: (each | None, None) for name, each in optimizers.members().items()}
    OptimizerChoice = create_model("OptimizerChoice", __base__=OneOptimizer, __module__=__name__, **_fields)


class Training(Strict):
    """How the network is trained, by SGD or another `optimizer`; `warmup`, milestones and `snapshots` are in epochs.

    penalty: what is added to the loss of the first training, not of retraining.
    clip: largest norm of the gradient. ema: decay of a running mean of the weights, which then is what is measured.
    snapshots: epochs after which the weights are kept, for weight rewinding.
    epochs: 0 leaves a pretrained network as it came.
    evaluate_every: epochs between measurements while `prunus run` trains; 0 measures at the end alone.
    """

    epochs: Whole = 30
    batch_size: Count = 512
    lr: Positive = 0.4
    schedule: ScheduleName = "linear"
    warmup: Annotated[float, Field(ge=0)] = 2
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    optimizer: OptimizerChoice | None = None
    penalty: Pull | None = None
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: Augmentation = Augmentation(crop=4, flip=True)
    clip: Positive | None = None
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    snapshots: tuple[Annotated[int, Field(ge=0)], ...] = ()
    evaluate_every: Annotated[int, Field(ge=0)] = 0

    @property
    def chosen(self) -> Optimizer:
        """The optimizer: SGD where none is named."""
        return Sgd() if self.optimizer is None else self.optimizer.one

    @model_validator(mode="after")
    def _check(self) -> Training:
        if self.epochs and self.warmup >= self.epochs:
            raise ValueError(f"warmup: {self.warmup:g} epochs leave none of the {self.epochs}; set a smaller warmup")
        if self.warmup and not schedules.knows(self.schedule, "warmup"):
            raise ValueError(f"schedule {schedules.name(self.schedule)} rises by itself: set warmup: 0")
        late = [epoch for epoch in self.snapshots if epoch > self.epochs]
        if late:
            raise ValueError(f"snapshots: epoch {late[0]} lies behind the end, epochs: {self.epochs}")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum above 0")
        if self.nesterov and self.chosen != Sgd():
            raise ValueError("nesterov is a form of plain SGD: leave out nesterov or optimizer")
        return self
