"""The main job: load, prune, (reconstruct), (retrain, merge), evaluate, save, in one resumable run folder.

out/recipe.yaml      the resolved recipe          out/metrics.jsonl   every number, as it was measured
out/result.json      what the table shows         out/report.png      sparsity by layer, perplexity by stage
out/model/           the compressed model         out/work/           finished blocks, until the run is done
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml

from prunus.export import save_model
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.report import append_metrics, plot_compression, progress
from prunus.run import stages
from prunus.run.files import write_json, write_text
from prunus.run.recipe import Recipe, digest
from prunus.sources import Shards
from prunus.stream import BlockReport, Streamed
from prunus.work import Work

__all__ = ["compress"]

log = logging.getLogger(__name__)


def compress(recipe: Recipe) -> dict[str, Any]:
    """The result of a run (the content of `out/result.json`); a finished run is read, a killed one goes on.

    Raises ValueError when `out` holds another recipe's run.
    """
    out = Path(recipe.out)
    key = digest(recipe)
    finished = _claim(out, recipe, key)
    if finished is not None:
        log.info("%s is finished already; nothing was repeated", out)
        return finished
    run = _Run(out, recipe, key, stages.device_of(recipe))
    result = run.execute()
    write_json(out / "result.json", result)
    plot_compression(result, out / "report.png")
    shutil.rmtree(out / "work", ignore_errors=True)
    return result


class _Run:
    """One compression under way."""

    def __init__(self, out: Path, recipe: Recipe, key: str, device: torch.device) -> None:
        self.out, self.recipe, self.key, self.device = out, recipe, key, device

    def execute(self) -> dict[str, Any]:
        started = time.perf_counter()
        recipe = self.recipe
        with progress("load", None):
            loaded = stages.load(recipe)
        result: dict[str, Any] = {"key": self.key, "model": recipe.model, "device": _device_name(self.device)}
        result["perplexity"] = {}
        if not recipe.streaming:
            result["perplexity"]["dense"] = self._measured("dense", loaded)
        streamed = self._prune(loaded)
        result["pruning"] = stages.summary(streamed)
        if recipe.streaming:
            loaded = self._assemble(loaded, streamed.masks)
        result["perplexity"]["pruned"] = self._measured("pruned", loaded)
        if recipe.retrain is not None:
            result["retraining"] = self._retrain(loaded, streamed.masks, result["perplexity"])
        if recipe.evaluate.tasks:
            result["zero_shot"] = stages.zero_shot(loaded.model, loaded.tokenizer, recipe, self.device)
        result["seconds"] = time.perf_counter() - started
        if recipe.save:
            result["saved"] = self._save(loaded, streamed, result)
        return result

    def _prune(self, loaded: stages.Loaded) -> Streamed:
        # The work folder's blocks depend on these sections alone, so a run may be resumed with other retraining.
        recipe = self.recipe
        decides = recipe.model_dump(mode="json", include={"model", "dtype", "prune", "calibrate", "reconstruct"})
        work = Work(self.out / "work" / "blocks", digest(decides)).open()
        blocks = int(getattr(loaded.model.config, "num_hidden_layers", 0)) or None
        with progress("prune", blocks) as advance:

            def on_block(report: BlockReport) -> None:
                self._log({"stage": "prune", **asdict(report)})
                advance(1)

            return stages.prune(loaded, recipe, self.device, work=work, on_block=on_block)

    def _retrain(self, loaded: stages.Loaded, masks: Masks, perplexities: dict[str, Any]) -> dict[str, Any]:
        recipe = self.recipe
        asked = recipe.retrain
        assert asked is not None
        model = loaded.model.to(self.device)
        views = [
            v
            for v in find_layers(model, include=recipe.prune.include, exclude=recipe.prune.exclude)
            if v.parameter in masks
        ]
        tokens = stages.text_tokens(asked.data, loaded.tokenizer)
        precision = stages.precision_of(recipe, self.device)
        with progress("retrain", asked.steps) as advance:
            report = stages.retrain(
                model,
                masks,
                views,
                tokens,
                asked,
                precision=precision,
                checkpoint=self.out / "work" / "retrain.pt",
                on_step=lambda done, _loss: advance.to(done),
                before_merge=lambda: perplexities.update(retrained=self._measured("retrained", loaded)),
            )
        perplexities["merged"] = self._measured("merged", loaded)
        model.to("cpu")
        shown = {k: v for k, v in asdict(report).items() if k != "losses"} | {
            "tokens_per_second": report.tokens_per_second
        }
        self._log({"stage": "retrain", **shown, "losses": report.losses})
        return {**shown, "train": list(asked.train)}

    def _measured(self, stage: str, loaded: stages.Loaded) -> dict[str, float]:
        with progress(f"evaluate {stage}", None):
            found = stages.evaluate(loaded.model, loaded.tokenizer, self.recipe, self.device)
        self._log({"stage": stage, "perplexity": found})
        return found

    def _assemble(self, loaded: stages.Loaded, masks: Masks) -> stages.Loaded:
        """The streamed model in memory: finished blocks from the work folder, the rest from the source's shards."""
        assert isinstance(loaded.source, Shards)
        work = Work(self.out / "work" / "blocks", "")
        model = loaded.model
        from prunus.blocks import find_blocks

        for name in find_blocks(model):
            block = loaded.source.load(name, torch.device("cpu"))
            work.restore_(name, block, {})
        loaded.source.fill_(torch.device("cpu"))
        masks.check(model)
        return stages.Loaded(model, loaded.tokenizer, loaded.folder)

    def _save(self, loaded: stages.Loaded, streamed: Streamed, result: dict[str, Any]) -> str:
        info = {"recipe": self.recipe.model_dump(mode="json"), **result}
        folder = self.out / "model"
        with progress("save", None):
            save_model(loaded.model, loaded.tokenizer, folder, masks=streamed.masks, info=info, source=loaded.folder)
        return str(folder)

    def _log(self, row: dict[str, Any]) -> None:
        append_metrics(self.out / "metrics.jsonl", row)


def _claim(out: Path, recipe: Recipe, key: str) -> dict[str, Any] | None:
    """The stored result of this very recipe, or None after the folder was made ready for it."""
    result = out / "result.json"
    if result.exists():
        found = json.loads(result.read_text())
        if found.get("key") == key:
            return found
        raise ValueError(f"out: {out} holds the result of another recipe; give another folder with --out, or delete it")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    return None


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
