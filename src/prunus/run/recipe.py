"""What a run is asked to do: typed recipes of every task, read from YAML, checked before any work.

    Recipe              model, device, precision, compile, prune, retrain, soup, out, save: the same for every task
    LanguageRecipe      and dtype, streaming, calibrate, shrink, reconstruct, evaluate
    ClassifierRecipe    and images, seed, train, during, recalibrate, corruptions, ...: what has the key `images`
    EncoderRecipe       the same of texts: what has the key `texts`

A recipe is a plain YAML mapping; every key is a field below. Sections that tasks share are one class. Its defaults are
those of language models; a class `Classifier...` made of it says which are others, and what more there is.

Unknown keys, impossible patterns, sparsities outside [0, 1) and missing files are refused with the key, the value and
the mend.
"""

# A task's section may be narrower than that of all, because sections are frozen, which pyright does not see:
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, cast, get_args

import torch
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from prunus.adapt import subsets
from prunus.data import Aim, build_encoder, check_model, config_of
from prunus.masks import Masks
from prunus.measure import CORRUPTIONS
from prunus.patterns import Pattern, check_sparsity
from prunus.report import TRACKERS
from prunus.run.names import (
    AllocationName,
    AverageName,
    Choice,
    CriterionName,
    PatternName,
    RetrainingName,
    ScheduleName,
    allocations,
    averages,
    criteria,
    fixed_sparsity,
    methods,
    optimizers,
    pattern_of,
    retrainings,
    schedules,
)
from prunus.run.plain import Strict, read_yaml, yaml_value
from prunus.run.vision.optimizers import OneOptimizer, Optimizer, Pull, Sgd
from prunus.score import Allocation, Criterion, allocation_of, check_comparable, compared, criterion_of, global_
from prunus.soup import Ramp, phase_sparsities, split_steps
from prunus.train import During, Multiplier, Original, constant, cosine, linear, warmup_steps

__all__ = [
    "FORKING",
    "Augmentation",
    "Calibrate",
    "ClassifierPrune",
    "ClassifierRecipe",
    "ClassifierRetrain",
    "ClassifierSoup",
    "Corruptions",
    "Data",
    "DenseRates",
    "Device",
    "EncoderRecipe",
    "Evaluate",
    "ImageSource",
    "Kind",
    "LanguageRecipe",
    "LanguageRetrain",
    "LanguageTraining",
    "Prune",
    "Recipe",
    "Reconstruct",
    "Retrain",
    "Save",
    "Shrink",
    "Soup",
    "Strict",
    "Training",
    "Vary",
    "data_key",
    "digest",
    "given",
    "load_recipe",
    "looks_local",
    "member_of",
    "merge",
    "order_of",
    "parse",
    "read_yaml",
    "said",
    "schema_of_recipes",
    "yaml_value",
]

Section = TypeVar("Section", bound=BaseModel)
Keys = set[str] | Mapping[str, Any]
Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]  # a share that is not all
Globs = tuple[str, ...]
Kind = Literal["zeros", "filters", "low_rank"]
Baseline = Literal["imp", "longer", "reprune", "dense", "swa"]
_OF_TRAIN = {"weight_decay", "augment"}  # what members vary in the section `train`
FORKING = ("gmp", "dpf")  # methods whose mask is final some time before the training ends


def looks_local(text: str) -> bool:
    """Whether a source is meant as a path, not as a hub name."""
    endings = (".txt", ".gz", ".parquet", ".jsonl", ".gguf", ".safetensors", ".tsv", ".csv", ".npz")
    return text.startswith((".", "/", "~")) or text.endswith(endings) or text.count("/") > 1


def _device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("a device is auto, cpu, cuda or one GPU such as cuda:1")
    return value


Device = Annotated[str, AfterValidator(_device)]


# Sections of every task.


class Prune(Strict):
    """Which weights go: a criterion, a pattern, and a sparsity (the share of zeros, in [0, 1)), in how many phases."""

    criterion: CriterionName = "wanda"
    """How weights are scored, or layers solved."""
    pattern: PatternName = "unstructured"
    """unstructured, N:M (at most N nonzeros of M) such as 2:4, block RxC, filters."""
    sparsity: float = 0.5
    """Share of zeros, in [0, 1)."""
    scope: Literal["row", "layer", "model"] | None = None
    """Which scores compete."""
    allocation: AllocationName = "uniform"
    """How many weights each layer keeps."""
    phases: Count = 1
    """Prune and retrain that many times."""
    ramp: Ramp = "geometric"
    """How the sparsity rises over the phases: geometric or cubic."""
    include: Globs = ()
    """Globs of layers: only these are pruned."""
    exclude: Globs = ()
    """Globs of layers that stay dense."""

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, value: Any) -> Any:
        """An N:M pattern says its own sparsity; by it, a scope or another kind every layer keeps alike."""
        if not isinstance(value, dict):
            return value
        fixed = fixed_sparsity(value)
        alike = fixed is not None or value.get("scope") is not None or value.get("kind", "zeros") != "zeros"
        implied = ({} if fixed is None else {"sparsity": fixed}) | ({"allocation": "uniform"} if alike else {})
        return implied | value

    @model_validator(mode="after")
    def _check(self) -> Prune:
        pattern, criterion, allocation = pattern_of(self.pattern), self.how(), self.sharing()
        check_sparsity(pattern, self.sparsity)
        if self.scope == "model" and allocations.make(self.allocation).reads:
            raise ValueError("scope 'model' is an allocation already: leave out allocation")
        asked = [key for key in ("scope", "allocation", "phases") if getattr(self, key) not in (None, "uniform", 1)]
        if pattern.sparsity is not None and asked:
            raise ValueError(f"pattern {self.pattern!r} fixes the share of zeros in every group: leave out {asked[0]}")
        check_comparable(criterion, allocation)
        if not criterion.stays and self.phases > 1:
            raise ValueError(
                f"{criterion.name} cannot stay within the masks of an earlier phase: leave out phases, or take a "
                "criterion with a score"
            )
        if allocation.reads == "loss" and self.phases > 1:
            raise ValueError(f"{allocation.name} solves whole layers, and later phases have none: leave out phases")
        if allocation.reads == "inputs":
            self._check_targets(allocation)
        return self

    def how(self, seed: int = 0) -> Criterion:
        """The criterion; seed: of one that draws, unless the recipe gives it its own."""
        return criterion_of(criteria.make(self.criterion, seed=seed))

    def sharing(self) -> Allocation:
        """The allocation; scope model is that of one selection over all layers."""
        return allocation_of(global_ if self.scope == "model" else allocations.make(self.allocation))

    def where(self) -> Pattern:
        """The pattern, with the scope that is asked for, or that the criterion and the allocation imply."""
        own = compared(self.how(), self.sharing()) if self.scope is None else self.scope
        return pattern_of(self.pattern, "row" if own == "row" else "layer")

    def _check_targets(self, allocation: Allocation) -> None:
        """Refuse sparsities that the allocation cannot spread, before anything is measured for it."""
        for sparsity in phase_sparsities(self.sparsity, self.phases, self.ramp):
            allocation({"layer": torch.ones(1, 8)}, sparsity)


