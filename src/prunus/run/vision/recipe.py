"""What a classifier run is asked to do: images, model, training, pruning and retraining, checked before any work.

    images ─▶ train (dense, or during a method) ─▶ prune ─▶ retrain, `prune.phases` times ─▶ measure

A recipe with the key `images` is a classifier recipe; lengths are in epochs of the training images.
"""

from __future__ import annotations

import difflib
import os
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    create_model,
    field_validator,
    model_validator,
)

from prunus.data import CORRUPTIONS, Strengths
from prunus.patterns import Pattern, check_sparsity
from prunus.run.names import (
    AllocationName,
    CriterionName,
    PatternName,
    RetrainingName,
    ScheduleName,
    allocations,
    criteria,
    fixed_sparsity,
    methods,
    optimizers,
    pattern_of,
    schedules,
)
from prunus.run.recipe import Device, Share, Strict, digest, looks_local, said
from prunus.run.vision.optimizers import OneOptimizer, Optimizer, Pull, Sgd
from prunus.score import Allocation, Criterion, allocation_of, check_comparable, compared, criterion_of

__all__ = [
    "Augmentation",
    "ClassifierRecipe",
    "Corruptions",
    "ImageSource",
    "Pruning",
    "Retraining",
    "Training",
    "dense_key",
    "dense_of",
]

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Kind = Literal["zeros", "filters", "low_rank"]


class ImageSource(Strict):
    """Where the images come from, and what is measured on.

    source: "digits", a folder or file (.parquet, .npz, .safetensors), or a Hugging Face data set.
    measure_on: "validation" holds out the share `validation` of the training images, without augmentation, and never
    reads the test images; "test" trains on all training images; "both" holds out the same share for what is chosen by
    images (greedy and learned soups), and measures on the test images.
    """

    source: str
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    measure_on: Literal["test", "validation", "both"] = "test"

    @property
    def measured(self) -> str:
        """Which images are measured on: test or validation."""
        return "validation" if self.measure_on == "validation" else "test"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("source")
    @classmethod
    def _there(cls, value: str) -> str:
        local = looks_local(value) or value.endswith(".npz")
        if local and not Path(value).expanduser().exists():
            raise ValueError(f"no file or folder (seen from {os.getcwd()}); give a path, a data set name or digits")
        return value


