"""Prunus: make a neural network sparse and keep it good.

The names below are the ones a script needs; each lives in a module of its own and is imported when it is first used,
so `import prunus` costs next to nothing. Everything else is reached by its module (`prunus.observe`, `prunus.lr`).

    tokens ─▶ calibration ─▶ stream(model, by_score(wanda), NM(2, 4), ...) ─▶ Masks
    adapt(model, ["mask_lora"]) ─▶ train ─▶ merge_ ─▶ perplexity ─▶ save_model
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunus.adapt import adapt
    from prunus.allocations import erk, global_, lamp, owl, uniform, uniform_plus
    from prunus.batchnorm import recalibrate_
    from prunus.biases import add_biases
    from prunus.blocks import find_blocks
    from prunus.data import PackedTokens, calibration, read_texts, tokenize
    from prunus.ema import Ema
    from prunus.evaluate.accuracy import accuracy
    from prunus.evaluate.perplexity import perplexity
    from prunus.export import load_info, save_model
    from prunus.images import Augment, ImageBatches, Images, LoaderBatches, read_images
    from prunus.layers import Inputs, Layer, View, find_layers
    from prunus.lr import Original, linear_warmup_decay
    from prunus.masks import Masks, infer_masks
    from prunus.models import build_model
    from prunus.patterns import NM, Block, Rows, Unstructured
    from prunus.prune import prune
    from prunus.reconstruct import Fit
    from prunus.relaxation import frank_wolfe
    from prunus.retrain import imp
    from prunus.run.compress import compress
    from prunus.run.inspect import inspect_model
    from prunus.run.recipe import load_recipe
    from prunus.scores import magnitude, random_score, ria, wanda
    from prunus.solvers import by_magnitude, by_score, by_wanda, sparsegpt
    from prunus.stream import stream, survey
    from prunus.train import classification_loss, next_token_loss, train

__version__ = "0.1.0"

__all__ = [
    "NM",
    "Augment",
    "Block",
    "Ema",
    "Fit",
    "ImageBatches",
    "Images",
    "Inputs",
    "Layer",
    "LoaderBatches",
    "Masks",
    "Original",
    "PackedTokens",
    "Rows",
    "Unstructured",
    "View",
    "accuracy",
    "adapt",
    "add_biases",
    "build_model",
    "by_magnitude",
    "by_score",
    "by_wanda",
    "calibration",
    "classification_loss",
    "compress",
    "erk",
    "find_blocks",
    "find_layers",
    "frank_wolfe",
    "global_",
    "imp",
    "infer_masks",
    "inspect_model",
    "lamp",
    "linear_warmup_decay",
    "load_info",
    "load_recipe",
    "magnitude",
    "next_token_loss",
    "owl",
    "perplexity",
    "prune",
    "random_score",
    "read_images",
    "read_texts",
    "recalibrate_",
    "ria",
    "save_model",
    "sparsegpt",
    "stream",
    "survey",
    "tokenize",
    "train",
    "uniform",
    "uniform_plus",
    "wanda",
]

_HOMES = {
    "adapt": ("adapt",),
    "allocations": ("erk", "global_", "lamp", "owl", "uniform", "uniform_plus"),
    "batchnorm": ("recalibrate_",),
    "biases": ("add_biases",),
    "blocks": ("find_blocks",),
    "data": ("PackedTokens", "calibration", "read_texts", "tokenize"),
    "ema": ("Ema",),
    "evaluate.accuracy": ("accuracy",),
    "evaluate.perplexity": ("perplexity",),
    "export": ("load_info", "save_model"),
    "images": ("Augment", "ImageBatches", "Images", "LoaderBatches", "read_images"),
    "layers": ("Inputs", "Layer", "View", "find_layers"),
    "lr": ("linear_warmup_decay", "Original"),
    "masks": ("Masks", "infer_masks"),
    "models": ("build_model",),
    "patterns": ("Block", "NM", "Rows", "Unstructured"),
    "prune": ("prune",),
    "reconstruct": ("Fit",),
    "relaxation": ("frank_wolfe",),
    "retrain": ("imp",),
    "run.compress": ("compress",),
    "run.inspect": ("inspect_model",),
    "run.recipe": ("load_recipe",),
    "scores": ("magnitude", "random_score", "ria", "wanda"),
    "solvers": ("by_magnitude", "by_score", "by_wanda", "sparsegpt"),
    "stream": ("stream", "survey"),
    "train": ("classification_loss", "next_token_loss", "train"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunus' has no attribute {name!r}; public names are {', '.join(__all__)}")
    value = getattr(import_module(f"prunus.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """A package in which `stream`, `adapt` and `train` are the functions, whoever imported the modules before.

    Python binds a submodule to its package when it is first imported, whatever stood under its name.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and _HOME.get(name) == name:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