class ClassifierPrune(Prune):
    """The same with what is usual for classifiers, and what becomes of the network.

    kind: "zeros" leaves a network of the same size, sparsity being the share of zeros; "filters" removes that share of
    the filters, of each layer (allocation uniform) or of all (global); "low_rank" decomposes layers, dropping that
    share of the ranks of each (uniform) or of the weights of all (global).
    """

    criterion: CriterionName = "magnitude"
    sparsity: float = 0.9
    allocation: AllocationName = "global"
    kind: Kind = "zeros"
    """What becomes of the network: zeros, or a smaller one."""

    @model_validator(mode="after")
    def _check_kind(self) -> ClassifierPrune:
        if self.kind == "zeros":
            return self
        criterion = self.how()
        fixed = {"pattern": "unstructured", "phases": 1, "scope": None}
        fixed |= {"criterion": "magnitude"} if self.kind == "low_rank" else {}
        strange = [key for key, value in fixed.items() if getattr(self, key) != value]
        if strange:
            raise ValueError(f"kind {self.kind} makes the network smaller at once: leave out {strange[0]}")
        if self.kind == "filters" and (criterion.score is None or criterion.needs):
            raise ValueError(
                f"kind filters ranks them by the scores of their weights, and {criterion.name} "
                + ("has none" if criterion.score is None else "needs what layers receive")
                + ": take a criterion of weights alone, such as magnitude"
            )
        if self.allocation not in ("uniform", "global"):
            raise ValueError(f"kind {self.kind} knows the allocations uniform and global; got {self.allocation!r}")
        return self


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


class Augmentation(Strict):
    """crop: pixels of padding before a random crop; flip: left and right at random; cutout: side of a blank square;
    resized: in place of crop, the least share of the area of a box that is sampled to the image's size. mixup, cutmix:
    alpha of the shares in which two images, or a box of one in another, are one with both labels; 0: not done."""

    crop: Whole = 0
    flip: bool = False
    cutout: Whole = 0
    resized: Annotated[float, Field(gt=0, le=1)] | None = None
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _check(self) -> Augmentation:
        if self.crop and self.resized is not None:
            raise ValueError("crop and resized are two ways to crop: leave out one")
        return self


class Vary(Strict):
    """What differs between the members of a soup: member i takes the i-th value of each list, and then the first again.

    seed: "all" that is drawn, the "order" of the images alone, the "same" for all, or a list. Lists are in place of the
    keys of `retrain`; weight_decay and augment, of those of `train`.
    """

    seed: Literal["all", "order", "same"] | tuple[int, ...] = "all"
    lr: tuple[Positive, ...] = ()
    schedule: tuple[RetrainingName, ...] = ()
    warmup: tuple[Part, ...] = ()
    steps: tuple[Count, ...] = ()
    epochs: tuple[Positive, ...] = ()
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] = ()
    augment: tuple[Augmentation, ...] = ()

    def of(self, place: int) -> dict[str, Any]:
        """The keys that a member has a value of its own for."""
        lists = {key: values for key, values in self if isinstance(values, tuple) and values}
        return {key: values[place % len(values)] for key, values in lists.items()}


def _average(value: Any) -> Any:
    """A name, or a weight for each member."""
    if isinstance(value, (list, tuple)) and all(isinstance(x, (int, float)) and x >= 0 for x in value):
        return tuple(float(x) for x in value)
    return averages.check(value)


class Soup(Strict):
    """Several retrainings of what was pruned and their average, in each phase, and what the soup is compared with.

    average: by name (greedy and learned choose by held-out data), or a weight for each member. also: further averages
    of the last phase's members. swa: where in the last retraining stochastic weight averaging begins, as a share.
    line, plane: points along lines between two members and a side of the plane of three; 0 leaves them out.
    """

    members: Count = 3
    vary: Vary = Vary()
    average: Annotated[Choice | tuple[float, ...], BeforeValidator(_average)] = "uniform"
    also: tuple[AverageName, ...] = ()
    baselines: tuple[Baseline, ...] = ("longer",)
    swa: Part = 0.75
    line: Whole = 0
    plane: Whole = 0

    @model_validator(mode="after")
    def _check(self) -> Soup:
        if isinstance(self.average, tuple):
            if len(self.average) != self.members:
                raise ValueError(f"average: {len(self.average)} weights for {self.members} members; give one each")
            if abs(math.fsum(self.average) - 1) > 1e-6:
                raise ValueError(f"average: weights add up to 1; these to {math.fsum(self.average):g}")
        for each in (self.average, *self.also):
            if not isinstance(each, tuple) and not averages.knows(each, "held"):
                averages.make(each, [{}] * self.members, base={})  # what it refuses is refused before any work
        if self.line == 1 or self.plane == 1:
            raise ValueError("line and plane: at least 2 points, or 0 to leave it out")
        return self

    @property
    def choosing(self) -> list[str]:
        """The averages that choose by held-out data."""
        named = [each for each in (self.average, *self.also) if not isinstance(each, tuple)]
        return [averages.name(each) for each in named if averages.knows(each, "held")]


class ClassifierSoup(Soup):
    """The same, with what is usual for classifiers."""

    baselines: tuple[Baseline, ...] = get_args(Baseline)
    line: Whole = 11
    plane: Whole = 9


# Sections of language models.