class Augmentation(Strict):
    """crop: pixels of padding before a random crop; flip: left and right at random; cutout: side of a blank square."""

    crop: Annotated[int, Field(ge=0)] = 0
    flip: bool = False
    cutout: Annotated[int, Field(ge=0)] = 0


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
    evaluate_every: epochs between measurements while `prunus run` trains; 0 measures at the end alone.
    """

    epochs: Count = 30
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
        if self.warmup >= self.epochs:
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


class Pruning(Strict):
    """Which weights go: criterion, allocation, pattern, sparsity, in how many phases.

    kind: "zeros" leaves a network of the same size, sparsity being the share of zeros; "filters" removes that share of
    the filters, of each layer (allocation uniform) or of all (global); "low_rank" decomposes layers, dropping that
    share of the ranks of each (uniform) or of the weights of all (global).
    """

    sparsity: float = 0.9
    kind: Kind = "zeros"
    """What becomes of the network: zeros, or a smaller one."""
    criterion: CriterionName = "magnitude"
    """How weights are scored, or layers solved."""
    allocation: AllocationName = "global"
    """How many weights each layer keeps."""
    pattern: PatternName = "unstructured"
    """unstructured, N:M (at most N nonzeros of M) such as 2:4, block RxC, filters."""
    phases: Count = 1
    """Prune and retrain that many times."""
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, value: Any) -> Any:
        """An N:M pattern says its own sparsity, and is the same in every layer; smaller networks are, too."""
        if isinstance(value, dict) and value.get("kind", "zeros") != "zeros":
            return {"allocation": "uniform", **value}
        fixed = fixed_sparsity(value)
        return value if fixed is None else {"sparsity": fixed, "allocation": "uniform", **value}

    @model_validator(mode="after")
    def _check(self) -> Pruning:
        pattern, criterion, allocation = pattern_of(self.pattern), self.how(), self.sharing()
        check_sparsity(pattern, self.sparsity)
        if self.kind != "zeros":
            self._check_smaller()
        if pattern.sparsity is not None and (allocation.reads or self.phases > 1):
            raise ValueError(
                f"pattern {self.pattern!r} fixes the share of zeros in every group: leave out allocation and phases"
            )
        check_comparable(criterion, allocation)
        if criterion.score is None and self.phases > 1:
            raise ValueError(f"{criterion.name} cannot stay within the masks of an earlier phase: leave out phases")
        return self

    def how(self, seed: int = 0) -> Criterion:
        """The criterion; seed: of one that draws, unless the recipe gives it its own."""
        return criterion_of(criteria.make(self.criterion, seed=seed))

    def sharing(self) -> Allocation:
        """The allocation."""
        return allocation_of(allocations.make(self.allocation))

    def where(self) -> Pattern:
        """The pattern; scores compete within rows or layers as the criterion and the allocation imply."""
        return pattern_of(self.pattern, compared(self.how(), self.sharing()))

    def _check_smaller(self) -> None:
        fixed = {"pattern": "unstructured", "phases": 1}
        fixed |= {"criterion": "magnitude"} if self.kind == "low_rank" else {}
        strange = [key for key, value in fixed.items() if getattr(self, key) != value]
        if strange:
            raise ValueError(f"kind {self.kind} makes the network smaller at once: leave out {strange[0]}")
        if self.kind == "filters" and self.criterion not in ("magnitude", "random"):
            raise ValueError(f"kind filters ranks them by magnitude or at random; got {self.criterion!r}")
        if self.allocation not in ("uniform", "global"):
            raise ValueError(f"kind {self.kind} knows the allocations uniform and global; got {self.allocation!r}")


class Retraining(Strict):
    """How long and on which schedule the pruned network is trained again, after each phase.

    epochs or share (of the training's epochs): one of them, for each phase or for all together (`of`).
    warmup: share of a phase's steps, for SLR, CLR, LLR and ALLR. rewind: the epoch whose weights the surviving weights
    take before retraining; it must be one of train.snapshots. lr: another peak than the training's.
    """

    schedule: RetrainingName = "allr"
    """Of the learning rate."""
    epochs: Positive | None = None
    """How long, in epochs of the training images."""
    share: Positive | None = None
    """How long, as a share of the dense training."""
    of: Literal["phase", "total"] = "phase"
    """The budget is that of each phase, or of all together."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.1
    rewind: Annotated[int, Field(ge=0)] | None = None
    """Epoch whose weights the surviving ones take again."""
    lr: Positive | None = None

    @model_validator(mode="after")
    def _check(self) -> Retraining:
        if (self.epochs is None) == (self.share is None):
            raise ValueError("give either epochs or share (of the training's epochs), not both or neither")
        return self


def _corruption(name: str) -> str:
    if name not in CORRUPTIONS:
        close = difflib.get_close_matches(name, CORRUPTIONS, n=1)
        raise ValueError("no such corruption; " + (f"did you mean {close[0]!r}?" if close else ", ".join(CORRUPTIONS)))
    return name


class Corruptions(Strict):
    """On which corruptions of the images that are measured on the final network is measured as well.

    names: all of them if empty. strengths: those of CIFAR-10-C or of ImageNet-C. folder: where corrupted sets are kept
    for other runs, or one that holds CIFAR-10-C; None makes them anew. images: how many are corrupted, the first ones.
    """

    names: tuple[Annotated[str, AfterValidator(_corruption)], ...] = ()
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    strengths: Strengths = "cifar"
    folder: str | None = None
    images: Count | None = None
    seed: int = 0


def _during(value: Any) -> Any:
    """One method by name with the options that its class takes."""
    if value is None:
        return None
    choice = methods.check(value)
    return {choice: {}} if isinstance(choice, str) else choice


class ClassifierRecipe(Strict):
    """A whole classifier run: train, (during a method), prune, retrain, measure.

    model: a name of `models.build_model`, such as resnet18, resnet20, wrn28_10, "timm:NAME", "torchvision:NAME".
    during: one method that prunes while training, by name, with its options; it reaches prune.sparsity.
    capture: record the training step as a CUDA graph. compile: the network's repeated blocks, by torch.compile.
    recalibrate: share of an epoch's augmented batches on which BatchNorm statistics are counted anew, after pruning and
    at the end of every run; 0: never.
    """

    images: ImageSource
    model: str = "resnet18"
    seed: int = 0
    """Of weights, order and augmentation."""
    train: Training = Training()
    during: Annotated[dict[str, dict[str, Any]] | None, BeforeValidator(_during)] = None
    prune: Pruning | None = None
    retrain: Retraining | None = None
    recalibrate: Share = 1.0
    """Share of the images that count BatchNorm anew."""
    corruptions: Corruptions | None = None
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    device: Device = "auto"
    capture: Literal["auto"] | bool = "auto"
    compile: bool = False
    channels_last: Literal["auto"] | bool = "auto"
    out: str = "runs/train"

    @model_validator(mode="after")
    def _check(self) -> ClassifierRecipe:
        if self.prune is None and (self.during is not None or self.retrain is not None):
            raise ValueError(f"{'during' if self.during else 'retrain'} needs prune.sparsity: give a section prune")
        if self.during is not None and self.prune is not None:
            self._check_during(self.prune)
        rewind = self.retrain.rewind if self.retrain is not None else None
        if rewind is not None and rewind not in self.train.snapshots:
            raise ValueError(f"retrain.rewind: epoch {rewind} is not kept; set train.snapshots: [{rewind}]")
        if rewind is not None and self.prune is not None and self.prune.kind != "zeros":
            raise ValueError("retrain.rewind: a network that became smaller has no earlier weights; leave it out")
        _check_model(self.model)
        if Path(self.out).is_file():
            raise ValueError(f"out: {self.out!r} is a file; give a folder")
        return self

    def _check_during(self, prune: Pruning) -> None:
        own = ("kind", "phases", "criterion", "allocation", "pattern")
        asked = [key for key in own if key in prune.model_fields_set]
        changed = [key for key in asked if getattr(prune, key) != Pruning.model_fields[key].default]
        if changed:
            raise ValueError(f"prune.{changed[0]}: a method that prunes during training chooses itself; leave it out")
        if self.retrain is not None and self.retrain.rewind is not None:
            raise ValueError("retrain.rewind goes with pruning after training; leave it out beside during")
        assert self.during is not None
        name, options = next(iter(self.during.items()))
        try:
            methods.make({name: options}, prune.sparsity)
        except TypeError as error:
            raise ValueError(f"during.{name}: {error}") from None


@lru_cache
def _check_model(name: str) -> None:
    """Refuse a name that is no model, without making its weights."""
    from prunus.data import build_model

    with torch.device("meta"):
        build_model(name, classes=10)


def dense_of(recipe: ClassifierRecipe) -> ClassifierRecipe:
    """The recipe of the dense training that a pruned network starts from."""
    plain = {"during": None, "prune": None, "retrain": None, "recalibrate": 1.0, "corruptions": None}
    own = {name: getattr(recipe, name) for name in ClassifierRecipe.model_fields}  # a soup's recipe has more
    return ClassifierRecipe.model_construct(None, **(own | plain))


def dense_key(recipe: ClassifierRecipe) -> str:
    """Hash of what decides the dense training: recipes that agree on it share the run."""
    dense = dense_of(recipe)
    if dense.images.measure_on == "both":  # which trains on the images that "validation" trains on
        images = dense.images.model_copy(update={"measure_on": "validation"})
        dense = dense.model_copy(update={"images": images})
    return digest(said(dense, but={"out": True, "train": {"evaluate_every"}}))[:24]
