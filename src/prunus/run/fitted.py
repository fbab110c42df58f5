"""What a recipe leaves open, fitted to its model and device; what it says about them, checked."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint import hub_folder, plain, read_config, weight_files
from prunus.data import ASSETS
from prunus.run.recipe import LanguageRecipe

__all__ = ["fitted", "home", "model_path"]

log = logging.getLogger(__name__)

_RESIDENT = 0.75  # largest share of a GPU's free memory that weights take which stay there
_RESIDENT_GRAM = 0.4  # criteria that read Gram matrices need several matrices of (in, in) beside them


def fitted(recipe: LanguageRecipe, device: torch.device) -> LanguageRecipe:
    """The recipe with the lengths it does not set cut to what its model takes, and the dtype chosen for `device`.

    Raises ValueError for a model that is not there, and for a length or window that the model does not take.
    """
    config = read_config(model_path(recipe.model), trust_remote_code=recipe.trust_remote_code)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    changes: dict[str, Any] = {}
    for section in ("calibrate", "train", "retrain"):
        asked: Any = getattr(recipe, section)
        if asked is None:
            continue
        if "length" in asked.model_fields_set:
            _check(f"{section}.length", asked.length, limit, recipe.model)
        changes[section] = asked.model_copy(update={"length": min(asked.length, limit)})
    window = recipe.evaluate.window
    if window is not None:
        _check("evaluate.window", window, limit, recipe.model)
    if recipe.dtype == "auto" and device.type == "cpu" and getattr(config, "dtype", None) == torch.float16:
        log.warning("float16 products are slow on a CPU: computing in float32; the model is saved in float16")
        changes["dtype"] = "float32"
    return recipe.model_copy(update=changes)


def home(recipe: LanguageRecipe, device: torch.device) -> torch.device:
    """Where the weights live from the first stage to the last: on the GPU if they leave room there, else on the CPU.

    Weights on the CPU travel to the device block by block while pruning, and as a whole for the other stages.
    """
    if device.type != "cuda" or recipe.streaming:
        return torch.device("cpu")
    path = model_path(recipe.model)
    files = weight_files(path) if path.is_dir() else []
    if not files:
        return torch.device("cpu")
    size = sum(path.stat().st_size for path in files) * (2 if recipe.dtype == "float32" else 1)
    free = torch.cuda.mem_get_info(device)[0]
    share = _RESIDENT_GRAM if recipe.prune.how().needs == "gram" else _RESIDENT
    return device if size <= free * share else torch.device("cpu")


def model_path(model: str) -> Path:
    """The folder of a recipe's model: a .gguf file's is dequantised, a hub name's downloaded without weights."""
    path = ASSETS if model == "embedded" else Path(model).expanduser()
    return plain(path) if path.exists() else hub_folder(model)


def _check(key: str, value: int, limit: int, model: str) -> None:
    if value > limit:
        raise ValueError(f"{key}: {value} tokens, but {model!r} was made for at most {limit}; set {key} to {limit}")