class Data(Strict):
    """A text or chats: a file, a folder, "embedded", or a data set "name" or "owner/name:config"; or a mixture of them.

    messages: the column of chats; prompt, answer: the columns of pairs. Their loss is on the answers alone.
    part: the share that is used, [start, stop] in [0, 1], cut after tokenisation.
    """

    shorthands: ClassVar[tuple[str, ...]] = ("string", "array")

    source: str | None = None
    column: str = "text"
    split: str | None = None
    revision: str | None = None
    streamed: bool = False
    messages: str | None = None
    prompt: str | None = None
    answer: str | None = None
    join: str = "\n\n"
    end: bool | None = None
    head: bool = True
    part: tuple[Share, Share] = (0.0, 1.0)
    weight: Positive = 1.0
    mix: tuple[Data, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        short = "source" if isinstance(value, str) else "mix" if isinstance(value, list) else None
        return value if short is None else {short: value}

    @model_validator(mode="after")
    def _check(self) -> Data:
        if self.part[0] >= self.part[1]:
            raise ValueError(f"part [{self.part[0]}, {self.part[1]}] is empty: give [start, stop] with start < stop")
        if (self.source is None) == (not self.mix):
            raise ValueError("give a source, or a list of several, each with source and weight")
        if any(each.mix for each in self.mix):
            raise ValueError("a mixture is one of sources, not of mixtures; list all sources in one")
        if (self.prompt is None) != (self.answer is None) or (self.prompt is not None and self.messages is not None):
            raise ValueError("chats are in one column, messages, or in two, prompt and answer: give one or two")
        if self.source is not None and looks_local(self.source) and not Path(self.source).expanduser().exists():
            raise ValueError(
                f"no file {self.source!r} (seen from {os.getcwd()}); give an existing path or a data set 'owner/name'"
            )
        return self


_TRAIN, _TEST = Data(source="embedded", split="train"), Data(source="embedded", split="test")


class Calibrate(Strict):
    """Text that shows the layers their inputs: `samples` windows of `length` tokens, `batch_size` at a time."""

    data: Data = _TRAIN
    samples: Count = 128
    length: Annotated[int, Field(ge=2)] = 2048
    batch_size: Count = 8
    seed: int = 0


class Shrink(Strict):
    """What a language model is without before it is pruned, and then it is really smaller; counts, and shares of all.

    What is left of heads and neurons is fitted on the windows of `calibrate`. vocabulary: the text whose words stay.
    """

    blocks: Whole = 0
    experts: Part = 0.0
    heads: Part = 0.0
    neurons: Part = 0.0
    width: Part = 0.0
    vocabulary: Data | None = None

    @model_validator(mode="after")
    def _check(self) -> Shrink:
        if self == Shrink.model_construct():
            raise ValueError(
                "say what goes: blocks: 4, experts: 0.25, heads: 0.25, neurons: 0.25, width: 0.25, vocabulary: TEXT"
            )
        return self


def _subsets(value: Any) -> Any:
    """Subset names from a list or from one text with commas; refused as `adapt` refuses them."""
    if not isinstance(value, str | list | tuple):
        raise ValueError("give names of subsets, as in [biases, norms]")
    names = tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else tuple(value)
    subsets.check_subsets(names)
    return names


Subsets = Annotated[tuple[str, ...], BeforeValidator(_subsets)]


class Adapting(Strict):
    """Which parameters of a language model are trained by AdamW, and the adapters among them."""

    train: Subsets = ("full",)
    """What is trained: biases,norms or mask_lora or full ..."""
    steps: Count = 64
    """Optimizer steps."""
    warmup: Part = 0.1
    rank: Count = 16
    """Rank of adapters."""
    alpha: Positive = 32.0
    """Scale of adapters: their update is multiplied by alpha / rank."""
    init: Literal["kaiming", "gaussian"] = "kaiming"
    seed: int = 0
    """Seed of the order of sequences, and of adapters."""


class Reconstruct(Adapting):
    """Fit each pruned block to its dense outputs, right after it is pruned."""

    lr: Positive = 1e-4
    """Peak learning rate."""
    window: Literal["block", "half", "matrix"] = "block"
    inputs: Literal["pruned", "dense"] = "pruned"


class DenseRates(Strict):
    """What the learning rate did in the training of the dense model, as its authors say; its peak is retrain.lr."""

    steps: Count
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: Whole = 0
    end: Share = 0.1

    @model_validator(mode="after")
    def _check(self) -> DenseRates:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup: {self.warmup} steps leave none of the {self.steps}; set fewer")
        return self

    def original(self, peak: float) -> Original:
        """The learning rate of every step."""
        warmup = self.warmup
        made = {
            "constant": lambda: constant(self.steps, warmup=warmup),
            "linear": lambda: linear(self.steps, self.end, warmup=warmup),
            "cosine": lambda: cosine(self.steps, self.end, warmup=warmup),
        }[self.schedule]()
        return Original.of((peak * made(step) for step in range(self.steps)), warmup)


class LanguageDistill(Distill):
    """As `Distill`. teacher: a name, folder or file of a model with the same words; left out, the dense model.

    dtype: of the teacher, the recipe's if left out. In another one it shares no tensor with the model.
    """

    teacher: str | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the teacher; the recipe's own if left out."""


class LanguageRetrain(Adapting, Retrain):
    """Which parameters are retrained on packed text, and how."""

    lr: Positive | None = None
    """Peak learning rate; left out, 0.003, of everything 0.001."""
    train: Subsets = ("mask_lora",)
    """What is trained: biases,norms or mask_lora or full ..."""
    steps: Count = 200
    """Optimizer steps."""
    data: Data = _TRAIN
    batch_size: Count = 8
    """Sequences at a time."""
    length: Annotated[int, Field(ge=2)] = 1024
    """Tokens a sequence."""
    accumulate: Count = 1
    """Batches whose gradients make one step."""
    lrs: dict[str, Positive] = Field(default_factory=dict)
    dense: DenseRates | None = None
    clip: Positive | None = 1.0
    add_biases: bool = False
    """Give layers zero biases first."""
    checkpointing: bool | Literal["auto"] = False
    keep_effective: bool = False
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or with moments of 8 bits."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices; none of norms and biases."""
    evaluate_every: Whole = 0
    """Steps between measurements of `watch`; 0 for none."""
    watch: str | None = None
    """The text of evaluate.data that is measured meanwhile."""
    keep_best: bool = False
    """End with the weights that measured best."""
    patience: Count | None = None
    """End when so many measurements were no better."""
    keep_adapter: bool = False
    """Leave what is trained in OUT/adapter, too."""
    distill: LanguageDistill | None = None

    @model_validator(mode="after")
    def _check(self) -> LanguageRetrain:
        strange = [name for name in self.lrs if name not in self.train]
        if strange:
            raise ValueError(f"lrs names {strange[0]!r}, which is not in train={list(self.train)}: leave it out")
        if self.keep_adapter and ("full" in self.train or self.add_biases):
            what = "add_biases" if self.add_biases else "train: [full]"
            raise ValueError(f"keep_adapter: {what} changes the model that an adapter would belong on: leave out one")
        if self.dense is None and self.restarts and self.schedule != "llr":
            raise ValueError(f"schedule {self.schedule} goes by the dense training: give dense: {{steps: 100000}}")
        return self

    @model_validator(mode="after")
    def _check_watch(self) -> LanguageRetrain:
        asked = [key for key in ("watch", "keep_best", "patience") if getattr(self, key)]
        if asked and not self.evaluate_every:
            raise ValueError(f"{asked[0]}: nothing is measured meanwhile: set evaluate_every: 50, in steps")
        return self

    @property
    def peak(self) -> float:
        """The learning rate: left out, what was best of few on small models (docs/how-to/choose-parameters.md)."""
        return self.lr or (1e-3 if "full" in self.train else 3e-3)

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.accumulate * self.batch_size * self.length

    def rates(self, distance: float = 1.0) -> Multiplier:
        """The learning rate of every step, in units of its peak. distance: what pruning took away, for allr."""
        original = Original.of([self.peak]) if self.dense is None else self.dense.original(self.peak)
        return self.multiplier(original, self.steps, distance)


class LanguageTraining(LanguageRetrain):
    """How everything is trained on packed text while a method prunes."""

    train: Subsets = ("full",)
    """Everything: full."""

    @model_validator(mode="after")
    def _check_all(self) -> LanguageTraining:
        if self.train != ("full",):
            raise ValueError("a method prunes while all weights are trained: leave out train, or set it to [full]")
        if self.evaluate_every:
            raise ValueError("evaluate_every: a method's masks are not final before its end: leave it out")
        return self


def _asked(value: Any) -> Any:
    """`true` is a section with its defaults, `false` none."""
    return ({} if value else None) if isinstance(value, bool) else value


class Pace(Strict):
    """How the speed is measured: `tokens` are decoded after a prompt; each phase is repeated for so many seconds."""

    prompt: Count = 512
    tokens: Count = 32
    batch_size: Count = 1
    seconds: Positive = 2.0


_TasksForm = str | list[str] | dict[str, str | None]


def _tasks(value: Any) -> Any:
    """Tasks by name alone, in a list or in one text with commas, or with their files."""
    names = value.split(",") if isinstance(value, str) else value
    return {str(name).strip(): None for name in names} if isinstance(names, (list, tuple)) else names


class Evaluate(Strict):
    """Perplexity of each named text: joined, cut into windows without overlap, mean loss over predicted tokens."""

    data: dict[str, Data] = Field(
        default_factory=lambda: {"held-out": _TEST}, json_schema_extra={"type": ["object", "string"]}
    )
    window: Annotated[int, Field(ge=2)] | None = None
    """Tokens a window; the model's own length (at most 2048) if left out."""
    batch_size: Count = 4
    """Windows at a time."""
    tasks: Annotated[dict[str, str | None], BeforeValidator(_tasks, json_schema_input_type=_TasksForm)] = Field(
        default_factory=dict
    )
    """Tasks of lm-eval, by name or by name and file (needs the extra 'zeroshot')."""
    task_batch_size: Count | Literal["auto"] = 16
    """Requests of tasks at a time, or auto."""
    shots: Whole | None = None
    """Examples before each question; the task's own number if left out."""
    chat: bool = False
    """Ask through the tokenizer's chat template."""
    limit: Count | None = None
    """Only the first so many examples of a task."""
    speed: Annotated[Pace | None, BeforeValidator(_asked, json_schema_input_type=Pace | bool | None)] = None

    @model_validator(mode="after")
    def _check_texts(self) -> Evaluate:
        known: dict[Data, str] = {}
        for name, data in self.data.items():
            if data in known:
                raise ValueError(f"data: {known[data]!r} and {name!r} are one text; choose on one and report another")
            known[data] = name
        return self

    @model_validator(mode="after")
    def _check_tasks(self) -> Evaluate:
        missing = [path for path in self.tasks.values() if path is not None and not Path(path).expanduser().exists()]
        if missing:
            raise ValueError(f"tasks: no file {missing[0]!r} (seen from {os.getcwd()}); check the path")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        data = value.get("data") if isinstance(value, dict) else None
        if isinstance(data, str):
            return {**value, "data": {Path(data).stem: data}}
        return value


# Sections of classifiers.


class Labelled(Strict):
    """Where a classifier's examples come from, and which of them are measured on."""

    shorthands: ClassVar[tuple[str, ...]] = ("string",)

    source: str
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    measure_on: Literal["test", "validation", "both"] = "test"

    @property
    def measured(self) -> str:
        """Which of them are measured on: test or validation."""
        return "validation" if self.measure_on == "validation" else "test"

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value

    @field_validator("source")
    @classmethod
    def _there(cls, value: str) -> str:
        if looks_local(value) and not Path(value).expanduser().exists():
            raise ValueError(f"no file or folder (seen from {os.getcwd()}); give a path or the name of a data set")
        return value


class ImageSource(Labelled):
    """Where the images come from, and what is measured on.

    source: "digits", a folder or file (.parquet, .npz, .safetensors), or a Hugging Face data set.
    size: side to which pictures are brought. mean, std: of pixels / 255, by default the training images' own.
    measure_on: "validation" holds out the share `validation` of the training images, without augmentation, and never
    reads the test images; "test" trains on all training images; "both" holds out the same share for what is chosen by
    images (greedy and learned soups), and measures on the test images.
    """

    size: Count | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[Positive, ...] | None = None


class LabelledTexts(Labelled):
    """Where texts come from, and what they are for.

    source: .csv, .tsv, .jsonl or .parquet, a folder with one for each split, or a Hugging Face data set; of embeddings
    also .txt files, which are cut into sentences.
    aim: "classes" and "values" (a number each) stand in the column `label`; "embeddings" need none: those of the pruned
    encoder are held against the dense one's. text: column of the text, or of two that are read together.
    length: tokens of a text at most. measure_on: as of images; "validation" holds out a share of the training texts.
    """

    measure_on: Literal["test", "validation"] = "validation"
    aim: Aim = "classes"
    text: str | Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] = "text"
    label: str = "label"
    length: Annotated[int, Field(ge=2)] = 128

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the text."""
        return (self.text,) if isinstance(self.text, str) else self.text


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


class EncoderTraining(Training):
    """The same with what is usual for encoders of texts; by default they are left as they came."""

    epochs: Whole = 0
    batch_size: Count = 32
    lr: Positive = 5e-5
    warmup: Annotated[float, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    optimizer: OptimizerChoice | None = OptimizerChoice.model_validate("adamw")
    augment: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _check_augment(self) -> EncoderTraining:
        if self.augment != Augmentation():
            raise ValueError("augment: these are changes of images; leave it out")
        return self


class ClassifierRetrain(Retrain):
    """How the pruned network is trained again: by the optimizer of `train`, from its peak if there is no `lr`.

    epochs, share (of the dense training's) or steps: one of them. rewind: the epoch whose weights the surviving weights
    take before retraining; it must be one of train.snapshots.
    """

    schedule: RetrainingName = "allr"
    epochs: Positive | None = None
    """How long, in epochs of the training images."""
    share: Positive | None = None
    """How long, as a share of the dense training."""
    steps: Count | None = None
    rewind: Whole | None = None
    """Epoch whose weights the surviving ones take again."""
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


def _corruption(name: str) -> str:
    if name not in CORRUPTIONS:
        close = difflib.get_close_matches(name, CORRUPTIONS, n=1)
        raise ValueError("no such corruption; " + (f"did you mean {close[0]!r}?" if close else ", ".join(CORRUPTIONS)))
    return name


class Corruptions(Strict):
    """On which corruptions of the images that are measured on the final network is measured as well.

    folder: what holds them as CIFAR-10-C is published, which `scripts/corrupt_images.py` makes too. names: all of them
    if empty. images: of how many, the first ones.
    """

    folder: str
    names: tuple[Annotated[str, AfterValidator(_corruption)], ...] = ()
    severities: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field(default=(1, 2, 3, 4, 5), min_length=1)
    images: Count | None = None


# Recipes.


class Save(Strict):
    """How the model is written. packed: by its zeros, a bit a weight and the nonzeros; "zstd": compressed as well."""

    packed: bool | Literal["zstd"] = False


class Recipe(Strict):
    """What every task has; it is read as the recipe of a task, a classifier's if it has the key `images`.

    compile: the model's repeated blocks, by torch.compile. capture: training steps as a CUDA graph; "auto" on a GPU,
    where it can be done. save: whether the model is written.
    """

    model: str
    """Name, folder or file; 'embedded'; or a network such as resnet18."""
    device: Device = "auto"
    """auto, cpu, cuda or one GPU such as cuda:1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products."""
    compile: bool = False
    """Compile the model's blocks."""
    capture: Literal["auto"] | bool = "auto"
    """Record training steps as a CUDA graph."""
    prune: Prune | None = None
    retrain: Retrain | None = None
    soup: Soup | None = None
    out: str = "runs/run"
    """Run folder."""
    save: bool | Save = True
    """Whether the model is written."""

    @property
    def packed(self) -> bool | Literal["zstd"]:
        """Whether the saved model is packed."""
        return isinstance(self.save, Save) and self.save.packed

    apart: ClassVar[int] = 1  # between the seeds of the members of a soup

    @property
    def drawn(self) -> int:
        """The seed that the members of a soup differ in."""
        return 0

    @model_validator(mode="wrap")
    @classmethod
    def _of_its_task(cls, value: Any, handler: Any) -> Any:
        return _task_of(value).model_validate(value) if cls is Recipe else handler(value)

    @model_validator(mode="after")
    def _check_shared(self) -> Recipe:
        if Path(self.out).is_file():
            raise ValueError(f"out: {self.out!r} is a file; give a folder")
        return self

    def _check_members(self) -> None:
        """Refuse members of a soup that are the same."""
        seen: dict[str, int] = {}
        for place in range(self.soup.members if self.soup is not None else 0):
            text = member_of(self, place).model_dump_json(exclude={"soup"}) + str(order_of(self, place))
            if text in seen:
                raise ValueError(
                    f"soup.vary: members {seen[text] + 1} and {place + 1} would be the same; give as many values as "
                    "members, or seed: all"
                )
            seen[text] = place


def _during(value: Any) -> Any:
    """One method by name with the options that its class takes."""
    if value is None:
        return None
    choice = methods.check(value)
    return {choice: {}} if isinstance(choice, str) else choice


MethodName = Annotated[
    dict[str, dict[str, Any]] | None,
    BeforeValidator(_during, json_schema_input_type=str | dict[str, dict[str, Any] | None] | None),
]


def _trackers(value: Any) -> Any:
    names = value.split(",") if isinstance(value, str) else value
    strange = next((name for name in names if name not in TRACKERS), None) if isinstance(names, (list, tuple)) else None
    if strange is not None:
        raise ValueError(f"there is no tracker {strange!r}; there are {', '.join(TRACKERS)}")
    return names


Trackers = Annotated[tuple[str, ...], BeforeValidator(_trackers)]


class LanguageRecipe(Recipe):
    """A run of a language model: load, prune, (reconstruct), (retrain, merge, (average)), evaluate, save.

    during: a method that prunes while everything is trained as `train` says, in place of a criterion.
    model: a Hugging Face name or folder, a .gguf file, or "embedded". dtype: "auto" is the checkpoint's own.
    precision: autocast while retraining; trained parameters are float32 throughout.
    """

    model: str = "embedded"
    """Name, folder or file; 'embedded'; or a network such as resnet18."""
    trust_remote_code: bool = False
    """Run code that lies beside the model's weights."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the weights in memory and on disk."""
    log_with: Trackers = ()
    """Trackers besides metrics.jsonl: tensorboard, wandb, mlflow."""
    streaming: bool = False
    """Read blocks from the checkpoint one at a time, for models larger than memory."""
    train: LanguageTraining | None = None
    during: MethodName = None
    prune: Prune = Prune()
    calibrate: Calibrate = Calibrate()
    shrink: Shrink | None = None
    reconstruct: Reconstruct | None = None
    retrain: LanguageRetrain | None = None
    soup: Soup | None = None
    evaluate: Evaluate = Evaluate()

    apart: ClassVar[int] = 1000

    @model_validator(mode="before")
    @classmethod
    def _smaller(cls, value: Any) -> Any:
        """Of a model that becomes smaller nothing else goes unless that is said."""
        if isinstance(value, dict) and value.get("shrink") is not None and "prune" not in value:
            return {**value, "prune": {"criterion": "magnitude", "sparsity": 0.0}}
        return value

    @property
    def drawn(self) -> int:
        """That of retraining."""
        return 0 if self.retrain is None else self.retrain.seed

    @model_validator(mode="after")
    def _check(self) -> LanguageRecipe:
        if looks_local(self.model) and not Path(self.model).exists():
            raise ValueError(
                f"model: no file or folder {self.model!r} (seen from {os.getcwd()}); give a path that exists"
            )
        if self.retrain is not None and "lora" in self.retrain.train and self.prune.sparsity > 0:
            raise ValueError(
                "retrain.train: merging 'lora' would fill pruned weights; train 'mask_lora' or 'scale_lora', which "
                "keep them zero, or 'lora_prune', which drops that part"
            )
        if self.soup is not None:
            self._check_soup(self.soup)
        if self.prune.phases > 1:
            self._check_phases()
        if self.retrain is not None and self.retrain.keep_adapter and (self.soup or self.prune.phases > 1):
            raise ValueError("retrain.keep_adapter: of one retraining, not of phases or members; leave it out")
        for section in (self.train, self.retrain):
            if section is not None:
                self._check_retrain(section)
        if self.during is not None or self.train is not None:
            self._check_during()
        if self.shrink is not None and (self.streaming or self.trust_remote_code):
            strange = "streaming" if self.streaming else "trust_remote_code"
            raise ValueError(f"shrink: the smaller model is made anew, in memory: leave out {strange}")
        if self.streaming and self.retrain is not None and self.retrain.schedule == "allr":
            raise ValueError("retrain.schedule: allr compares with the dense weights: leave out streaming, or use llr")
        if self.streaming and self.prune.sharing().reads == "loss":
            raise ValueError("prune.allocation: this one tries the whole model in memory: leave out streaming")
        whole = [key for key in ("tasks", "speed") if getattr(self.evaluate, key)]
        if self.streaming and whole and self.retrain is None:
            raise ValueError(f"evaluate.{whole[0]}: the whole model must be in memory: leave out this or streaming")
        return self

    def _check_during(self) -> None:
        if self.during is None or self.train is None:
            missing = "train: {steps: 1000}" if self.train is None else "during: elsa"
            raise ValueError(f"during says what prunes, and train how long it trains: give {missing} as well")
        strange = [key for key in ("streaming", "reconstruct") if getattr(self, key)]
        own = ["phases", "allocation", "scope", *([] if self.begins_masked else ["criterion"])]
        found = [*strange, *(f"prune.{key}" for key in own if _is_set(self.prune, key))]
        if found:
            raise ValueError(f"{found[0]}: a method that prunes during training chooses itself; leave it out")
        _check_method(self.during, self.prune)

    @property
    def begins_masked(self) -> bool:
        """Whether the method of `during` begins with the masks of `prune.criterion`."""
        return self.during is not None and methods.knows(self.during, "prior")

    def method(self, prior: Masks | None = None) -> During:
        """The method of `during`, with the pattern of `prune`, the seed of `train` and masks where it takes them."""
        assert self.during is not None
        asked = self.prune
        return methods.make(
            self.during, asked.sparsity, seed=given(self.train).seed, pattern=asked.pattern, prior=prior
        )

    def _check_retrain(self, retrain: LanguageRetrain) -> None:
        texts = list(self.evaluate.data)
        if retrain.watch is not None and retrain.watch not in texts:
            raise ValueError(f"retrain.watch: evaluate.data has no text {retrain.watch!r}, only {', '.join(texts)}")
        if (retrain.keep_best or retrain.patience) and len(texts) < 2:
            raise ValueError(
                "retrain.keep_best, patience: what chooses is not what is reported: give evaluate.data a second text"
            )
        if self.capture is True and retrain.optimizer != "adamw":
            raise ValueError("capture: steps of adamw_8bit are not recorded; leave out one of the two")
        teacher = None if retrain.distill is None else retrain.distill.teacher
        if teacher is not None and looks_local(teacher) and not Path(teacher).exists():
            raise ValueError(f"retrain.distill.teacher: no file or folder {teacher!r} (seen from {os.getcwd()})")

    def phase(self, index: int) -> LanguageRecipe:
        """The recipe of one phase, from 0: its sparsity, and its share of the steps."""
        prune, retrain = self.prune, self.retrain
        prune = prune.model_copy(update={"sparsity": phase_sparsities(prune.sparsity, prune.phases, prune.ramp)[index]})
        if retrain is not None:
            retrain = retrain.model_copy(update={"steps": retrain.shared(retrain.steps, prune.phases)[index]})
        return self.model_copy(update={"prune": prune, "retrain": retrain})

    @property
    def moves(self) -> bool:
        """Whether what pruning leaves is more than the dense model under masks."""
        return bool(self.during or self.reconstruct or self.shrink) or self.prune.how().score is None

    def _check_phases(self) -> None:
        if self.retrain is None or self.retrain.add_biases:
            raise ValueError("prune.phases: each is retrained: give a section retrain, without add_biases")
        strange = [key for key in ("streaming", "reconstruct") if getattr(self, key)]
        if strange:
            raise ValueError(f"prune.phases: the whole model is retrained in each: leave out {strange[0]}")
        self.phase(0)

    def _check_soup(self, soup: Soup) -> None:
        if self.retrain is None:
            raise ValueError("soup: its members are retrained as `retrain` says; give a section retrain")
        if strange := [name for name in soup.choosing if name != "greedy"]:
            raise ValueError(f"soup: {strange[0]} averages are made of classifiers; take uniform, greedy or weights")
        if soup.choosing and len(self.evaluate.data) < 2:
            raise ValueError(
                "soup: greedy averages are chosen by the first text of evaluate.data: give a second one to report"
            )
        vary = {"vary.epochs": soup.vary.epochs, "vary.weight_decay": soup.vary.weight_decay}
        vary |= {"vary.augment": soup.vary.augment, "vary.seed": soup.vary.seed == "order"}
        asked = {**vary, "line": soup.line, "plane": soup.plane, "baselines": set(soup.baselines) - {"longer"}}
        strange = [key for key, value in asked.items() if value]
        if strange:
            raise ValueError(f"soup.{strange[0]}: this goes with soups of classifiers; leave it out")
        self._check_members()


class ClassifierRecipe(Recipe):
    """A run of a classifier: train, (during a method), prune, retrain, (average), measure; lengths are in epochs.

    images ─▶ train (dense, or during a method) ─▶ prune ─▶ retrain, `prune.phases` times ─▶ measure

    model: a name of `data.build_model`, such as resnet18, resnet20, wrn28_10, "timm:NAME", "torchvision:NAME", with
    arguments of theirs. weights: a file of pretrained ones, with which training begins.
    during: one method that prunes while training, by name, with its options; it reaches prune.sparsity.
    recalibrate: share of an epoch's augmented batches on which BatchNorm statistics are counted anew, after pruning and
    at the end of every run; 0: never.
    """

    images: ImageSource
    model: str = "resnet18"
    arguments: dict[str, Any] = Field(default_factory=dict)
    weights: str | None = None
    seed: int = 0
    """Seed of weights, order and augmentation."""
    train: Training = Training()
    during: MethodName = None
    prune: ClassifierPrune | None = None
    retrain: ClassifierRetrain | None = None
    soup: ClassifierSoup | None = None
    recalibrate: Share = 1.0
    """Share of the images that count BatchNorm anew."""
    corruptions: Corruptions | None = None
    channels_last: Literal["auto"] | bool = "auto"

    keyed: ClassVar[str] = "images"
    apart: ClassVar[int] = 15_485_863  # so that the members of one run are not those of the next seed's

    @property
    def drawn(self) -> int:
        """That of the whole run."""
        return self.seed

    @model_validator(mode="after")
    def _check(self) -> ClassifierRecipe:
        if self.packed:
            raise ValueError("save.packed is for language models; leave it out")
        if self.precision == "fp16":
            raise ValueError("precision: classifiers are trained in fp32 or bf16; leave out fp16")
        if self.prune is None and (self.during is not None or self.retrain is not None):
            raise ValueError(f"{'during' if self.during else 'retrain'} needs prune.sparsity: give a section prune")
        if self.during is not None and self.prune is not None:
            self._check_during(self.during, self.prune)
        rewind = self.retrain.rewind if self.retrain is not None else None
        if rewind is not None and rewind not in self.train.snapshots:
            raise ValueError(f"retrain.rewind: epoch {rewind} is not kept; set train.snapshots: [{rewind}]")
        if rewind is not None and self.prune is not None and self.prune.kind != "zeros":
            raise ValueError("retrain.rewind: a network that became smaller has no earlier weights; leave it out")
        if self.soup is not None:
            self._check_soup(self.soup)
        self._check_network()
        if not self.train.epochs:
            self._check_untrained()
        if self.retrain is not None and self.retrain.train != ("full",):
            self._check_subset(self.retrain)
        if self.weights is not None and not Path(self.weights).expanduser().is_file():
            raise ValueError(f"weights: no file {self.weights!r} (seen from {os.getcwd()}); check the path")
        return self

    @property
    def data(self) -> Labelled:
        """What it is trained and measured on, the section `keyed`."""
        return getattr(self, self.keyed)

    @property
    def aim(self) -> Aim:
        """What the network is to say of its inputs."""
        return "classes"

    def _check_network(self) -> None:
        check_model(self.model, self.arguments)

    def _check_untrained(self) -> None:
        """Refuse what goes by a training, where there is none."""
        if self.weights is None and config_of(self.model) is None:
            raise ValueError("train.epochs: 0 leaves the network as it came, and this one comes without weights")
        if self.during is not None or self.train.ema is not None:
            raise ValueError(f"{'during' if self.during else 'train.ema'}: nothing is trained: give train.epochs")
        if self.retrain is not None and (self.retrain.lr is None or self.retrain.share is not None):
            key = "lr" if self.retrain.share is None else "epochs (in place of share)"
            raise ValueError(f"retrain: there is no training to go by (train.epochs: 0): give retrain.{key}")

    def _check_subset(self, retrain: ClassifierRetrain) -> None:
        if self.soup is not None:
            raise ValueError("retrain.train: members of a classifier's soup are retrained whole: leave it out")
        if self.prune is not None and self.prune.kind != "zeros":
            raise ValueError("retrain.train: a network that became smaller is trained whole: leave it out")
        if not self.train.chosen.partly:
            name = type(self.train.chosen).__name__.lower()
            raise ValueError(f"retrain.train: {name} is of whole networks: take another train.optimizer, or [full]")

    def _check_during(self, during: Mapping[str, Mapping[str, Any]], prune: Prune) -> None:
        own = ("kind", "phases", "criterion", "allocation", "pattern", "scope")
        changed = [key for key in own if _is_set(prune, key)]
        if changed:
            raise ValueError(f"prune.{changed[0]}: a method that prunes during training chooses itself; leave it out")
        if self.retrain is not None and self.retrain.rewind is not None:
            raise ValueError("retrain.rewind goes with pruning after training; leave it out beside during")
        if self.retrain is not None and self.retrain.distill is not None:
            raise ValueError("retrain.distill: beside during there is no dense network to teach; leave out one")
        _check_method(during, prune)

    def _check_soup(self, soup: Soup) -> None:
        if self.prune is None:
            raise ValueError("soup needs prune.sparsity: members are copies of one pruned network")
        if self.prune.kind != "zeros":
            raise ValueError("soup: members share zeros; leave out prune.kind")
        if self.retrain is None and (self.during is None or next(iter(self.during)) not in FORKING):
            raise ValueError(
                "soup: members are retrainings: give a section retrain (without it, during: gmp or dpf fork members "
                "when their mask is final)"
            )
        if self.retrain is not None and self.retrain.rewind is not None:
            raise ValueError("retrain.rewind would throw the average of every phase away; leave it out")
        if soup.choosing and self.images.measure_on == "test":
            raise ValueError(
                f"soup: {soup.choosing[0]} averages are chosen by held-out images: set images.measure_on: both (the "
                "test images measure), or validation"
            )
        if self.retrain is None and self.train.ema is not None:
            raise ValueError(
                "train.ema: members forked within a training cannot go on with its running mean; leave it out"
            )
        vary = soup.vary
        if self.retrain is None and (vary.epochs or vary.steps or vary.schedule or vary.warmup or vary.lr):
            raise ValueError(
                "soup.vary: members forked within a training end it: leave out lr, schedule, warmup, steps and epochs"
            )
        self._check_members()


class EncoderRecipe(ClassifierRecipe):
    """The same of an encoder of texts, a folder of transformers; `texts` says on what.

    Embeddings are never trained, only distilled: retraining holds those of the pruned encoder against the dense one's.
    """

    images: None = Field(None, exclude=True)
    texts: LabelledTexts
    train: EncoderTraining = EncoderTraining()

    keyed: ClassVar[str] = "texts"

    @property
    def aim(self) -> Aim:
        """What the encoder is to say of a text."""
        return self.texts.aim

    @model_validator(mode="after")
    def _check_texts(self) -> EncoderRecipe:
        soup = "of networks that look at images" if self.soup else None
        strange = {"soup": soup, "corruptions": "of images" if self.corruptions else None}
        strange["capture"] = "batches have lengths of their own" if self.capture is True else None
        if self.prune is not None and self.prune.kind != "zeros":
            strange["prune.kind"] = "an encoder of texts becomes smaller by prunus.shrink"
        if self.aim == "embeddings" and self.train.epochs:
            strange["train.epochs"] = "embeddings have no labels to train on"
        distill = None if self.retrain is None else self.retrain.distill
        if self.aim == "embeddings" and distill is not None and distill != Distill(weight=1.0):
            strange["retrain.distill"] = "embeddings are held against the dense ones, whatever stands here"
        for key, why in strange.items():
            if why is not None:
                raise ValueError(f"{key}: {why}; leave it out")
        return self

    def _check_network(self) -> None:
        with torch.device("meta"):
            build_encoder(self.model, arguments=self.arguments)


def _is_set(section: BaseModel, key: str) -> bool:
    return getattr(section, key) != type(section).model_fields[key].default


def _check_method(during: Mapping[str, Mapping[str, Any]], prune: Prune) -> None:
    """Refuse what a method does not take, by making it; and a pattern, where it does not know any."""
    name, options = next(iter(during.items()))
    knows = methods.knows(name, "pattern")
    if _is_set(prune, "pattern") and not (knows and isinstance(prune.pattern, str)):
        raise ValueError(f"prune.pattern: {name} prunes single entries; leave it out")
    try:
        methods.make({name: dict(options)}, prune.sparsity, pattern=prune.pattern)
    except TypeError as error:
        raise ValueError(f"during.{name}: {error}") from None


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def given(section: Section | None) -> Section:
    """A section that the checks of a recipe say is there."""
    assert section is not None
    return section


def member_of(recipe: AnyRecipe, place: int | None) -> AnyRecipe:
    """The recipe of the retraining of a member of a soup; None: of a run without members, as the recipe itself says it.

    Members whose seed differs in all have seeds `recipe.apart` apart.
    """
    if place is None or recipe.soup is None:
        return recipe
    own = recipe.soup.vary.of(place)
    if recipe.soup.vary.seed == "all":
        own["seed"] = recipe.drawn + recipe.apart * place
    if own.keys() & {"epochs", "steps"}:
        own = {"epochs": None, "share": None, "steps": None} | own
    changed: dict[str, Any] = {"seed": own["seed"]} if "seed" in own and isinstance(recipe, ClassifierRecipe) else {}
    for name, keys in (("train", own.keys() & _OF_TRAIN), ("retrain", own.keys() - _OF_TRAIN)):
        section: Any = getattr(recipe, name, None)
        if section is not None:
            known = keys & type(section).model_fields.keys()
            changed[name] = section.model_copy(update={key: own[key] for key in known})
    return recipe.model_copy(update=changed)


def order_of(recipe: Recipe, place: int | None) -> int | None:
    """The seed of the images' order where that alone differs."""
    if place is None or recipe.soup is None or recipe.soup.vary.seed != "order":
        return None
    return recipe.drawn + recipe.apart * place


# Reading them.


def load_recipe(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Any:
    """The checked recipe of a YAML file, of whichever task, with dotted overrides ({"prune.sparsity": 0.6}) put on top.

    Raises ValueError that lists every wrong key with its value and mend; FileNotFoundError for a missing recipe.
    """
    raw = {} if path is None else read_yaml(path)
    return parse(merge(raw, overrides or {}), Recipe, str(path or "flags"))


def parse(raw: Mapping[str, Any], model: type[Section], where: str) -> Section:
    """The checked section `model` of a plain mapping; errors as in `load_recipe`."""
    strange = next(_not_finite(raw), None)
    if strange is not None:
        raise ValueError(f"{where}: {strange[0]} is {strange[1]}; give a finite number")
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        task = cast("type[BaseModel]", _task_of(raw) if model is Recipe else model)
        found = error.errors()  # a section is not also told that it is no boolean
        meant = [item for item in found if item["type"] != "bool_type" or not isinstance(item["input"], dict)]
        lines = _united([_line(item, task) for item in meant or found])
        raise ValueError(f"{where}: " + "\n".join(lines)) from None


def schema_of_recipes() -> dict[str, Any]:
    """The JSON schema of recipes of all tasks."""
    return TypeAdapter(LanguageRecipe | ClassifierRecipe | EncoderRecipe).json_schema() | {"title": "Recipe of Prunus"}


def _not_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Dotted keys whose values are nan or infinite, wherever they stand; but lp is a norm for p = inf."""
    if isinstance(value, float) and not math.isfinite(value) and not (key.endswith(".p") and value > 0):
        yield key or "the value", value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for item in value:
            yield from _not_finite(item, key)


def merge(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted keys set."""
    out = json.loads(json.dumps(raw))
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        here = out
        for key in path:
            if not isinstance(here.get(key), dict):
                here[key] = {}
            here = here[key]
        here[last] = value
    return out


def said(section: BaseModel, *, only: Keys | None = None, but: Keys | None = None) -> dict[str, Any]:
    """What a recipe or a section says beside its defaults, as JSON: what hashes are made of.

    A key that is added later, with a default that means what was done before, changes no hash. only, but: keys of the
    section, or nested mappings of them.
    """
    return section.model_dump(mode="json", exclude_defaults=True, include=only, exclude=but)


def digest(value: Any) -> str:
    """Hash of a JSON-like value, or of what a recipe says, independent of key order."""
    plain = said(value) if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()


def data_key(raw: Mapping[str, Any]) -> str | None:
    """The key that says what a classifier is trained on, images or texts; None of a language model's recipe."""
    return next((task.keyed for task in (ClassifierRecipe, EncoderRecipe) if task.keyed in raw), None)


def _task_of(raw: Any) -> type[Recipe]:
    tasks = {"images": ClassifierRecipe, "texts": EncoderRecipe, None: LanguageRecipe}
    return tasks[data_key(cast("Mapping[str, Any]", raw)) if isinstance(raw, Mapping) else None]


_MEMBER = re.compile(r"\.(?:bool|int|float|str|dict|list|tuple|literal|constrained|function|\[key\])(?:\W.*)?$")


def _united(lines: Sequence[str]) -> list[str]:
    """What the members of a union each say of one value, in one line."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        key, _, said = line.partition(": ")
        whole = line.startswith("unknown key")
        found.setdefault(line if whole else _MEMBER.sub("", key), {})["" if whole else said] = None
    return [": ".join(filter(None, (key, " or ".join(said)))) for key, said in found.items()]


def _line(item: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in item["loc"] if part != "value"]
    key = ".".join(path) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_hint(path, model)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {item['input']!r})" if not isinstance(item["input"], dict) else f"{key}: {message}"


def _hint(path: Sequence[str], model: type[BaseModel]) -> str:
    """What an unknown key may have been meant to be."""
    known = sorted(_fields(model, path[:-1]))
    others = {LanguageRecipe: (ClassifierRecipe, "classifiers"), ClassifierRecipe: (LanguageRecipe, "language models")}
    others[EncoderRecipe] = others[ClassifierRecipe]
    if model in others and path[-1] in _fields(others[model][0], path[:-1]):
        return f"that is a key of {others[model][1]}; known keys: {', '.join(known)}"
    close = difflib.get_close_matches(path[-1], known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"


def _fields(model: Any, path: Sequence[str]) -> list[str]:
    for part in path:
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        model = models[0] if models else model
    return list(getattr(model, "model_fields", {}))
