"""Which parameters of a language model are trained, and how: `reconstruct`, `retrain` and `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from prunus.machine import import_extra
from prunus.recipe.plain import Strict
from prunus.recipe.retraining import Distill, Retrain
from prunus.recipe.texts import TRAIN_TEXT, Data
from prunus.recipe.values import Count, Part, Positive, Seed, Share, Subsets, Whole
from prunus.train import Multiplier, Original, constant, cosine, linear

__all__ = [
    "Adapting",
    "DenseRates",
    "LanguageDistill",
    "LanguageRetrain",
    "LanguageTraining",
    "Reconstruct",
    "optimizer_of",
]


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
    seed: Seed = 0
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
    data: Data = TRAIN_TEXT
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
    """How everything, or what LoRA adds to it, is trained on packed text while a method prunes."""

    train: Subsets = ("full",)
    """Everything: full; or what LoRA adds to it: lora, beside norms or biases (elsa)."""

    @model_validator(mode="after")
    def _check_all(self) -> LanguageTraining:
        if self.train != ("full",) and "lora" not in self.train:
            raise ValueError(
                "a method prunes while all weights are trained, or LoRA on them, and masks come at the end: "
                "leave out train, or set it to [full] or [lora]"
            )
        if self.evaluate_every:
            raise ValueError("evaluate_every: a method's masks are not final before its end: leave it out")
        if self.keep_adapter:
            raise ValueError("keep_adapter: what is trained while a method prunes ends in the weights: leave it out")
        return self


def optimizer_of(name: str) -> Any:
    """The optimizer's class. Raises ImportError for one whose package is missing."""
    if name == "adamw":
        return torch.optim.AdamW
    return import_extra("bitsandbytes.optim", "eightbit", "retrain.optimizer: adamw_8bit is bitsandbytes'").AdamW8bit
