"""How what was pruned is trained again: what tasks share, and the section `retrain` of classifiers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from prunus.recipe.names import RetrainingName, retrainings, schedules
from prunus.recipe.plain import Strict
from prunus.recipe.values import Count, Part, Positive, Subsets, Whole
from prunus.soup import split_steps
from prunus.train import Multiplier, Original, warmup_steps

__all__ = ["ClassifierRetrain", "Distill", "Retrain"]


class Distill(Strict):
    """Hold what is retrained against the dense model besides: the loss is weight T^2 KL + (1 - weight) CE."""

    weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Weight of the divergence; that of the cross-entropy is the rest."""
    temperature: Positive = 1.0


class Retrain(Strict):
    """How long and on which schedule what was pruned is trained again, after each phase; each task adds its own keys.

    schedule: one of any training (linear, cosine, wsd, ...), after a linear warm-up; or one of those of retraining, of
    which all but llr go by the dense training.
    """

    schedule: RetrainingName = "linear"
    """Schedule of the learning rate: linear, cosine, wsd, ..., or ft, lrw, slr, clr, llr, allr."""
    of: Literal["phase", "total"] = "phase"
    """The budget is that of each phase, or of all together."""
    warmup: Part = 0.1
    """Share of the steps in which the rate rises."""

    @property
    def restarts(self) -> bool:
        """Whether its schedule is one of retraining, in units of the dense training's peak."""
        return retrainings.has(self.schedule)

    def multiplier(self, original: Original, steps: int, distance: float, epoch: int = 1) -> Multiplier:
        """The learning rate of every step, in units of its peak. distance: what pruning took away, for allr.

        epoch: the steps of one, in which milestones are counted.
        """
        if not self.restarts:
            return schedules.make(self.schedule, steps, warmup=warmup_steps(steps, self.warmup), epoch=epoch)
        share = min(1.0, steps / original.steps)
        return retrainings.make(self.schedule, original, steps, distance=distance, share=share, warmup=self.warmup)

    def shared(self, steps: int, phases: int) -> list[int]:
        """The steps of each phase. Raises ValueError for a total that leaves a phase none."""
        return [steps] * phases if self.of == "phase" else split_steps(steps, phases)


class ClassifierRetrain(Retrain):
    """How the pruned network is trained again: by the optimizer of `train`, from its peak if there is no `lr`.

    epochs, share (of the dense training's) or steps: one of them. rewind: the epoch whose weights the surviving weights
    take before retraining; it must be one of train.snapshots.
    """

    schedule: RetrainingName = "allr"
    epochs: Positive | None = None
    """Of classifiers: how long, in epochs of the training images."""
    share: Positive | None = None
    """Of classifiers: how long, as a share of the dense training."""
    steps: Count | None = None
    rewind: Whole | None = None
    """Of classifiers: epoch whose weights the surviving ones take again."""
    lr: Positive | None = None
    train: Subsets = ("full",)
    """What is trained: biases,norms or mask_lora or full ..."""
    rank: Count = 16
    """Rank of adapters."""
    alpha: Positive = 32.0
    """Scale of adapters: their update is multiplied by alpha / rank."""
    distill: Distill | None = None

    @model_validator(mode="after")
    def _check(self) -> ClassifierRetrain:
        if sum(each is not None for each in (self.epochs, self.share, self.steps)) != 1:
            raise ValueError("give one of epochs, share (of the training's epochs) and steps")
        if "lora" in self.train:
            raise ValueError(
                "train: merging 'lora' would fill pruned weights; train 'mask_lora', which keeps them zero"
            )
        return self

    def budgets(self, phases: int, dense_steps: int, epoch_steps: int) -> list[int]:
        """The steps of each phase. Raises ValueError for a total that leaves a phase none."""
        by_epochs = (self.epochs or 0) * epoch_steps if self.share is None else self.share * dense_steps
        return self.shared(self.steps or max(1, round(by_epochs)), phases)
