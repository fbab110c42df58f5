"""The main job: load, prune, (reconstruct), (retrain, merge, (average)), evaluate, save, in one resumable run folder.

out/recipe.yaml      the resolved recipe          out/metrics.jsonl   every number, as it was measured
out/result.json      what the table shows         out/report.png      sparsity by layer, perplexity by stage
out/model/           the compressed model         out/work/           finished blocks, until the run is done
out/lm_eval.json     what lm-eval says of its tasks     out/logs/        for TensorBoard, with `log_with`
out/members/         the members of a soup        out/adapter/        what was trained, with `retrain.keep_adapter`, and
out/pruned/          the model that it belongs on, where that is more than the dense one under the masks

Launched as several processes, each computes everything alike but for training, which shares each batch; the main
process writes, and the others take its pruned blocks from the work folder.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from prunus.adapt import Adaptation
from prunus.jobs import (
    Outline,
    begin,
    check_language,
    device_name,
    device_of,
    entered,
    finished,
    outline_language,
    ran_on,
)
from prunus.language import stages
from prunus.language.shrunk import shrunk
from prunus.language.soups import Member, Pruned, as_long_as_all, averaged, member
from prunus.language.texts import check_texts, evaluation_texts, head_in_words
from prunus.machine import ranks, write_json
from prunus.masks import Masks
from prunus.recipe import LanguageRecipe, digest, given, said
from prunus.report import Log, append_once, plot_compression, progress, tracked
from prunus.save import MASKS_NAME, is_whole, load_info, save_model, save_tensors
from prunus.soup import sms
from prunus.stream import Shards, Streamed, Work

__all__ = ["compress", "planned", "prunus_info"]

log = logging.getLogger(__name__)


def compress(recipe: LanguageRecipe) -> dict[str, Any]:
    """The result of a run (the content of `out/result.json`); a finished run is read, a killed one goes on.

    Raises ValueError when `out` holds another recipe's run, the model is not there or does not take the recipe's
    lengths, or the launched processes cannot share a batch.

    >>> recipe = load_recipe(Path("recipe.yaml"), {"prune.sparsity": 0.6})  # doctest: +SKIP
    >>> compress(recipe)["perplexity"]  # doctest: +SKIP
    {'dense': {'text': 30.9}, 'pruned': {'text': 75.4}, 'retrained': {'text': 45.1}, 'merged': {'text': 45.1}}
    """
    keeps_dtype = recipe.dtype == "auto"
    recipe = stages.fitted(recipe, device_of(recipe))
    _check_shares(recipe)
    device = ranks.join(device_of(recipe))
    out, key = Path(recipe.out), digest(recipe)
    keeps = recipe.retrain is not None and recipe.retrain.keep_adapter
    left = (("model",) if recipe.save else ()) + (("adapter",) if keeps else ())
    with entered(recipe, out, key, left, "report.png") as result:
        stored = torch.float16 if keeps_dtype and recipe.dtype == "float32" else None
        if result is None:
            names = recipe.log_with if ranks.is_main() else ()
            with tracked(names, out, said(recipe)) as track:
                result = _Run(recipe, device, stored, track).execute()
        if ranks.is_main():
            _end(out, recipe, result)
    return result


def planned(recipe: LanguageRecipe) -> Outline:
    """What `compress` would do, checked as far as can be without a weight. Raises as `compress`."""
    device = device_of(recipe)
    recipe = stages.fitted(recipe, device)
    _check_shares(recipe)
    finished(recipe, Path(recipe.out), digest(recipe))
    empty = stages.empty(recipe)
    stages.check_weights(recipe, empty.model)
    _check(recipe, empty)
    texts = evaluation_texts(recipe, empty.model, empty.tokenizer)
    return outline_language(recipe, empty.model, {name: len(text) for name, text in texts.items()}, device)


def _check(recipe: LanguageRecipe, empty: stages.Loaded) -> None:
    """Raises ValueError and ImportError for a recipe that cannot be run."""
    check_language(recipe, empty.model)
    check_texts(recipe, empty.model, empty.tokenizer)


def _end(out: Path, recipe: LanguageRecipe, result: dict[str, Any]) -> None:
    """Leave the result and its picture, and no members that are not to be saved; what is there already stays."""
    if not (out / "result.json").exists():
        write_json(out / "result.json", result)
    if not (out / "report.png").exists():
        plot_compression(_drawn(result), out / "report.png")
    if not recipe.save:
        shutil.rmtree(out / "members", ignore_errors=True)


def prunus_info(recipe: LanguageRecipe, result: Mapping[str, Any]) -> dict[str, Any]:
    """What `prunus.json` says of a run beside sparsity and versions: recipe, pattern, metrics, how it was pruned."""
    metrics = {key: result[key] for key in ("perplexity", "zero_shot", "speed") if key in result}
    rest = {key: value for key, value in result.items() if key not in metrics}
    return {"recipe": recipe.model_dump(mode="json"), "pattern": recipe.prune.pattern, "metrics": metrics, **rest}


class _Run:
    """One compression under way. `stored`: dtype of the saved model, where it was computed in another one."""

    def __init__(self, recipe: LanguageRecipe, device: torch.device, stored: torch.dtype | None, track: Log) -> None:
        self.recipe, self.device, self.stored, self.track = recipe, device, stored, track
        self.out, self.key, self.home = Path(recipe.out), digest(recipe), stages.home(recipe, device)

    def execute(self) -> dict[str, Any]:
        started = time.perf_counter()
        recipe = self.recipe
        _check(recipe, stages.empty(recipe))
        with progress("load", None):
            loaded = stages.load(recipe, self.home)
        if ranks.is_main():
            begin(self.out, recipe)
        where = ran_on(self.out / "work", device_name(self.device))
        result: dict[str, Any] = {"key": self.key, "model": recipe.model, **where}
        result |= {"processes": ranks.count(), "head": head_in_words(recipe, loaded.tokenizer), "perplexity": {}}
        result["perplexity"]["dense"] = self._measured("dense", loaded)
        speed = {"dense": self._paced("dense", loaded)}
        loaded = self._shrunk(loaded, result)
        loaded, masks = self._phases(loaded, result)
        speed["now"] = self._paced("now", loaded)
        if speed["now"]:
            result["speed"] = {stage: found for stage, found in speed.items() if found}  # the dense one may be streamed
        scores = stages.zero_shot(loaded.model, loaded.tokenizer, recipe, self.device)
        if scores is not None:
            result["zero_shot"] = scores.rows
            if ranks.is_main():
                write_json(self.out / "lm_eval.json", scores.report)
        result["seconds"] = time.perf_counter() - started
        if recipe.save:
            result["saved"] = str(self.out / "model")
            self._save(loaded, masks, result)
            ranks.wait()  # the main process writes
            result["size"] = load_info(self.out / "model")["size"]
        return result

    def _shrunk(self, loaded: stages.Loaded, result: dict[str, Any]) -> stages.Loaded:
        """The model that the recipe makes smaller first; what it was measured at goes into `result`."""
        if self.recipe.shrink is None:
            return loaded
        folder = self.out / "work" / f"shrunk-{self.key[:16]}"
        with progress("shrink", None):
            found = shrunk(loaded, self.recipe, self.device, folder)
        result["shrink"] = load_info(folder)["shrink"]
        result["perplexity"]["shrunk"] = self._measured("shrunk", found)
        return found

    def _phases(self, dense: stages.Loaded, result: dict[str, Any]) -> tuple[stages.Loaded, Masks]:
        """The model after the last phase, and its masks; what was measured goes into `result`.

        What every phase but the last leaves is in the work folder, complete or absent, and a killed run goes on there.
        """
        count, soup = self.recipe.prune.phases, self.recipe.soup
        done = next((index for index in range(count - 1, 0, -1) if is_whole(self._left(index))), 0)
        start, known = (dense, None) if not done else self._read(dense, self._left(done))

        def prune(loaded: stages.Loaded, index: int, before: Pruned | None) -> Pruned:
            return self._pruned(loaded, done + index, known if before is None else before.masks, result)

        def retrain(pruned: Pruned, _: int, place: int) -> Member | None:
            if soup is not None:
                return member(pruned, place, self._members(pruned))
            return None if self.recipe.retrain is None else self._retrain(pruned, result)

        def average(pruned: Pruned, members: Sequence[Member | None]) -> stages.Loaded:
            made = [each for each in members if each is not None]
            return self._soup(pruned, made, result) if soup is not None else self._kept(pruned)

        members = 1 if soup is None else soup.members
        found = sms(start, phases=count - done, members=members, prune=prune, retrain=retrain, average=average)
        return found[-1].average, found[-1].pruned.masks

    def _pruned(self, loaded: stages.Loaded, index: int, within: Masks | None, result: dict[str, Any]) -> Pruned:
        """The model pruned for a phase, from 0."""
        recipe, last = self.recipe.phase(index), self._is_last(index)
        by_distance = recipe.retrain is not None and recipe.retrain.schedule == "allr"
        streamed, lost = stages.prune_phase(
            loaded,
            recipe,
            self.device,
            compares=by_distance,
            within=within,
            work=self._work(recipe, index),
            checkpoint=self._checkpoint("during"),
            on_block=lambda report: self._log({"stage": "prune", **asdict(report)}) if last else None,
            log=self.track,
        )
        loaded = replace(loaded, distance=lost)
        if last:
            result |= ({"distance": lost} if by_distance else {}) | {"pruning": stages.summary(streamed)}
            if recipe.streaming:
                loaded = self._assembled(loaded, streamed)
            self.track({"sparsity": result["pruning"]["sparsity"]}, None)
            result["perplexity"]["pruned"] = self._measured("pruned", loaded)
        return Pruned(loaded, streamed.masks, recipe, self.device, index, self.track)

    def _is_last(self, index: int) -> bool:
        return index + 1 == self.recipe.prune.phases

    def _left(self, phases: int) -> Path:
        """The folder of what so many phases left."""
        return self.out / "work" / "phases" / f"{self.key[:16]}-{phases}"

    def _members(self, pruned: Pruned) -> Path:
        last = self._is_last(pruned.phase)
        return self.out / "members" if last else self.out / "work" / f"members-{pruned.phase + 1}"

    def _read(self, dense: stages.Loaded, folder: Path) -> tuple[stages.Loaded, Masks]:
        """What earlier phases left, and their masks."""
        found = stages.load(self.recipe.model_copy(update={"model": str(folder)}), self.home)
        return replace(dense, model=found.model), Masks.load(folder / MASKS_NAME)

    def _kept(self, pruned: Pruned) -> stages.Loaded:
        """The model after a phase, kept if another one follows."""
        loaded = pruned.loaded
        if not self._is_last(pruned.phase):
            self._measured(f"phase {pruned.phase + 1}", loaded)
            pruned.save(self._left(pruned.phase + 1), {})
        return loaded

    def _work(self, recipe: LanguageRecipe, index: int) -> Work:
        """Where blocks wait; they depend on these sections alone, so a run may be resumed with other retraining."""
        sections = {"model", "dtype", "precision", "shrink", "prune", "calibrate", "reconstruct"}
        several = {"retrain", "soup"} if recipe.prune.phases > 1 else set[str]()
        folder = self.out / "work" / ("blocks" if self._is_last(index) else f"blocks-{index + 1}")
        return Work(folder, digest(said(recipe, only=sections | several)), writes=ranks.is_main())

    def _retrain(self, pruned: Pruned, result: dict[str, Any]) -> None:
        """Retrain and merge in place; the last phase is measured before and after merging."""
        loaded, last, perplexities = pruned.loaded, self._is_last(pruned.phase), result["perplexity"]
        name, asked = "retrain" if last else f"phase-{pruned.phase + 1}", given(pruned.recipe.retrain)
        base = self._base(pruned) if asked.keep_adapter else None

        def before_merge(adaptation: Adaptation) -> None:
            perplexities["retrained"] = self._measured("retrained", loaded)
            if base is not None and ranks.is_main():
                adaptation.save(self.out / "adapter", base=base)

        report = pruned.retrain_(name, self._checkpoint(name), before_merge if last else None)
        if last:
            perplexities["merged"] = self._measured("merged", loaded)
            found = report.numbers()
            self._log({"stage": "retrain", **found})
            result["retraining"] = {key: value for key, value in found.items() if key != "losses"}
            result["retraining"]["train"] = list(asked.train)
        loaded.model.to(self.home)

    def _base(self, pruned: Pruned) -> str:
        """Where the model is that an adapter belongs on: the dense one, or what pruning left, which is then written."""
        rounded = self.recipe.dtype != "auto" and self.stored is None
        if not self.recipe.moves and not rounded:
            return self.recipe.model
        folder = self.out / "pruned"
        if ranks.is_main() and not is_whole(folder):
            pruned.save(folder, {"model": self.recipe.model, "pattern": self.recipe.prune.pattern})
        return str(folder)

    def _soup(self, pruned: Pruned, members: Sequence[Member], result: dict[str, Any]) -> stages.Loaded:
        """The average of the members; what was measured in the last phase goes into `result`."""
        last = self._is_last(pruned.phase)
        longer = as_long_as_all(pruned, self._members(pruned)) if last else None
        folder = self.out / "work" / "soup" if last else self._left(pruned.phase + 1)
        found = averaged(pruned, members, longer, folder, last=last)
        for stage, perplexity in found.perplexity.items():
            self._log({"stage": stage if last else f"phase {pruned.phase + 1}, {stage}", "perplexity": perplexity})
        if last:
            result["perplexity"] |= found.perplexity
            result |= {"retraining": found.retraining, "soup": found.summary}
        return found.loaded

    def _measured(self, stage: str, loaded: stages.Loaded) -> dict[str, float]:
        with progress(f"evaluate {stage}", None):
            found = stages.evaluate(loaded, self.recipe, self.device)
        self._log({"stage": stage, "perplexity": found})
        self.track({f"{stage}/perplexity/{text}": value for text, value in found.items()}, None)
        if stage == "dense":
            _check_measured(found, loaded.model.dtype)
        return found

    def _paced(self, stage: str, loaded: stages.Loaded) -> dict[str, Any]:
        if self.recipe.evaluate.speed is None or loaded.source is not None:
            return {}
        with progress(f"speed {stage}", None):
            found = stages.pace(loaded.model, self.recipe, self.device)
        self._log({"stage": stage, "speed": found})
        return found

    def _assembled(self, loaded: stages.Loaded, streamed: Streamed) -> stages.Loaded:
        """The pruned model as a folder of shards, written tensor by tensor; in memory only if it is to be retrained."""
        folder = self.out / "work" / "pruned"
        source = loaded.source
        assert isinstance(source, Shards)
        if ranks.is_main() and not is_whole(folder):
            tensors, home = self._tensors(source, streamed), source.checkpoint.folder
            with progress("write", None):
                save_tensors(tensors, loaded.tokenizer, folder, masks=streamed.masks, info={}, source=home)
        ranks.wait()
        pruned = self.recipe.model_copy(update={"model": str(folder), "streaming": self.recipe.retrain is None})
        found = stages.load(pruned, stages.home(pruned, self.device))
        return stages.Loaded(found.model, found.tokenizer, source.checkpoint.folder, found.source)

    def _tensors(self, source: Shards, streamed: Streamed) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the pruned model: finished parts from the work folder, the rest from the source."""
        work, done = self._work(self.recipe, 0), set[str]()
        for report in streamed.reports:
            own = {f"{report.name}.{key}": tensor for key, tensor in work.tensors(report.name).items()}
            for name in own.keys() & streamed.masks.keys():
                own[name] = own[name].masked_fill(~streamed.masks[name], 0.0)  # -0.0 is stored as +0.0
            for name, tensor in source.stored(own).items():
                done.add(name)
                yield name, tensor
        for name, tensor in source.tensors():
            if name not in done:
                yield name, tensor

    def _save(self, loaded: stages.Loaded, masks: Masks, result: dict[str, Any]) -> None:
        if not ranks.is_main():
            return
        kept = masks if self.recipe.shrink is None or masks.sparsity else None  # of a smaller model, all is kept
        how: dict[str, Any] = {"masks": kept, "info": prunus_info(self.recipe, result), "packed": self.recipe.packed}
        with progress("save", None):
            if isinstance(loaded.source, Shards):
                found = loaded.source.tensors()
                stored = ((name, each.to(self.stored) if each.is_floating_point() else each) for name, each in found)
                source = loaded.folder or loaded.source.checkpoint.folder
                save_tensors(stored, loaded.tokenizer, self.out / "model", source=source, **how)
            else:
                loaded.model.to(self.stored)
                save_model(loaded.model, loaded.tokenizer, self.out / "model", source=loaded.folder, **how)

    def _checkpoint(self, name: str) -> Path:
        return self.out / "work" / f"{name}-{self.key[:16]}.pt"

    def _log(self, row: dict[str, Any]) -> None:
        if ranks.is_main():
            append_once(self.out / "metrics.jsonl", row)


