"""Grids of language-model recipes: what members share, and the numbers of one.

    out/dense.json    perplexities of the unpruned model      out/starts/KEY/    a pruned model that members retrain
    out/soups/KEY/    a member of soups, until they are measured

Members that prune alike share the pruned model, so a grid prunes each (criterion, pattern) once; soups share members.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prunus.run import stages
from prunus.run.fitted import fitted
from prunus.run.folder import device_of
from prunus.run.language_tables import row, write
from prunus.run.layout import Show
from prunus.run.recipe import LanguageRecipe, LanguageRetrain, digest, merge, parse, said
from prunus.run.soups import LONGER, SOUP, Pruned, averaged, longer_of, member_key, members_of
from prunus.run.store import Job, Store
from prunus.run.texts import check_texts
from prunus.save import check_whole
from prunus.soup import distance

__all__ = ["LANGUAGE", "pruned_job"]

Result = Mapping[str, Any]
_DECIDES = {"model", "dtype", "device", "precision", "prune", "calibrate", "reconstruct", "train", "during"}
_read: dict[str, Any] = {}  # the dense and the pruned model that were used last, each with its key


def pruned_job(recipe: LanguageRecipe) -> Job:
    """The pruned model of the recipe's sections that decide it: the weights that changed, with their masks.

    What was fitted block by block is another one for each setting of that, and changes everything: it is not kept.
    """
    key = digest(said(recipe, only=_DECIDES))[:24]
    return Job("starts", key, partial(_prune, recipe), passing=_changes_all(recipe))


def _changes_all(recipe: LanguageRecipe) -> bool:
    return recipe.reconstruct is not None or recipe.during is not None


def _prune(recipe: LanguageRecipe, job: Job, store: Store) -> dict[str, Any]:
    device = device_of(recipe)
    within = fitted(recipe, device)
    dense = _dense(within, device)
    model = copy.deepcopy(dense.model)
    loaded = stages.Loaded(model, dense.tokenizer, dense.folder)
    if recipe.during is None:
        streamed = stages.prune(loaded, within, device)
    else:
        streamed = stages.prune_in_training(loaded, within, device, checkpoint=store.checkpoint(job))
    parameters = dict(model.named_parameters())
    names = parameters if _changes_all(recipe) else streamed.masks
    store.write_state(job, {name: parameters[name] for name in names}, streamed.masks)
    errors = [(r.error_before, r.error_after) for r in streamed.reports if r.error_before is not None]
    return {"seconds": sum(r.seconds for r in streamed.reports), "errors": errors}


def _measure_dense(recipe: LanguageRecipe, job: Job, store: Store) -> dict[str, Any]:
    device = device_of(recipe)
    return stages.evaluate(_dense(recipe, device), recipe, device)


class _Language:
    """The task of grids over `LanguageRecipe`; see `tasks.Task`."""

    threads = False
    row, write = staticmethod(row), staticmethod(write)

    def check(self, tune: Mapping[str, Any] | None, show: Show, recipes: Sequence[LanguageRecipe]) -> None:
        if tune is not None and tune["text"] is None:
            raise ValueError("tune: name the text whose perplexity chooses: text: validation")
        for recipe in recipes:
            if tune is not None:
                _check_chooses(tune["text"], recipe.evaluate.data)
        if show.columns:
            raise ValueError("show.columns is for grids of classifiers; leave it out")

    def recipe(self, raw: Mapping[str, Any], seed: int, *, tuning: bool, where: str) -> LanguageRecipe:
        raw = merge(dict(raw), {"save": False})
        if (raw.get("prune") or {}).get("phases", 1) != 1:
            raise ValueError(f"{where}: prune.phases of language models are run by `prunus run`, not by grids")
        for section in ("train", "retrain", "reconstruct"):
            if raw.get(section) is not None:
                raw = merge(raw, {f"{section}.seed": seed})
        return parse(raw, LanguageRecipe, where)

    def seeded(self, recipe: LanguageRecipe) -> bool:
        return recipe.retrain is not None or _changes_all(recipe)

    def loss(self, result: Result, text: str | None) -> float:
        return float(result["perplexity"][text])

    def needs(self, recipe: LanguageRecipe) -> tuple[Job, ...]:
        """The pruned model; of a soup its members, too."""
        return (pruned_job(recipe), *(_soup_jobs(recipe) if recipe.soup is not None else ()))

    def beside(self, recipes: Sequence[LanguageRecipe]) -> tuple[Job, ...]:
        return tuple(Job(".", "dense", partial(_measure_dense, recipe)) for recipe in recipes[:1])

    def order(self, recipe: LanguageRecipe) -> tuple[Any, ...]:
        """Members that prune alike follow each other, dearer fits come last."""
        return recipe.reconstruct is not None, pruned_job(recipe).key

    @contextmanager
    def prepared(self, recipes: Sequence[LanguageRecipe]) -> Generator[None]:
        yield
        _read.clear()

    def run(self, recipe: LanguageRecipe, job: Job, store: Store) -> dict[str, Any]:
        started = time.perf_counter()
        pruned, pruning = _pruned(recipe, store)
        recipe, loaded = pruned.recipe, pruned.loaded
        result: dict[str, Any] = {"pruning": pruning, "sparsity": pruned.masks.sparsity}
        if recipe.soup is not None:
            _, *members = job.needs
            numbers = [store.result(member) for member in members]
            each = [(store.path(m), found) for m, found in zip(members, numbers, strict=True)][: recipe.soup.members]
            for folder, _ in each:
                check_whole(folder)
            souped = averaged(
                pruned, each, numbers[-1] if longer_of(recipe) is not None else None, store.work(job) / "soup"
            )
            loaded, result["perplexity"] = souped.loaded, souped.perplexity[SOUP]
            result["soup"] = {**souped.summary, "perplexity": souped.perplexity, "retraining": souped.retraining}
        else:
            if recipe.retrain is not None:
                result["retraining"] = _retrain(pruned, store.checkpoint(job))
            result["perplexity"] = stages.evaluate(loaded, recipe, pruned.device)
        if recipe.evaluate.tasks:
            result["zero_shot"] = stages.zero_shot(loaded.model, loaded.tokenizer, recipe, pruned.device)
        return result | {"seconds": time.perf_counter() - started, "recipe": recipe.model_dump(mode="json")}


LANGUAGE = _Language()


def _check_chooses(text: str, data: Mapping[str, Any]) -> None:
    if text not in data:
        raise ValueError(f"tune.text: {text!r} is not in evaluate.data, which has {', '.join(data)}")


def _soup_jobs(recipe: LanguageRecipe) -> list[Job]:
    """The members of a soup, and the run as long as all of them, whose model is not kept."""
    each, longer = members_of(recipe), longer_of(recipe)
    jobs = [_member_job(recipe, asked, f"member {place}") for place, asked in enumerate(each, 1)]
    return jobs + ([] if longer is None else [_member_job(recipe, longer, LONGER)])


def _member_job(recipe: LanguageRecipe, asked: LanguageRetrain, name: str) -> Job:
    key = digest([member_key(recipe, asked), name == LONGER])[:24]
    return Job("soups", key, partial(_train_member, recipe, asked, name), (pruned_job(recipe),), passing=True)


def _train_member(recipe: LanguageRecipe, asked: LanguageRetrain, name: str, job: Job, store: Store) -> dict[str, Any]:
    pruned, _ = _pruned(recipe, store)
    model, found = pruned.retrained(name, asked, store.checkpoint(job))
    if name != LONGER:
        pruned.save(model, store.path(job), job.key, found)
    return found


def _retrain(pruned: Pruned, checkpoint: Path) -> dict[str, Any]:
    """What retraining a pruned model in place did."""
    found = stages.retrain(pruned.loaded, pruned.masks, pruned.recipe, pruned.device, checkpoint=checkpoint).numbers()
    return found | {"merge": _merge_summary(found["merge"])}


def _merge_summary(merge: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest difference that merging made in any layer, and the mean share of the update that it lost."""
    found = {"largest_difference": max(merge["difference"].values(), default=0.0)}
    return found | ({"mean_lost": statistics.fmean(merge["lost"].values())} if merge["lost"] else {})


def _dense(recipe: LanguageRecipe, device: torch.device) -> stages.Loaded:
    key = digest({"model": recipe.model, "dtype": recipe.dtype, "device": str(device)})
    if _read.get("dense", ("",))[0] != key:
        _read.clear()
        loaded = stages.load(recipe)
        check_texts(recipe, loaded.model, loaded.tokenizer)
        loaded.model.to(device)
        _read["dense"] = (key, loaded)
    return _read["dense"][1]


def _pruned(recipe: LanguageRecipe, store: Store) -> tuple[Pruned, dict[str, Any]]:
    """A pruned copy of the dense model, and how it was pruned."""
    job, device = pruned_job(recipe), device_of(recipe)
    within, masks = fitted(recipe, device), store.masks(job)
    assert masks is not None
    dense = _dense(within, device)
    model = copy.deepcopy(dense.model)
    model.load_state_dict(store.state(job), strict=False)
    loaded = stages.Loaded(model, dense.tokenizer, dense.folder)
    if recipe.retrain is not None and recipe.retrain.schedule == "allr":
        loaded = replace(loaded, distance=distance(dict(dense.model.named_parameters()), masks))
    return Pruned(loaded, masks, within, device), store.result(job)
