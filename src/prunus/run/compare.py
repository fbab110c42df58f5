"""Run a grid's members: one device, one or several worker processes, resumable, nothing finished is repeated.

    out/members/KEY.json   a member's result (complete or absent)    out/pruned/KEY.safetensors   shared pruned states

Members that prune alike share the pruned model, so a grid prunes each (criterion, pattern) once. What is made of the
results is in `tables`.
"""

from __future__ import annotations

import copy
import json
import logging
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunus.files import write_json
from prunus.masks import Masks
from prunus.report import progress
from prunus.run import stages
from prunus.run.fitted import fitted
from prunus.run.grid import Grid, Member, final_members, load_grid, tuning_members
from prunus.run.recipe import Recipe, digest
from prunus.run.tables import read_results, tabulate

__all__ = ["compare", "load_grid"]

log = logging.getLogger(__name__)


def compare(grid: Grid, *, workers: int = 1) -> list[dict[str, Any]]:
    """One row a cell, as `tables.tabulate` writes them to the grid's folder, after every member has run.

    workers: processes that share the members; 0 runs nothing and makes the tables of what is finished.
    Raises RuntimeError at the end, after every other member ran, when members failed.
    """
    out = Path(grid.out)
    (out / "members").mkdir(parents=True, exist_ok=True)
    for claim in (out / "members").glob("*.claim"):
        claim.unlink()
    if workers:
        _run(_prunings(grid), out, workers, "prune")
        _run(tuning_members(grid), out, workers, "tune")
        _run(final_members(grid, read_results(out)), out, workers, "run")
    rows = tabulate(grid)
    failed = sorted(path.name for path in (out / "members").glob("*.error.txt"))
    if failed:
        raise RuntimeError(f"{len(failed)} members failed; the first: {out / 'members' / failed[0]}")
    return rows


def _prunings(grid: Grid) -> list[Member]:
    """One member for each distinct pruning that others retrain, so that workers do not prune the same twice."""
    seen: dict[str, Member] = {}
    for labels in grid.cells():
        recipe = grid.recipe(labels, grid.seeds[0], {})
        if recipe.reconstruct is None:
            alone = recipe.model_copy(update={"retrain": None})
            seen.setdefault(_prune_key(alone), Member(labels, grid.seeds[0], {}, alone))
    return list(seen.values())


def _run(members: Sequence[Member], out: Path, workers: int, phase: str) -> None:
    finished = read_results(out)
    todo = [member for member in members if member.key not in finished]
    # Members that prune alike follow each other, later seeds and dearer fits come last: a killed grid is broad first.
    order = {seed: place for place, seed in enumerate(dict.fromkeys(member.seed for member in todo))}
    todo.sort(key=lambda m: (order[m.seed], m.recipe.reconstruct is not None, _prune_key(m.recipe)))
    if not todo:
        return
    with progress(phase, len(todo)) as advance:
        if workers == 1:
            _work(todo, out, advance)
            return
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work_on, args=(todo, out, place)) for place in range(workers)]
        for process in processes:
            process.start()
        done = 0
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            now = sum(_path(out, member).exists() for member in todo)
            advance(now - done)
            done = now


def _work_on(members: Sequence[Member], out: Path, place: int) -> None:
    """A worker process: the GPUs of the machine are dealt to the workers in turn."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    _work(members, out)


def _work(members: Sequence[Member], out: Path, advance: Any = None) -> None:
    """Run every member that nobody else has claimed."""
    bench: _Bench | None = None
    for member in members:
        if _path(out, member).exists() or not _claim(out, member.key):
            continue
        try:
            bench = bench or _Bench(out)
            bench.measure_dense(member.recipe)
            write_json(_path(out, member), bench.run(member))
        except Exception:  # a member that fails must not take the others with it; compare() raises at the end
            log.exception("member %s failed", member.labels)
            (out / "members" / f"{member.key}.error.txt").write_text(f"{member}\n{traceback.format_exc()}")
        else:
            (out / "members" / f"{member.key}.error.txt").unlink(missing_ok=True)
        if advance is not None:
            advance(1)


class _Bench:
    """The dense model, kept between members, and the pruned states on disk."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.dense: tuple[str, stages.Loaded] | None = None
        self.pruned: tuple[str, dict[str, Tensor], Masks, dict[str, Any]] | None = None

    def run(self, member: Member) -> dict[str, Any]:
        """A member's numbers."""
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

    def measure_dense(self, recipe: Recipe) -> None:
        """Write the perplexities of the unpruned model to `out/dense.json`, once for all workers."""
        if not (self.out / "dense.json").exists() and _claim(self.out, "dense"):
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
        key = _prune_key(recipe)
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
        partial = path.with_suffix(f".partial{os.getpid()}")
        save_file({name: value.contiguous() for name, value in state.items()}, partial)
        os.replace(partial, path)


def _merge_summary(merge: dict[str, dict[str, float]]) -> dict[str, float]:
    """The largest difference that merging made in any layer, and the mean share of the update that it lost."""
    found = {"largest_difference": max(merge["difference"].values(), default=0.0)}
    return found | ({"mean_lost": statistics.fmean(merge["lost"].values())} if merge["lost"] else {})


def _prune_key(recipe: Recipe) -> str:
    sections = {"model", "dtype", "device", "precision", "prune", "calibrate", "reconstruct"}
    return digest(recipe.model_dump(mode="json", include=sections))[:24]


def _path(out: Path, member: Member) -> Path:
    return out / "members" / f"{member.key}.json"


def _claim(out: Path, name: str) -> bool:
    """Whether this process is the first to take the member of that name."""
    try:
        os.close(os.open(out / "members" / f"{name}.claim", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True