def _check_shares(recipe: LanguageRecipe) -> None:
    asked, world = recipe.retrain, ranks.count()
    asks = {"shrink": recipe.shrink is not None, "soup": recipe.soup is not None, "during": recipe.during is not None}
    alone = [key for key, there in {**asks, "prune.phases": recipe.prune.phases > 1}.items() if there]
    if alone and world > 1:
        then = ", and retrain what it saves" if alone[0] == "shrink" else ""
        raise ValueError(f"{alone[0]}: in one process, not in {world}; start `prunus run` alone{then}")
    if asked is not None and asked.batch_size % world:
        raise ValueError(
            f"retrain.batch_size: {asked.batch_size} sequences cannot be shared by {world} processes; "
            f"use a multiple of {world}"
        )


def _check_measured(found: Mapping[str, float], dtype: torch.dtype) -> None:
    """All weights are finite; a dense model whose perplexity is not computes beyond its numbers."""
    for name, value in found.items():
        if not math.isfinite(value):
            raise ValueError(
                f"evaluate.data.{name}: the perplexity of the dense model is {value}, though its weights are finite: "
                f"numbers leave the range of {str(dtype).removeprefix('torch.')}; set dtype: float32 or bfloat16"
            )


def _drawn(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the picture shows: of a soup's members the mean and the best."""
    shown = {stage: found for stage, found in result["perplexity"].items() if not stage.startswith("member ")}
    return {**result, "perplexity": shown}
