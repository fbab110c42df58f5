"""Grids of language-model recipes: what members share, and the numbers of one.

    out/dense.json    perplexities of the unpruned model      out/starts/KEY/    a pruned model that members retrain

Members that prune alike share the pruned model, so a grid prunes each (criterion, pattern) once.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from prunus.masks import Masks
from prunus.run import stages
from prunus.run.fitted import fitted
from prunus.run.folder import device_of
from prunus.run.language_tables import row, write
from prunus.run.layout import Show
from prunus.run.recipe import Recipe, digest, merge, parse, said
from prunus.run.soups import SOUP, blend
from prunus.run.store import Job, Store
from prunus.soup import distance

__all__ = ["LANGUAGE", "pruned_job"]

Result = Mapping[str, Any]
_DECIDES = {"model", "dtype", "device", "precision", "prune", "calibrate", "reconstruct"}
_read: dict[str, Any] = {}  # the dense and the pruned model that were used last, each with its key


def pruned_job(recipe: Recipe) -> Job:
    """The pruned model of the recipe's sections that decide it: the weights that changed, with their masks."""
    return Job("starts", digest(said(recipe, only=_DECIDES))[:24], partial(_prune_once, recipe))


def _prune_once(recipe: Recipe, job: Job, store: Store) -> dict[str, Any]:
    device = device_of(recipe)
    within = fitted(recipe, device)
    model, masks, report = _prune(_dense(within, device), within, device)
    parameters = dict(model.named_parameters())
    store.write_state(job, {name: parameters[name] for name in masks}, masks)
    return report


def _measure_dense(recipe: Recipe, job: Job, store: Store) -> dict[str, Any]:
    device = device_of(recipe)
    return stages.evaluate(_dense(recipe, device), recipe, device)


class _Language:
    """The task of grids over `Recipe`; see `tasks.Task`."""

    threads = False
    row, write = staticmethod(row), staticmethod(write)

    def check(self, tune: Mapping[str, Any] | None, show: Show) -> None:
        if tune is not None and tune["text"] is None:
            raise ValueError("tune: name the text whose perplexity chooses: text: validation")
        if show.columns:
            raise ValueError("show.columns is for grids of classifiers; leave it out")

    def recipe(self, raw: Mapping[str, Any], seed: int, *, tuning: bool, where: str) -> Recipe:
        raw = merge(dict(raw), {"save": False})
        if (raw.get("prune") or {}).get("phases", 1) != 1:
            raise ValueError(f"{where}: prune.phases of language models are run by `prunus run`, not by grids")
        for section in ("retrain", "reconstruct"):
            if raw.get(section) is not None:
                raw = merge(raw, {f"{section}.seed": seed})
        return parse(raw, Recipe, where)

    def seeded(self, recipe: Recipe) -> bool:
        return recipe.retrain is not None or recipe.reconstruct is not None

    def loss(self, result: Result, text: str | None) -> float:
        return float(result["perplexity"][text])

    def needs(self, recipe: Recipe) -> tuple[Job, ...]:
        """The pruned model; what is fitted block by block depends on more, and is made by the member itself."""
        return () if recipe.reconstruct is not None else (pruned_job(recipe),)

    def beside(self, recipes: Sequence[Recipe]) -> tuple[Job, ...]:
        return tuple(Job(".", "dense", partial(_measure_dense, recipe)) for recipe in recipes[:1])

    def order(self, recipe: Recipe) -> tuple[Any, ...]:
        """Members that prune alike follow each other, dearer fits come last."""
        return recipe.reconstruct is not None, pruned_job(recipe).key

    @contextmanager
    def prepared(self, recipes: Sequence[Recipe]) -> Generator[None]:
        yield
        _read.clear()

    def run(self, recipe: Recipe, job: Job, store: Store) -> dict[str, Any]:
        started, device = time.perf_counter(), device_of(recipe)
        model, masks, pruning = _pruned(recipe, store, device)
        recipe = fitted(recipe, device)
        dense = _dense(recipe, device)
        pruned = stages.Loaded(model, dense.tokenizer, dense.folder)
        if recipe.retrain is not None and recipe.retrain.schedule == "allr":
            pruned = replace(pruned, distance=distance(dict(dense.model.named_parameters()), masks))
        result: dict[str, Any] = {"pruning": pruning, "sparsity": masks.sparsity}
        if recipe.soup is not None:
            folder = store.work(job)
            found = blend(pruned, masks, recipe, device, folder, folder / "soup")
            pruned, result["perplexity"] = found.loaded, found.perplexity[SOUP]
            result["soup"] = {**found.summary, "perplexity": found.perplexity, "retraining": found.retraining}
        else:
            if recipe.retrain is not None:
                result["retraining"] = _retrain(pruned, masks, recipe, device)
            result["perplexity"] = stages.evaluate(pruned, recipe, device)
        if recipe.evaluate.tasks:
            result["zero_shot"] = stages.zero_shot(pruned.model, dense.tokenizer, recipe, device)
        return result | {"seconds": time.perf_counter() - started, "recipe": recipe.model_dump(mode="json")}


LANGUAGE = _Language()


def _retrain(pruned: stages.Loaded, masks: Masks, recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """What retraining a pruned model in place did."""
    assert recipe.retrain is not None
    report = stages.retrain(
        pruned.model,
        masks,
        stages.pruned_views(pruned.model, masks, recipe),
        stages.text_tokens(recipe.retrain.data, pruned.tokenizer),
        recipe.retrain,
        precision=stages.precision_of(recipe, device),
        distance=pruned.distance,
    )
    shown = asdict(report) | {"tokens_per_second": report.tokens_per_second}
    return shown | {"merge": _merge_summary(report.merge)}


def _merge_summary(merge: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest difference that merging made in any layer, and the mean share of the update that it lost."""
    found = {"largest_difference": max(merge["difference"].values(), default=0.0)}
    return found | ({"mean_lost": statistics.fmean(merge["lost"].values())} if merge["lost"] else {})


def _dense(recipe: Recipe, device: torch.device) -> stages.Loaded:
    key = digest({"model": recipe.model, "dtype": recipe.dtype, "device": str(device)})
    if _read.get("dense", ("",))[0] != key:
        _read.clear()
        loaded = stages.load(recipe)
        loaded.model.to(device)
        _read["dense"] = (key, loaded)
    return _read["dense"][1]


def _pruned(recipe: Recipe, store: Store, device: torch.device) -> tuple[Any, Masks, dict[str, Any]]:
    """A pruned copy of the dense model, its masks, and how it was pruned: what `Pruned` left, or done here."""
    within = fitted(recipe, device)
    dense = _dense(within, device)
    if recipe.reconstruct is not None:
        return _prune(dense, within, device)
    start, model = pruned_job(recipe), copy.deepcopy(dense.model)
    model.load_state_dict(store.state(start), strict=False)
    masks = store.masks(start)
    assert masks is not None
    return model, masks, store.result(start)


def _prune(dense: stages.Loaded, recipe: Recipe, device: torch.device) -> tuple[Any, Masks, dict[str, Any]]:
    model = copy.deepcopy(dense.model)
    streamed = stages.prune(stages.Loaded(model, dense.tokenizer, dense.folder), recipe, device)
    errors = [(r.error_before, r.error_after) for r in streamed.reports if r.error_before is not None]
    return model, streamed.masks, {"seconds": sum(r.seconds for r in streamed.reports), "errors": errors}
