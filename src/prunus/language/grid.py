"""Grids of language-model recipes: what members share, and the numbers of one.

    out/dense.json    what the unpruned model measures        out/starts/KEY/    a pruned model that members retrain
    out/smaller/KEY/  a smaller model, while members need it
    out/soups/KEY/    a member of soups, or what a phase leaves to the next, until they are measured

Members that prune alike share the pruned model, so a grid prunes each (criterion, pattern) once, and makes each smaller
model once; soups share members.
The loop over phases is `prunus.soup.sms` over jobs, as that of classifiers is.
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

from prunus.jobs import (
    LONGER,
    PARTS,
    SOUP,
    Job,
    Show,
    Store,
    check_language,
    device_name,
    device_of,
    perplexity_row,
    perplexity_tables,
    ran_on,
)
from prunus.language import stages
from prunus.language.shrunk import shrunk, smaller_in
from prunus.language.soups import Member, Pruned, averaged, longer_of, member_key, write_average
from prunus.language.texts import check_texts
from prunus.recipe import LanguageRecipe, LanguageRetrain, digest, given, member_of, merge, parse, said
from prunus.save import check_whole, load_info
from prunus.soup import Souped, sms

__all__ = ["LANGUAGE"]

Result = Mapping[str, Any]
_SMALLER = {"model", "dtype", "device", "precision", "calibrate", "shrink"}  # what decides the smaller model
_MEASURED = {"data", "window", "tasks", "shots", "chat", "limit"}  # by which the dense model has the same numbers
_DECIDES = _SMALLER | {"prune", "reconstruct", "train", "during"}
_read: dict[str, stages.Loaded] = {}  # the dense or smaller model that was used last, by its key

Phase = Souped[Job, Job, Job | None]


def phases_of(recipe: LanguageRecipe) -> list[Phase]:
    """What a recipe asks for as jobs, by the loop of soups."""

    def prune(state: Job | None, index: int, within: Job | None) -> Job:
        return _pruned_job(recipe.phase(index), state, within)

    def retrain(start: Job, index: int, place: int) -> Job:
        own = recipe.phase(index)
        retraining = member_of(own, place).retrain
        return start if retraining is None else _member_job(own, retraining, f"member {place + 1}", start)

    def average(start: Job, members: tuple[Job, ...]) -> Job:
        return members[0] if recipe.soup is None else _averaged_job(recipe, start, members)

    members = 1 if recipe.soup is None else recipe.soup.members
    return sms(None, phases=recipe.prune.phases, members=members, prune=prune, retrain=retrain, average=average)


def jobs_of(recipe: LanguageRecipe) -> tuple[Job, ...]:
    """Those of all phases, each once; the last one ends where it is measured: a single run is retrained there, and
    members are averaged."""
    *earlier, last = phases_of(recipe)
    jobs = [*_smaller_job(recipe)]
    jobs += [job for phase in earlier for job in (phase.pruned, *phase.members, phase.average)]
    jobs += [last.pruned, *(() if recipe.soup is None else (*last.members, *_longer_job(recipe, last)))]
    return tuple({job.key: job for job in jobs if job is not None}.values())


def _smaller_job(recipe: LanguageRecipe) -> tuple[Job, ...]:
    """The model that the recipe makes smaller first, if it does; texts count where they are cut into other words."""
    if recipe.shrink is None:
        return ()
    texts = set[str]() if recipe.shrink.vocabulary is None else {"evaluate"}
    key = digest(said(recipe, only=_SMALLER | texts))[:24]
    return (Job("smaller", key, partial(_make_smaller, recipe), passing=True),)


def _pruned_job(recipe: LanguageRecipe, before: Job | None, within: Job | None) -> Job:
    """The pruned model of the recipe's sections that decide it, as masks and the weights that changed.

    before: what left the model, None for the dense one. What was fitted block by block is another one for each setting
    of that, and later phases go by all that was before: they are not kept.
    """
    needs = (*(job for job in (before, within) if job is not None), *_smaller_job(recipe))
    key = digest([said(recipe, only=_DECIDES), *(job.key for job in needs)])[:24]
    return Job("starts", key, partial(_prune, recipe), needs, passing=_changes_all(recipe) or before is not None)


def _changes_all(recipe: LanguageRecipe) -> bool:
    return recipe.reconstruct is not None or recipe.during is not None


def _member_job(recipe: LanguageRecipe, asked: LanguageRetrain, name: str, start: Job) -> Job:
    key = digest([member_key(recipe, asked), name == LONGER, start.key])[:24]
    return Job("soups", key, partial(_train_member, recipe, asked, name), (start, *_smaller_job(recipe)), passing=True)


def _longer_job(recipe: LanguageRecipe, last: Phase) -> list[Job]:
    """The run as long as all members of the last phase, whose model is not kept."""
    own = recipe.phase(recipe.prune.phases - 1)
    longer = None if own.soup is None else longer_of(own)
    return [] if longer is None else [_member_job(own, longer, LONGER, last.pruned)]


def _averaged_job(recipe: LanguageRecipe, start: Job, members: Sequence[Job]) -> Job:
    """What a phase but the last leaves to the next."""
    key = digest(["averaged", given(recipe.soup).average, [member.key for member in members]])[:24]
    return Job("soups", key, partial(_average, recipe), (start, *members, *_smaller_job(recipe)), passing=True)


def _prune(recipe: LanguageRecipe, job: Job, store: Store) -> dict[str, Any]:
    device, within, checkpoint = device_of(recipe), None, store.checkpoint(job)
    recipe, where = stages.fitted(recipe, device), ran_on(store.work(job), device_name(device))
    loaded, earlier = _start(recipe, device, job, store), _earlier(job)
    if earlier:
        state, before = earlier
        check_whole(store.path(state))
        left = stages.load(recipe.model_copy(update={"model": str(store.path(state))}), device)
        loaded, within = replace(loaded, model=left.model), store.masks(before)
    else:
        loaded = loaded.copied()
    streamed, lost = stages.prune_phase(loaded, recipe, device, compares=True, within=within, checkpoint=checkpoint)
    parameters = dict(loaded.model.named_parameters())
    names = parameters if _changes_all(recipe) or earlier else streamed.masks
    store.write_state(job, {name: parameters[name] for name in names}, streamed.masks)
    errors = [(r.error_before, r.error_after) for r in streamed.reports if r.error_before is not None]
    return {"seconds": sum(r.seconds for r in streamed.reports), "errors": errors, "distance": lost, **where}


def _earlier(job: Job) -> list[Job]:
    """What a job goes on from, beside the smaller model."""
    return [need for need in job.needs if need.room != "smaller"]


def _make_smaller(recipe: LanguageRecipe, job: Job, store: Store) -> dict[str, Any]:
    started, device = time.perf_counter(), device_of(recipe)
    recipe, where = stages.fitted(recipe, device), ran_on(store.work(job), device_name(device))
    shrunk(_kept(recipe, device).copied(), recipe, device, store.path(job))
    return {**load_info(store.path(job))["shrink"], "seconds": time.perf_counter() - started, **where}


def _train_member(recipe: LanguageRecipe, asked: LanguageRetrain, name: str, job: Job, store: Store) -> dict[str, Any]:
    pruned = _pruned(recipe, job.needs[0], store)
    where = ran_on(store.work(job), device_name(pruned.device))
    folder = None if name == LONGER else store.path(job)
    return pruned.member(name, asked, store.checkpoint(job), folder, job.key) | where


def _average(recipe: LanguageRecipe, job: Job, store: Store) -> dict[str, Any]:
    start, *needs = _earlier(job)
    members, average = _members(needs, store), given(recipe.soup).average
    write_average(_pruned(recipe, start, store), members, average, store.path(job))
    return {}


def _members(jobs: Sequence[Job], store: Store) -> list[Member]:
    """Finished members, which are whole."""
    for job in jobs:
        check_whole(store.path(job))
    return [(store.path(job), store.result(job)) for job in jobs]


def _measure_dense(recipe: LanguageRecipe, job: Job, store: Store) -> dict[str, Any]:
    device = device_of(recipe)
    loaded = _kept(recipe, device)
    scores = stages.zero_shot(loaded.model, loaded.tokenizer, recipe, device)
    return stages.evaluate(loaded, recipe, device) | ({} if scores is None else {"zero_shot": scores.rows})


class _Language:
    """The task of grids over `LanguageRecipe`; see `tasks.Task`."""

    threads = measures = False
    row, write = staticmethod(perplexity_row), staticmethod(perplexity_tables)

    def check(self, tune: Mapping[str, Any] | None, show: Show, recipes: Sequence[LanguageRecipe]) -> None:
        if tune is not None and tune["text"] is None:
            raise ValueError("tune: name the text whose perplexity chooses: text: validation")
        for recipe in recipes:
            kept = recipe.retrain is not None and recipe.retrain.keep_adapter
            alone = {"streaming": recipe.streaming, "evaluate.speed": recipe.evaluate.speed}
            for key in (key for key, asked in {**alone, "retrain.keep_adapter": kept}.items() if asked):
                raise ValueError(f"{key} is for single runs, and a grid would not do it: leave it out")
            data = recipe.evaluate.data
            if not data:
                raise ValueError("evaluate.data: a grid compares perplexities: give it a text")
            if data.keys() != recipes[0].evaluate.data.keys():
                raise ValueError("evaluate.data: cells are compared on the same texts: name them alike in all")
            if tune is not None and tune["text"] not in data:
                raise ValueError(f"tune.text: {tune['text']!r} is not in evaluate.data, which has {', '.join(data)}")
        if show.columns:
            raise ValueError("show.columns is for grids of classifiers; leave it out")

    def columns(self, recipes: Sequence[LanguageRecipe]) -> set[str]:
        return {"beside", "tasks", *PARTS, *(text for recipe in recipes for text in recipe.evaluate.data)}

    def recipe(self, raw: Mapping[str, Any], seed: int, *, tuning: bool, where: str) -> LanguageRecipe:
        raw = merge(dict(raw), {"save": False, "log_with": []})
        for section in ("train", "retrain", "reconstruct"):
            if raw.get(section) is not None:
                raw = merge(raw, {f"{section}.seed": seed})
        return parse(raw, LanguageRecipe, where)

    def seeded(self, recipe: LanguageRecipe) -> bool:
        return recipe.retrain is not None or _changes_all(recipe)

    def loss(self, result: Result, text: str | None) -> float:
        return float(result["perplexity"][text])

    def needs(self, recipe: LanguageRecipe) -> tuple[Job, ...]:
        """The pruned models; members of soups, and what is retrained between two phases."""
        return jobs_of(recipe)

    def beside(self, recipes: Sequence[LanguageRecipe]) -> tuple[Job, ...]:
        """The dense model, if it is one and measured alike."""
        measured: dict[str, Any] = {"model": ..., "dtype": ..., "precision": ..., "evaluate": _MEASURED}
        alike = len({digest(said(recipe, only=measured)) for recipe in recipes}) == 1
        return (Job(".", "dense", partial(_measure_dense, recipes[0])),) if alike else ()

    def order(self, recipe: LanguageRecipe) -> tuple[Any, ...]:
        """As the grid says them, dearer fits last."""
        return (recipe.reconstruct is not None,)

    def look(self, recipes: Sequence[LanguageRecipe]) -> None:
        """Each checkpoint is that of its config.json, and each cell asks for what its model has."""
        blanks: dict[tuple[str, str], Any] = {}
        for recipe in {digest(_unseeded(each)): each for each in recipes}.values():
            if (recipe.model, recipe.dtype) not in blanks:
                blanks[recipe.model, recipe.dtype] = stages.empty(recipe).model
                stages.check_weights(recipe, blanks[recipe.model, recipe.dtype])
            check_language(recipe, copy.deepcopy(blanks[recipe.model, recipe.dtype]))  # which may be given biases

    @contextmanager
    def prepared(self, recipes: Sequence[LanguageRecipe]) -> Generator[None]:
        try:
            yield
        finally:  # the next call's model may lie in the same folder
            _read.clear()

    def run(self, recipe: LanguageRecipe, job: Job, store: Store) -> dict[str, Any]:
        started, last = time.perf_counter(), phases_of(recipe)[-1]
        pruned = _pruned(recipe.phase(recipe.prune.phases - 1), last.pruned, store)
        loaded, pruning = pruned.loaded, store.result(last.pruned)
        result: dict[str, Any] = {"pruning": {key: pruning[key] for key in ("seconds", "errors")}}
        result["sparsity"] = pruned.masks.sparsity
        for each in _smaller_job(recipe):
            result["shrink"] = store.result(each)
        if recipe.soup is not None:
            longer = next((store.result(job) for job in _longer_job(recipe, last)), None)
            made = _members(last.members, store)
            souped = averaged(pruned, made, longer, store.work(job) / "soup")
            loaded, result["perplexity"] = souped.loaded, souped.perplexity[SOUP]
            result["soup"] = {**souped.summary, "perplexity": souped.perplexity, "retraining": souped.retraining}
        else:
            if recipe.retrain is not None:
                told = pruned.retrain_("retrain", store.checkpoint(job)).numbers()
                result["retraining"] = told | {"merge": _merge_summary(told["merge"])}
            result["perplexity"] = stages.evaluate(loaded, pruned.recipe, pruned.device)
        scores = stages.zero_shot(loaded.model, loaded.tokenizer, pruned.recipe, pruned.device)
        result |= {} if scores is None else {"zero_shot": scores.rows}
        return result | {"seconds": time.perf_counter() - started}


LANGUAGE = _Language()


def _unseeded(recipe: LanguageRecipe) -> LanguageRecipe:
    """The recipe of all seeds."""
    sections = {key: getattr(recipe, key) for key in ("train", "retrain", "reconstruct")}
    alike = {key: each.model_copy(update={"seed": 0}) for key, each in sections.items() if each is not None}
    return recipe.model_copy(update=alike)


def _merge_summary(merge: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest difference that merging made in any layer, and the mean share of the update that it lost."""
    found = {"largest_difference": max(merge["difference"].values(), default=0.0)}
    return found | ({"mean_lost": statistics.fmean(merge["lost"].values())} if merge["lost"] else {})


