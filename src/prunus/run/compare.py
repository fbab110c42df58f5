"""Run a grid's members: one device, one or several worker processes, resumable, nothing finished is repeated.

    out/members/KEY.json   a member's result (complete or absent)    out/pruned/KEY.safetensors   shared pruned states
    out/table.json, table.md, grid.png                               the end

Members that prune alike share the pruned model, so a grid prunes each (criterion, pattern) once.
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.report import markdown_table, plot_grid, progress
from prunus.run import stages
from prunus.run.files import write_json, write_text
from prunus.run.grid import Grid, Member, final_members, load_grid, tuning_members
from prunus.run.recipe import Recipe, digest
from prunus.run.show import spread

__all__ = ["compare", "load_grid"]

log = logging.getLogger(__name__)


def compare(grid: Grid, *, workers: int = 1) -> list[dict[str, Any]]:
    """One row a cell: labels, seeds, tuned value, mean and deviation of each perplexity; also written to `out`.

    Raises RuntimeError at the end, after every other member ran, when members failed.
    """
    out = Path(grid.out)
    (out / "members").mkdir(parents=True, exist_ok=True)
    for claim in (out / "members").glob("*.claim"):
        claim.unlink()
    _run(_prunings(grid), out, workers, "prune")
    _run(tuning_members(grid), out, workers, "tune")
    members = final_members(grid, _results(out))
    _run(members, out, workers, "run")
    rows = _rows(grid, members, _results(out))
    write_json(out / "table.json", rows)
    write_text(out / "table.md", markdown_table(_flat(rows)))
    _plot(grid, rows, out / "grid.png")
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
    todo = [member for member in members if not _path(out, member).exists()]
    todo.sort(key=lambda member: _prune_key(member.recipe))
    if not todo:
        return
    with progress(phase, len(todo)) as advance:
        if workers == 1:
            _work(todo, out, advance)
            return
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_work, args=(todo, out)) for _ in range(workers)]
        for process in processes:
            process.start()
        done = 0
        while any(process.is_alive() for process in processes):
            time.sleep(0.5)
            now = sum(_path(out, member).exists() for member in todo)
            advance(now - done)
            done = now


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
        recipe, started = member.recipe, time.perf_counter()
        device = stages.device_of(recipe)
        loaded = self._loaded(recipe, device)
        model, masks, pruning = self._pruned(loaded, recipe, device)
        result: dict[str, Any] = {
            "labels": member.labels,
            "seed": member.seed,
            "tuned": member.tuned,
            "pruning": pruning,
        }
        if recipe.retrain is not None:
            views = [view for view in find_layers(model) if view.parameter in masks]
            tokens = stages.text_tokens(recipe.retrain.data, loaded.tokenizer)
            precision = stages.precision_of(recipe, device)
            report = stages.retrain(model, masks, views, tokens, recipe.retrain, precision=precision)
            result["retraining"] = asdict(report) | {"tokens_per_second": report.tokens_per_second}
        result["sparsity"] = masks.sparsity
        result["perplexity"] = stages.evaluate(model, loaded.tokenizer, recipe, device)
        if recipe.evaluate.tasks:
            result["zero_shot"] = stages.zero_shot(model, loaded.tokenizer, recipe, device)
        return result | {"seconds": time.perf_counter() - started, "recipe": recipe.model_dump(mode="json")}

    def measure_dense(self, recipe: Recipe) -> None:
        """Write the perplexities of the unpruned model to `out/dense.json`, once for all workers."""
        if not (self.out / "dense.json").exists() and _claim(self.out, "dense"):
            device = stages.device_of(recipe)
            loaded = self._loaded(recipe, device)
            write_json(self.out / "dense.json", stages.evaluate(loaded.model, loaded.tokenizer, recipe, device))

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


def _prune_key(recipe: Recipe) -> str:
    sections = {"model", "dtype", "device", "prune", "calibrate", "reconstruct"}
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


def _results(out: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in (out / "members").glob("*.json")}


def _rows(grid: Grid, members: Sequence[Member], results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for labels in grid.cells():
        mine = [m for m in members if m.labels == labels and m.key in results]
        if not mine:
            continue
        found = [results[m.key] for m in mine]
        row: dict[str, Any] = {**labels, "seeds": [m.seed for m in mine], "tuned": mine[0].tuned}
        for text in found[0]["perplexity"]:
            values = [float(result["perplexity"][text]) for result in found]
            row[text] = {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for part in ("retraining", "zero_shot", "pruning"):
            if part in found[0]:
                row[part] = {k: v for k, v in found[0][part].items() if k not in ("losses", "merge")}
        rows.append(row)
    return rows


def _flat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The rows with one text a cell, for Markdown."""
    return [
        {key: spread(value) if isinstance(value, dict) else value for key, value in row.items() if _shown(value)}
        for row in rows
    ]


def _shown(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and "mean" in value)


def _plot(grid: Grid, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Perplexity on the last text against the first axis that looks like sparsities, a line for each other cell."""
    along = next((axis for axis, labels in grid.axes.items() if any("%" in x or ":" in x for x in labels)), None)
    texts = [key for key, value in rows[0].items() if isinstance(value, dict) and "mean" in value] if rows else []
    if along is None or not texts:
        return
    table: dict[str, dict[str, float]] = {}
    for row in rows:
        line = ", ".join(str(row[axis]) for axis in grid.axes if axis != along)
        table.setdefault(line, {})[str(row[along])] = float(row[texts[-1]]["mean"])
    dense = (
        json.loads(reference.read_text())[texts[-1]] if (reference := path.with_name("dense.json")).exists() else None
    )
    plot_grid(table, path, dense=dense, title=texts[-1])
