"""`prunus merge`: a kept adapter into the model that it was trained on, without losing a zero.

    base, masks ─▶ adapter in place ─▶ merged under the mask ─▶ out     (complete or absent)

The base is the pruned model, or the dense one where pruning only zeroed weights: the adapter has the masks.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from prunus.adapt import Adaptation, read_adapter
from prunus.jobs import device_of
from prunus.language import fitted, load
from prunus.masks import Masks
from prunus.recipe import LanguageRecipe, parse
from prunus.save import MASKS_NAME, check_apart, check_new, load_info, save_model

__all__ = ["merge_adapter"]

log = logging.getLogger(__name__)


def merge_adapter(base: str, adapter: str | Path, out: str | Path, *, device: str = "auto") -> dict[str, Any]:
    """What was merged, as a row to print; the model stands in `out`.

    Raises ValueError, before anything is written, for an adapter of another model, masks that differ, and an `out` that
    holds anything but what the adapter was merged into before, or lies in what is read.

    >>> merge_adapter("facebook/opt-125m", "runs/opt/adapter", "runs/merged")  # doctest: +SKIP
    """
    out = Path(out)
    for source in (base, adapter):
        check_apart(out, source)
    check_new(out, "merged one", lambda known: known.get("adapter", {}).get("path") == str(adapter))
    stored = read_adapter(adapter)
    recipe = parse({"model": base, "device": device, "prune": {"sparsity": 0}}, LanguageRecipe, "merge")
    where = device_of(recipe)
    ready = fitted(recipe, where)
    loaded = load(ready, where)
    known = loaded.folder is not None and (loaded.folder / MASKS_NAME).is_file()
    masks = Masks.load(loaded.folder / MASKS_NAME) if known and loaded.folder is not None else stored.masks
    if masks is not None and stored.train is None:
        log.warning("%s does not say under which mask it was trained: what it adds to zeros is dropped", adapter)
    report = Adaptation.load(adapter, loaded.model, masks=masks).merge_()
    about = load_info(loaded.folder) if known and loaded.folder is not None else {"model": base}
    about = {key: about[key] for key in ("model", "pattern", "recipe") if key in about}
    if ready.dtype != recipe.dtype:
        loaded.model.to(torch.float16)  # as it is stored
    info = {**about, "adapter": {"path": str(adapter), "train": stored.train}}
    save_model(loaded.model, loaded.tokenizer, out, masks=masks, info=info, source=loaded.folder)
    return {
        "base": base,
        "adapter": str(adapter),
        "layers": len(report.difference),
        "zeros": None if masks is None else masks.sparsity,
        "difference": max(report.difference.values(), default=0.0),
    }
