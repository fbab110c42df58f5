"""Members of a grid of compression recipes: the dense model and the pruned states that they share.

    out/pruned/KEY.safetensors   shared pruned states      out/dense.json   perplexities of the unpruned model
    out/soups/KEY/               members of a soup, until the soup is measured

Members that prune alike share the pruned model, so a grid prunes each (criterion, pattern) once.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from prunus.machine import write_json, write_tensors
from prunus.masks import Masks
from prunus.run import stages
from prunus.run.fitted import fitted
from prunus.run.grid import Member
from prunus.run.recipe import Recipe, digest
from prunus.run.soups import SOUP, blend

__all__ = ["Bench", "prune_key"]


class Bench:
    """The dense model, kept between members, and the pruned states on disk."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.dense: tuple[str, stages.Loaded] | None = None
        self.pruned: tuple[str, dict[str, Tensor], Masks, dict[str, Any]] | None = None

    def run(self, member: Member) -> dict[str, Any]:
        """A member's numbers."""
        self.measure_dense(member.recipe)
        started, device = time.perf_counter(), stages.device_of(member.recipe)
        recipe = fitted(member.recipe, device)
        loaded = self._loaded(recipe, device)
        model, masks, pruning = self._pruned(loaded, recipe, device)
        result: dict[str, Any] = {
            "labels": member.labels,
            "seed": member.seed,
            "tuned": member.tuned,
            "pruning": pruning,
        }
        if recipe.soup is not None:
            return result | self._soup(member, loaded, model, masks, recipe, device, started)
        if recipe.retrain is not None:
            views = stages.pruned_views(model, masks, recipe)
            tokens = stages.text_tokens(recipe.retrain.data, loaded.tokenizer)
            precision = stages.precision_of(recipe, device)
            report = stages.retrain(model, masks, views, tokens, recipe.retrain, precision=precision)
            result["retraining"] = asdict(report) | {"tokens_per_second": report.tokens_per_second}
            result["retraining"]["merge"] = _merge_summary(report.merge)
        result["sparsity"] = masks.sparsity
        result["perplexity"] = stages.evaluate(stages.Loaded(model, loaded.tokenizer, loaded.folder), recipe, device)
        if recipe.evaluate.tasks:
            result["zero_shot"] = stages.zero_shot(model, loaded.tokenizer, recipe, device)
        return result | {"seconds": time.perf_counter() - started, "recipe": recipe.model_dump(mode="json")}

    def _soup(
        self,
        member: Member,
        loaded: stages.Loaded,
        model: Any,
        masks: Masks,
        recipe: Recipe,
        device: torch.device,
        started: float,
    ) -> dict[str, Any]:
        """The numbers of a soup; its members are deleted when it is measured."""
        folder = self.out / "soups" / member.key
        pruned = stages.Loaded(model, loaded.tokenizer, loaded.folder)
        found = blend(pruned, masks, recipe, device, folder, folder / "soup")
        result: dict[str, Any] = {"sparsity": masks.sparsity, "perplexity": found.perplexity[SOUP]}
        result["soup"] = {**found.summary, "perplexity": found.perplexity, "retraining": found.retraining}
        if recipe.evaluate.tasks:
            result["zero_shot"] = stages.zero_shot(found.loaded.model, loaded.tokenizer, recipe, device)
        result |= {"seconds": time.perf_counter() - started, "recipe": recipe.model_dump(mode="json")}
        shutil.rmtree(folder)
        return result

    def measure_dense(self, recipe: Recipe) -> None:
        """Write the perplexities of the unpruned model to `out/dense.json`, once for all workers."""
        if not (self.out / "dense.json").exists() and _first(self.out / "members" / "dense.claim"):
            device = stages.device_of(recipe)
            loaded = self._loaded(recipe, device)
            write_json(self.out / "dense.json", stages.evaluate(loaded, recipe, device))

    def _loaded(self, recipe: Recipe, device: torch.device) -> stages.Loaded:
        key = digest({"model": recipe.model, "dtype": recipe.dtype, "device": str(device)})
        if self.dense is None or self.dense[0] != key:
            loaded = stages.load(recipe)
            loaded.model.to(device)
            self.dense = (key, loaded)
        return self.dense[1]

    def _pruned(self, loaded: stages.Loaded, recipe: Recipe, device: torch.device) -> tuple[Any, Masks, dict[str, Any]]:
        key = prune_key(recipe)
        model = copy.deepcopy(loaded.model)
        if self.pruned is None or self.pruned[0] != key:
            self.pruned = self._read(key, device) or self._solve(key, model, loaded, recipe, device)
        _, state, masks, report = self.pruned
        model.load_state_dict(state, strict=False)
        return model, masks, report

    def _solve(
        self, key: str, model: Any, loaded: stages.Loaded, recipe: Recipe, device: torch.device
    ) -> tuple[str, dict[str, Tensor], Masks, dict[str, Any]]:
        fresh = stages.Loaded(model, loaded.tokenizer, loaded.folder)
        streamed = stages.prune(fresh, recipe, device)
        parameters = dict(model.named_parameters())
        names = streamed.masks if recipe.reconstruct is None else parameters
        state = {name: parameters[name].detach().clone() for name in names}
        errors = [(r.error_before, r.error_after) for r in streamed.reports if r.error_before is not None]
        report = {"seconds": sum(r.seconds for r in streamed.reports), "errors": errors}
        if recipe.reconstruct is None:
            self._write(key, state, streamed.masks, report)
        return key, state, streamed.masks, report

    def _read(self, key: str, device: torch.device) -> tuple[str, dict[str, Tensor], Masks, dict[str, Any]] | None:
        path = self.out / "pruned" / f"{key}.safetensors"
        if not path.exists():
            return None
        report = json.loads(path.with_suffix(".json").read_text())
        return key, load_file(path, device=str(device)), Masks.load(path.with_suffix(".masks")), report

    def _write(self, key: str, state: dict[str, Tensor], masks: Masks, report: dict[str, Any]) -> None:
        path = self.out / "pruned" / f"{key}.safetensors"
        path.parent.mkdir(exist_ok=True)
        masks.save(path.with_suffix(".masks"))
        write_json(path.with_suffix(".json"), report)
        write_tensors(path, state)


def _merge_summary(merge: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest difference that merging made in any layer, and the mean share of the update that it lost."""
    found = {"largest_difference": max(merge["difference"].values(), default=0.0)}
    return found | ({"mean_lost": statistics.fmean(merge["lost"].values())} if merge["lost"] else {})


def prune_key(recipe: Recipe) -> str:
    """Hash of what decides a pruned model."""
    sections = {"model", "dtype", "device", "precision", "prune", "calibrate", "reconstruct"}
    return digest(recipe.model_dump(mode="json", include=sections))[:24]


def _first(claim: Path) -> bool:
    """Whether this process is the first to make the file."""
    try:
        os.close(os.open(claim, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
