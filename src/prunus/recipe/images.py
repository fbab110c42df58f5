"""Where the images of classifiers come from, how they are augmented, and how they are corrupted."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from prunus.measure import CORRUPTIONS
from prunus.recipe.plain import Strict, meant
from prunus.recipe.values import Count, Positive, Whole, check_there, looks_local

__all__ = ["Augmentation", "Corruptions", "ImageSource", "Labelled"]


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
        if looks_local(value):
            check_there(value, "give a path or the name of a data set")
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


def _corruption(name: str) -> str:
    if name not in CORRUPTIONS:
        raise ValueError(f"no such corruption; {meant(name, CORRUPTIONS) or ', '.join(CORRUPTIONS)}")
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
