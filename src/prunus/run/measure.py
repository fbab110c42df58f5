"""`prunus measure`: how fast saved language models answer, what memory they take, how large their files are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.checkpoint import download_weights, read_checkpoint
from prunus.jobs import device_name, device_of
from prunus.language import check_weights, empty, fitted, load, model_path, pace
from prunus.recipe import LanguageRecipe, merge, parse

__all__ = ["measure_models"]


def measure_models(models: Sequence[str], overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Of each model the numbers of `measure.Speed`, its dtype, bytes on disk and share of zeros; one after another.

    overrides: dotted keys of a recipe, such as `device`, `dtype` and those of `evaluate.speed`. All models are looked
    for before the first is measured. Raises ValueError for models that do not open.
    """
    raws = [merge({"model": model, "evaluate": {"speed": {}}}, overrides) for model in models]
    recipes = [parse(raw, LanguageRecipe, "flags") for raw in raws]
    for recipe in recipes:
        check_weights(recipe, empty(recipe).model)
    return [_measured(recipe) for recipe in recipes]


def _measured(recipe: LanguageRecipe) -> dict[str, Any]:
    device = device_of(recipe)
    recipe = fitted(recipe, device)
    loaded = load(recipe, device)
    total = sum(each.numel() for each in loaded.model.parameters())
    zeros = sum(int((each == 0).sum()) for each in loaded.model.parameters())
    found = {"model": recipe.model, "device": device_name(device), "dtype": str(loaded.model.dtype)[6:]}
    found |= {"file": _file_bytes(recipe.model), "parameters": total, "zeros": zeros / total}
    return found | pace(loaded.model, recipe, device)


def _file_bytes(model: str) -> int:
    """Of a .gguf file its own, not those of what it is read into."""
    path = Path(model).expanduser()
    if path.is_file():
        return path.stat().st_size
    local = path.exists() or model == "embedded"
    return read_checkpoint(model_path(model) if local else download_weights(model)).bytes
