"""How good a checkpoint on disk is, by an evaluation recipe: one number, higher is better.

A recipe with the key `images` scores classifiers by top-1 accuracy on the validation split, never the test images,
BatchNorm counted anew; any other scores language models by the perplexity (negative) on the first text of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from prunus.machine import write_tensors
from prunus.run.recipe import LanguageRecipe, merge, parse, read_yaml

__all__ = ["Scorer", "scorer"]


@dataclass(frozen=True)
class Scorer:
    """score: checkpoint (folder or file) -> how good it is. settle_: what a new average on disk still needs."""

    score: Callable[[Path], float]
    settle_: Callable[[Path], None]


def scorer(path: Path) -> Scorer:
    """The scorer that an evaluation recipe describes.

    Raises what reading the recipe raises; `score` raises ValueError for a checkpoint of another network.

    >>> scorer(Path("validation.yaml")).score(Path("runs/a/model"))
    """
    return _classifiers(path) if "images" in read_yaml(path) else _language_models(path)


def _language_models(path: Path) -> Scorer:
    from prunus.run import stages
    from prunus.run.fitted import fitted
    from prunus.run.folder import device_of

    raw = read_yaml(path)
    parse(raw, LanguageRecipe, str(path))  # mistakes show before anything is averaged

    def score(checkpoint: Path) -> float:
        recipe = parse(merge(raw, {"model": str(checkpoint)}), LanguageRecipe, str(path))
        device = device_of(recipe)
        recipe = fitted(recipe, device)
        loaded = stages.load(recipe)
        return -next(iter(stages.evaluate(loaded, recipe, device).values()))

    return Scorer(score, lambda _: None)


def _classifiers(path: Path) -> Scorer:
    from prunus.run.task import load
    from prunus.run.vision import stages
    from prunus.run.vision.setting import Setting

    images = read_yaml(path)["images"]
    source = {"images.source": images} if isinstance(images, str) else {}
    setting = Setting.of(load(path, {**source, "images.measure_on": "validation"}))
    model = setting.new_model()

    def read(checkpoint: Path) -> nn.Module:
        state = load_file(_file(checkpoint), device=str(setting.device))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{checkpoint} is no {setting.recipe.model} of {path}: {error}") from None
        if setting.recipe.recalibrate and stages.has_batchnorm(model):
            stages.recalibrate(model, setting)
        return model

    def settle(checkpoint: Path) -> None:
        file = _file(checkpoint)
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        write_tensors(file, read(checkpoint).state_dict(), metadata)

    with torch.no_grad():
        return Scorer(lambda checkpoint: float(stages.measure(read(checkpoint), setting)["top1"]), settle)


def _file(checkpoint: Path) -> Path:
    file = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    if not file.is_file():
        raise ValueError(f"{checkpoint} holds no model.safetensors: classifiers are scored from one file")
    return file
