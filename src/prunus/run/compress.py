"""The main job: load, prune, (reconstruct), (retrain, merge, (average)), evaluate, save, in one resumable run folder.

out/recipe.yaml      the resolved recipe          out/metrics.jsonl   every number, as it was measured
out/result.json      what the table shows         out/report.png      sparsity by layer, perplexity by stage
out/model/           the compressed model         out/work/           finished blocks, until the run is done
out/members/         the members of a soup

Launched as several processes, each computes everything alike but for training, which shares each batch; the main
process writes, and the others take its pruned blocks from the work folder.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from prunus.machine import ranks, write_json
from prunus.masks import Masks
from prunus.report import Advance, append_once, plot_compression, progress
from prunus.run import stages
from prunus.run.fitted import fitted, home
from prunus.run.folder import begin, device_name, device_of, finished, held, ran_on
from prunus.run.plan import Outline, check_language, outline_language
from prunus.run.recipe import Recipe, digest, said
from prunus.run.soups import Pruned, blend
from prunus.run.texts import check_texts, evaluation_texts, head_in_words, training_windows
from prunus.save import save_model, save_tensors
from prunus.soup import distance, phase_sparsities
from prunus.stream import BlockReport, Shards, Streamed, Work

__all__ = ["compress", "planned", "prunus_info"]

log = logging.getLogger(__name__)


def compress(recipe: Recipe) -> dict[str, Any]:
    """The result of a run (the content of `out/result.json`); a finished run is read, a killed one goes on.

    Raises ValueError when `out` holds another recipe's run, the model is not there or does not take the recipe's
    lengths, or the launched processes cannot share a batch.
    """
    keeps_dtype = recipe.dtype == "auto"
    recipe = fitted(recipe, device_of(recipe))
    _check_shares(recipe)
    device = ranks.join(device_of(recipe))
    out, key = Path(recipe.out), digest(recipe)
    left = ("model",) if recipe.save else ()
    found = finished(recipe, out, key, left)
    ranks.wait()  # nothing is written before every process has looked
    if found is not None:
        log.warning("%s is finished: nothing is repeated", out)
        if (out / "report.png").exists() and not (out / "work").exists():
            return found
    with held(out):
        found = finished(recipe, out, key, left)  # who had it until now may have ended it
        stored = torch.float16 if keeps_dtype and recipe.dtype == "float32" else None
        result = _Run(out, recipe, key, device, stored).execute() if found is None else found
        ranks.wait()
        if ranks.is_main():
            _end(out, recipe, result)
        ranks.wait()
    return result


def planned(recipe: Recipe) -> Outline:
    """What `compress` would do, checked as far as can be without a weight. Raises as `compress`."""
    device = device_of(recipe)
    recipe = fitted(recipe, device)
    _check_shares(recipe)
    finished(recipe, Path(recipe.out), digest(recipe))
    stages.check_weights(recipe, stages.empty(recipe).model)
    empty = _checked(recipe)
    texts = evaluation_texts(recipe, empty.model, empty.tokenizer)
    return outline_language(recipe, empty.model, {name: len(text) for name, text in texts.items()}, device)


def _checked(recipe: Recipe) -> stages.Loaded:
    """The empty model of a recipe that can be run. Raises ValueError and ImportError for one that cannot."""
    empty = stages.empty(recipe)
    check_language(recipe, empty.model)
    check_texts(recipe, empty.model, empty.tokenizer)
    return empty


def _end(out: Path, recipe: Recipe, result: dict[str, Any]) -> None:
    """Leave the result, its picture, and nothing that only a killed run needs; what is there already stays."""
    if not (out / "result.json").exists():
        write_json(out / "result.json", result)
    if not (out / "report.png").exists():
        plot_compression(_drawn(result), out / "report.png")
    if not recipe.save:
        shutil.rmtree(out / "members", ignore_errors=True)
    shutil.rmtree(out / "work", ignore_errors=True)


def prunus_info(recipe: Recipe, result: Mapping[str, Any]) -> dict[str, Any]:
    """What `prunus.json` says of a run beside sparsity and versions: recipe, pattern, metrics, how it was pruned."""
    metrics = {key: result[key] for key in ("perplexity", "zero_shot") if key in result}
    rest = {key: value for key, value in result.items() if key not in metrics}
    return {"recipe": recipe.model_dump(mode="json"), "pattern": recipe.prune.pattern, "metrics": metrics, **rest}


class _Run:
    """One compression under way. `stored`: dtype of the saved model, where it was computed in another one."""

    def __init__(
        self, out: Path, recipe: Recipe, key: str, device: torch.device, stored: torch.dtype | None = None
    ) -> None:
        self.out, self.recipe, self.key, self.device, self.stored = out, recipe, key, device, stored
        self.home = home(recipe, device)

    def execute(self) -> dict[str, Any]:
        started = time.perf_counter()
        recipe = self.recipe
        _checked(recipe)
        with self._bar("load", None):
            loaded = stages.load(recipe, self.home)
        if ranks.is_main():
            begin(self.out, recipe)
        result: dict[str, Any] = {"key": self.key, "model": recipe.model, **ran_on(self.out, device_name(self.device))}
        result |= {"processes": ranks.count(), "head": head_in_words(loaded.tokenizer), "perplexity": {}}
        result["perplexity"]["dense"] = self._measured("dense", loaded)
        loaded, within = self._phases(loaded)
        before = stages.weights_to_compare(loaded, recipe)
        streamed = self._prune(loaded, within)
        if before:
            loaded = replace(loaded, distance=distance(before, streamed.masks, within))
            result["distance"] = loaded.distance
            before.clear()
        result["pruning"] = stages.summary(streamed)
        if recipe.streaming:
            loaded = self._assembled(loaded, streamed)
        result["perplexity"]["pruned"] = self._measured("pruned", loaded)
        if recipe.soup is not None:
            loaded = self._soup(loaded, streamed.masks, result)
        elif recipe.retrain is not None:
            result["retraining"] = self._retrain(loaded, streamed.masks, result["perplexity"])
        if recipe.evaluate.tasks:
            result["zero_shot"] = stages.zero_shot(loaded.model, loaded.tokenizer, recipe, self.device)
        result["seconds"] = time.perf_counter() - started
        if recipe.save:
            result["saved"] = str(self.out / "model")
            self._save(loaded, streamed.masks, result)
        return result

    def _phases(self, loaded: stages.Loaded) -> tuple[stages.Loaded, Masks | None]:
        """The model after all phases but the last, and its masks; a killed run does them again, to the same bits."""
        asked, retrain, within = self.recipe.prune, self.recipe.retrain, None
        for place, sparsity in enumerate(phase_sparsities(asked.sparsity, asked.phases)[:-1], 1):
            recipe = self.recipe.model_copy(update={"prune": asked.model_copy(update={"sparsity": sparsity})})
            before = stages.weights_to_compare(loaded, recipe)
            assert retrain is not None
            masks = stages.prune(loaded, recipe, self.device, within=within).masks
            lost = distance(before, masks, within) if before else 1.0
            with self._bar(f"retrain {place}/{asked.phases}", retrain.steps) as advance:
                stages.retrain(
                    loaded.model.to(self.device),
                    masks,
                    stages.pruned_views(loaded.model, masks, recipe),
                    training_windows(retrain, loaded.tokenizer),
                    retrain,
                    precision=stages.precision_of(recipe, self.device),
                    checkpoint=self._checkpoint(f"phase-{place}"),
                    on_step=lambda done, _loss, advance=advance: advance.to(done),
                    distance=lost,
                )
            loaded.model.to(self.home)
            self._measured(f"phase {place}", loaded)
            within = masks
        return loaded, within

    def _prune(self, loaded: stages.Loaded, within: Masks | None) -> Streamed:
        # The work folder's blocks depend on these sections alone, so a run may be resumed with other retraining.
        recipe = self.recipe
        sections = {"model", "dtype", "precision", "prune", "calibrate", "reconstruct"}
        decides = said(recipe, only=sections | ({"retrain"} if recipe.prune.phases > 1 else set()))
        work = Work(self._blocks(), digest(decides), writes=ranks.is_main()).open()
        blocks = int(getattr(loaded.model.config, "num_hidden_layers", 0)) or None
        with self._bar("prune", blocks) as advance:

            def on_block(report: BlockReport) -> None:
                self._log({"stage": "prune", **asdict(report)})
                advance(1)

            streamed = stages.prune(loaded, recipe, self.device, within=within, work=work, on_block=on_block)
        ranks.wait()
        return streamed if ranks.is_main() else self._as_written(work, loaded, streamed)

    def _as_written(self, work: Work, loaded: stages.Loaded, streamed: Streamed) -> Streamed:
        """The pruning of the main process, in place of this one's: two GPUs may differ in the last bit."""
        masks: dict[str, torch.Tensor] = {}
        for report in streamed.reports:
            masks |= work.masks(report.name)
            if loaded.source is None:
                work.restore_(report.name, loaded.model.get_submodule(report.name), {})
        return Streamed(Masks(masks), streamed.reports)

    def _retrain(self, loaded: stages.Loaded, masks: Masks, perplexities: dict[str, Any]) -> dict[str, Any]:
        recipe = self.recipe
        asked = recipe.retrain
        assert asked is not None
        model = loaded.model.to(self.device)
        views = stages.pruned_views(model, masks, recipe)
        packed = training_windows(asked, loaded.tokenizer)
        precision = stages.precision_of(recipe, self.device)
        with self._bar("retrain", asked.steps) as advance:
            report = stages.retrain(
                model,
                masks,
                views,
                packed,
                asked,
                precision=precision,
                checkpoint=self._checkpoint("retrain"),
                on_step=lambda done, _loss: advance.to(done),
                before_merge=lambda: perplexities.update(retrained=self._measured("retrained", loaded)),
                distance=loaded.distance,
            )
        perplexities["merged"] = self._measured("merged", loaded)
        model.to(self.home)
        shown = {k: v for k, v in asdict(report).items() if k != "losses"} | {
            "tokens_per_second": report.tokens_per_second
        }
        self._log({"stage": "retrain", **shown, "losses": report.losses})
        return {**shown, "train": list(asked.train)}

    def _soup(self, loaded: stages.Loaded, masks: Masks, result: dict[str, Any]) -> stages.Loaded:
        """The average of several retrained copies of the pruned model; what was measured of it goes into `result`."""
        pruned = Pruned(loaded, masks, self.recipe, self.device, self._bar)
        found = blend(pruned, self.out / "members", self.out / "work" / "soup")
        for stage, perplexity in found.perplexity.items():
            self._log({"stage": stage, "perplexity": perplexity})
        result["perplexity"] |= found.perplexity
        result |= {"retraining": found.retraining, "soup": found.summary}
        return found.loaded

    def _measured(self, stage: str, loaded: stages.Loaded) -> dict[str, float]:
        with self._bar(f"evaluate {stage}", None):
            found = stages.evaluate(loaded, self.recipe, self.device)
        self._log({"stage": stage, "perplexity": found})
        return found

    def _assembled(self, loaded: stages.Loaded, streamed: Streamed) -> stages.Loaded:
        """The pruned model as a folder of shards, written tensor by tensor; in memory only if it is to be retrained."""
        folder = self.out / "work" / "pruned"
        source = loaded.source
        assert isinstance(source, Shards)
        if ranks.is_main() and not (folder / "config.json").exists():
            with self._bar("write", None):
                save_tensors(
                    self._tensors(source, streamed),
                    loaded.tokenizer,
                    folder,
                    masks=streamed.masks,
                    info={},
                    source=source.checkpoint.folder,
                )
        ranks.wait()
        pruned = self.recipe.model_copy(update={"model": str(folder), "streaming": self.recipe.retrain is None})
        found = stages.load(pruned, home(pruned, self.device))
        return stages.Loaded(found.model, found.tokenizer, source.checkpoint.folder, found.source)

    def _tensors(self, source: Shards, streamed: Streamed) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the pruned model: finished parts from the work folder, the rest from the source."""
        work = Work(self._blocks(), "")
        done: set[str] = set()
        for report in streamed.reports:
            own = {f"{report.name}.{key}": tensor for key, tensor in work.tensors(report.name).items()}
            for name, tensor in source.stored(own).items():
                done.add(name)
                yield name, tensor
        for name, tensor in source.tensors():
            if name not in done:
                yield name, tensor

    def _save(self, loaded: stages.Loaded, masks: Masks, result: dict[str, Any]) -> None:
        if not ranks.is_main():
            return
        info = prunus_info(self.recipe, result)
        with self._bar("save", None):
            if isinstance(loaded.source, Shards):
                save_tensors(
                    ((name, self._as_stored(tensor)) for name, tensor in loaded.source.tensors()),
                    loaded.tokenizer,
                    self.out / "model",
                    masks=masks,
                    info=info,
                    source=loaded.folder or loaded.source.checkpoint.folder,
                )
                return
            loaded.model.to(self.stored)
            save_model(loaded.model, loaded.tokenizer, self.out / "model", masks=masks, info=info, source=loaded.folder)

    def _as_stored(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(self.stored) if tensor.is_floating_point() else tensor

    def _checkpoint(self, name: str) -> Path:
        return self.out / "work" / f"{name}-{self.key[:16]}.pt"

    def _blocks(self) -> Path:
        return self.out / "work" / "blocks"

    def _log(self, row: dict[str, Any]) -> None:
        if ranks.is_main():
            append_once(self.out / "metrics.jsonl", row)

    def _bar(self, description: str, total: float | None) -> AbstractContextManager[Advance]:
        return progress(description, total, console=None if ranks.is_main() else Console(force_terminal=False))


def _check_shares(recipe: Recipe) -> None:
    asked, world = recipe.retrain, ranks.count()
    if recipe.soup is not None and world > 1:
        raise ValueError(f"soup: members are trained in one process, not in {world}; start `prunus run` alone")
    if recipe.prune.phases > 1 and world > 1:
        raise ValueError(f"prune.phases: in one process, not in {world}; start `prunus run` alone")
    if asked is not None and asked.batch_size % world:
        raise ValueError(
            f"retrain.batch_size: {asked.batch_size} sequences cannot be shared by {world} processes; "
            f"use a multiple of {world}"
        )


def _drawn(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the picture shows: of a soup's members the mean and the best."""
    shown = {stage: found for stage, found in result["perplexity"].items() if not stage.startswith("member ")}
    return {**result, "perplexity": shown}