def _start(recipe: LanguageRecipe, device: torch.device, job: Job, store: Store) -> stages.Loaded:
    """What a job of pruning prunes: the dense model, or the smaller one, which it needs.

    The fitted recipe would be asked in vain: another dtype or length is another key.
    """
    return _kept(recipe, device, next((store.path(need) for need in job.needs if need.room == "smaller"), None))


def _kept(recipe: LanguageRecipe, device: torch.device, smaller: Path | None = None) -> stages.Loaded:
    """The dense model, or the smaller one in a folder: what was read last, if that is it."""
    key = digest([recipe.model, recipe.dtype, str(smaller), str(device)])
    if key not in _read:
        _read.clear()
        if smaller is None:
            loaded = stages.load(recipe, device)
            check_texts(recipe, loaded.model, loaded.tokenizer)
        else:
            check_whole(smaller)
            loaded = smaller_in(smaller, recipe, device)
        _read[key] = loaded
    return _read[key]


def _pruned(recipe: LanguageRecipe, job: Job, store: Store) -> Pruned:
    """A pruned copy of the dense or smaller model. recipe: of its phase."""
    device, masks = device_of(recipe), store.masks(job)
    recipe = stages.fitted(recipe, device)
    assert masks is not None
    loaded = replace(_start(recipe, device, job, store).copied(), distance=store.result(job)["distance"])
    loaded.model.load_state_dict(store.state(job), strict=False)
    return Pruned(loaded, masks, recipe, device)
