"""The smaller model that a recipe's `shrink` asks for: made once in a run or grid, kept as a folder, then pruned.

blocks ─▶ experts ─▶ heads ─▶ neurons ─▶ width ─▶ words        each on the calibration windows, with what is left then
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.language import stages
from prunus.language.texts import calibration_windows, evaluation_texts, ids_of
from prunus.recipe import LanguageRecipe, given
from prunus.save import is_whole, load_info, save_model
from prunus.shrink import (
    choose_blocks,
    needed_words,
    remove_blocks,
    remove_experts,
    remove_heads,
    remove_neurons,
    remove_width,
    trim_tokenizer,
    trim_vocabulary,
)

__all__ = ["shrunk", "smaller_in"]

log = logging.getLogger(__name__)


def shrunk(loaded: stages.Loaded, recipe: LanguageRecipe, device: torch.device, folder: Path) -> stages.Loaded:
    """The smaller model, with its tokenizer, from `folder`, where it is made if it is not there.

    Raises ValueError for what the model, its config or its tokenizer cannot be without.
    """
    home = next(loaded.model.parameters()).device
    if not is_whole(folder):
        _make(loaded, recipe, device, folder)
    return smaller_in(folder, recipe, home)


def smaller_in(folder: Path, recipe: LanguageRecipe, home: torch.device | None = None) -> stages.Loaded:
    """The smaller model that lies in a folder. home: where its weights live."""
    found = stages.load(recipe.model_copy(update={"model": str(folder)}), home)
    return replace(found, tokens=load_info(folder)["shrink"]["tokens"])


def _make(loaded: stages.Loaded, recipe: LanguageRecipe, device: torch.device, folder: Path) -> None:
    asked, tokenizer = given(recipe.shrink), loaded.tokenizer
    dense = sum(each.numel() for each in loaded.model.parameters())
    model, told = _narrowed(loaded.model, recipe, calibration_windows(recipe.calibrate, tokenizer), device)
    told["tokens"] = dict[str, float]()
    if asked.vocabulary is not None:
        kept = needed_words(tokenizer, ids_of(asked.vocabulary, tokenizer))
        model, small = trim_vocabulary(model, kept), trim_tokenizer(tokenizer, kept)
        told["words"] = [len(kept), len(tokenizer)]
        before, after = (evaluation_texts(recipe, model, each) for each in (tokenizer, small))
        told["tokens"] = {name: len(after[name]) / len(text) for name, text in before.items()}
        tokenizer = small
    told["parameters"] = [sum(each.numel() for each in model.parameters()), dense]
    source = loaded.folder if asked.vocabulary is None else None  # whose tokenizer would be copied
    save_model(model, tokenizer, folder, masks=None, info={"shrink": told}, source=source)
    if source is None and loaded.folder is not None:
        for path in loaded.folder.glob("LICENSE*"):
            shutil.copyfile(path, folder / path.name)


def _narrowed(model: Any, recipe: LanguageRecipe, tokens: Tensor, device: torch.device) -> tuple[Any, dict[str, Any]]:
    """The model without blocks, experts, heads, neurons and width, and what went."""
    asked, told = given(recipe.shrink), dict[str, Any]()
    how: Mapping[str, Any] = {
        "device": device,
        "batch_size": recipe.calibrate.batch_size,
        "precision": stages.precision_of(recipe, device),
    }
    if asked.blocks:
        told["blocks"] = choose_blocks(model, tokens, asked.blocks, **how)
        log.info("blocks %s go", told["blocks"])
        model = remove_blocks(model, told["blocks"])
    shares = (asked.experts, asked.heads, asked.neurons, asked.width)
    for share, remove in zip(shares, (remove_experts, remove_heads, remove_neurons, remove_width), strict=True):
        if share:
            model = remove(model, tokens, share, **how)
    return model, told
