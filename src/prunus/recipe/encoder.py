"""The recipe of an encoder of texts: its sections `texts` and `train`, and what it has not of those of images."""

# A task's section may be narrower than that of all, because sections are frozen, which pyright does not see:
# pyright: reportIncompatibleVariableOverride=false

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from prunus.data import Aim, build_encoder, pooling_of
from prunus.recipe.classifier import ClassifierRecipe
from prunus.recipe.images import Augmentation, Labelled
from prunus.recipe.retraining import Distill
from prunus.recipe.soups import Soup
from prunus.recipe.training import OptimizerChoice, Training
from prunus.recipe.values import Count, Positive, Whole

__all__ = ["EncoderRecipe", "EncoderTraining", "LabelledTexts"]


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
        strange = {"corruptions": "of images" if self.corruptions else None}
        strange["capture"] = "batches have lengths of their own" if self.capture is True else None
        if self.prune is not None and self.prune.kind != "zeros":
            strange["prune.kind"] = "an encoder of texts becomes smaller by prunus.shrink"
        if self.aim != "classes" and self.train.label_smoothing:
            strange["train.label_smoothing"] = "of classes"
        if self.aim == "embeddings" and self.train.epochs:
            strange["train.epochs"] = "embeddings have no labels to train on"
        distill = None if self.retrain is None else self.retrain.distill
        if self.aim == "embeddings" and distill is not None and distill != Distill(weight=1.0):
            strange["retrain.distill"] = "embeddings are held against the dense ones, whatever stands here"
        for key, why in strange.items():
            if why is not None:
                raise ValueError(f"{key}: {why}; leave it out")
        return self

    def _check_soup(self, soup: Soup) -> None:
        raise ValueError("soup: of networks that look at images; leave it out (in Python prunus.sms takes any model)")

    def _check_network(self) -> None:
        with torch.device("meta"):
            build_encoder(self.model, arguments=self.arguments)
        if self.aim == "embeddings":
            pooling_of(self.model)
