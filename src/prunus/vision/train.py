"""`prunus run` of a classifier: a run in a folder that resumes, with its network, numbers and pictures.

    out/recipe.yaml      the resolved recipe          out/metrics.jsonl      what was measured, also while it trained
    out/result.json      what the table shows         out/model.safetensors  the network; masks.safetensors, prunus.json
    out/dense/           the dense training           out/report.png         loss, learning rate, accuracy by stage

Of a soup out/members/ has every training that branched off, each kept when it is finished, and the pictures are
accuracy.png, lines.png and plane.png. A killed run goes on from out/work, which is gone when the run is done.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from prunus import __version__
from prunus.data import config_of
from prunus.jobs import (
    Outline,
    Store,
    Workers,
    begin,
    by_phase,
    entered,
    finish,
    finished,
    outline_classifier,
    ran_on,
    run,
)
from prunus.machine import is_pretrained, read_json, write_json, write_tensors, write_text
from prunus.masks import Masks
from prunus.measure import Energy, headline
from prunus.recipe import ClassifierPrune, ClassifierRecipe, Recipe, Unfinished, digest, merge, parse, read_yaml, said
from prunus.report import append_once, plot_accuracy, plot_lines, plot_plane, plot_run
from prunus.save import FORMAT, INFO_NAME, MASKS_NAME, copy_small_files
from prunus.vision import stages
from prunus.vision.dense import dense_key, read_dense
from prunus.vision.jobs import ClassifierJobs, forks_after
from prunus.vision.outcome import Outcome, outcome
from prunus.vision.plan import Plan
from prunus.vision.setting import Setting

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["planned", "pruning_of", "train_run"]

log = logging.getLogger(__name__)

_RATES = 400  # learning rates in a picture


def train_run(
    recipe: ClassifierRecipe,
    *,
    dense: Path | None = None,
    workers: Workers = Workers(),  # noqa: B008 - it is frozen
) -> dict[str, Any]:
    """The result of a run (the content of `out/result.json`); a finished run is read, a killed one goes on.

    dense: a folder with a finished dense training to start from; `out/dense` if left out. workers: who runs the members
    of a soup. Raises ValueError when `out` holds another recipe's run, for images or a device that are not there, and
    for a mask that is final too late; ImportError without Ray; Unfinished when a member failed.
    """
    picture, dense = "report.png" if recipe.soup is None else "accuracy.png", dense or Path(recipe.out) / "dense"
    out, key = Path(recipe.out), digest(said(recipe, but={"out"}))
    left = ("model.safetensors", INFO_NAME) if recipe.save else ()
    with entered(recipe, out, key, left, picture) as found:
        if found is not None:
            if not (out / picture).exists():
                _plot(out, recipe, found, _trace(dense))
            return found
        _check_work(out, key)
        setting, plan = _begin(recipe, key), Plan(recipe)
        where = ran_on(out / "work", setting.name)
        with Energy() as energy:
            made = outcome(plan, _finished(plan, dense, workers))
        result = {"key": key, "model": recipe.model, **where, **made.result}
        result["joules"] = energy.joules
        _write(out, recipe, made, result)
        return result


def _finished(plan: Plan, dense: Path, workers: Workers) -> Store:
    """A store in which all of a plan's jobs are finished: of a soup one that stays, and which workers fill."""
    recipe, out = plan.recipe, Path(plan.recipe.out)
    places = {dense_key(recipe): dense}
    if recipe.soup is None:
        store = Store(out / "work", places=places, log=out / "metrics.jsonl")
        stages.operations(Setting.of(recipe))
        finish(plan.jobs, store)
        return store
    store = Store(out / "members", places=places)
    if wrong := run([ClassifierJobs(store, plan.jobs, recipe)], workers, name="members"):
        raise Unfinished(wrong[0])
    return store


def planned(recipe: ClassifierRecipe) -> Outline:
    """What a run would do, checked as far as can be without training. Raises as `train_run`."""
    finished(recipe, Path(recipe.out), digest(said(recipe, but={"out"})))
    setting, phases = Setting.of(recipe), 1 if recipe.prune is None else recipe.prune.phases
    forks_after(recipe, len(setting.sets.train))
    dense, asked = setting.steps(recipe.train.epochs), recipe.retrain
    steps = [] if asked is None else asked.budgets(phases, dense, setting.epoch_steps)
    return outline_classifier(recipe, setting, sum(steps))


def _begin(recipe: ClassifierRecipe, key: str) -> Setting:
    """The setting of a run whose folder is begun: what cannot be run is refused before anything is written."""
    setting = Setting.anew(recipe)
    setting.new_model()
    forks_after(recipe, len(setting.sets.train))
    begin(Path(recipe.out), recipe)
    write_text(Path(recipe.out) / "work" / "key", key)
    return setting


def pruning_of(run: Path, overrides: Mapping[str, Any], out: Path | None = None) -> ClassifierRecipe:
    """The recipe that prunes and retrains the dense network of a finished run, from dotted overrides of that run's.

    Raises FileNotFoundError for a folder without a run; ValueError for a run without a dense network, and for
    overrides that would change how it was trained.
    """
    if not (run / "recipe.yaml").exists():
        raise FileNotFoundError(f"{run} holds no run of a classifier: there is no recipe.yaml; run its recipe first")
    raw = read_yaml(run / "recipe.yaml")
    found = read_dense(run / "dense")
    if found is None or raw.get("during"):
        why = "its network was pruned while it was trained" if raw.get("during") else "its training is not finished"
        raise ValueError(f"{run} holds no dense network: {why}; give the folder of a finished dense training")
    raw |= {"out": str(out or run / "pruned"), "prune": raw.get("prune") and _without_implied(raw["prune"])}
    recipe = cast("ClassifierRecipe", parse(merge(raw, overrides), Recipe, str(run)))
    if recipe.prune is None:
        raise ValueError("nothing would be pruned: give --sparsity")
    if dense_key(recipe) != found.metrics["key"]:
        raise ValueError(f"{run} was trained otherwise: only prune, retrain, recalibrate and out can be set here")
    return recipe


def _without_implied(prune: Mapping[str, Any]) -> dict[str, Any]:
    """A written section without the sparsity and the allocation that its pattern, scope and kind imply: others would
    imply others."""
    implied = ClassifierPrune(**{key: prune[key] for key in ("pattern", "scope", "kind") if key in prune})
    unsaid = {key: getattr(implied, key) for key in ("sparsity", "allocation")}
    return {key: value for key, value in prune.items() if key not in unsaid or value != unsaid[key]}


def _check_work(out: Path, key: str) -> None:
    begun = out / "work" / "key"
    if begun.exists() and begun.read_text(encoding="utf-8") != key:
        raise ValueError(f"out: {out} holds an unfinished run of another recipe; give another folder, or delete it")


def _write(out: Path, recipe: ClassifierRecipe, made: Outcome, result: dict[str, Any]) -> None:
    """The network, its masks, its description, the pictures; the result last, because it says that all is there."""
    if recipe.soup is None:
        for stage, found in result["stages"].items():
            append_once(out / "metrics.jsonl", {"stage": stage, **found})
        if "corrupted" in result:
            append_once(out / "metrics.jsonl", {"stage": "corrupted", **result["corrupted"]["mean"]})
        for found, losses in zip(result["phases"], made.trace["phases"], strict=False):
            append_once(out / "metrics.jsonl", {"stage": "phase", **found, **losses})
    if recipe.save:
        _describe(out, recipe, made.model, made.masks, result)
    title, geometry = _plot(out, recipe, result, made.trace), made.geometry
    if geometry is not None and geometry.lines:
        plot_lines(geometry.lines, out / "lines.png", title=f"{title}: loss between two of them")
    if geometry is not None and geometry.plane is not None:
        plot_plane(geometry.plane, out / "plane.png", title=f"{title}: loss over the plane of three")
    write_json(out / "result.json", result)


def _plot(out: Path, recipe: ClassifierRecipe, result: Mapping[str, Any], trace: Mapping[str, Any]) -> str:
    """The picture of a run, of a soup accuracy by phase, and its title."""
    stages_of = {name: headline(found) for name, found in result["stages"].items()}
    shown, (what, _) = {name: 100 * share for name, (_, share) in stages_of.items()}, next(iter(stages_of.values()))
    if recipe.soup is None:
        losses, rates = trace.get("losses", []), _rates(trace)
        plot_run(losses, shown, out / "report.png", rates=rates, title=Path(recipe.model).name, what=what)
        return recipe.model
    title, xlabel = f"{recipe.model}, {recipe.soup.members} members", "sparsity after the phase"
    panels, dense = {"": by_phase([result])}, shown.get("dense")
    plot_accuracy(panels, out / "accuracy.png", xlabel=xlabel, dense=dense, title=title)
    return title


def _trace(dense: Path) -> dict[str, Any]:
    """What a dense training left; without the trace of one during which a method pruned, losses are left out."""
    path = dense / "trace.json"
    return read_json(path) if path.exists() else {}


def _describe(
    out: Path, recipe: ClassifierRecipe, model: nn.Module, masks: Masks | None, result: Mapping[str, Any]
) -> None:
    """Write a network, its masks if it has any, and what it is: model.safetensors, masks.safetensors, prunus.json."""
    write_tensors(out / "model.safetensors", model.state_dict())
    if is_pretrained(model):
        _write_config(out, recipe, model)
    if masks is not None:
        masks.save(out / MASKS_NAME)
    numbers = {key: value for key, value in result.items() if key not in ("key", "by_layer")}
    versions = {"prunus": __version__, "torch": torch.__version__}
    info = {"format": FORMAT, "recipe": recipe.model_dump(mode="json"), "metrics": numbers, "versions": versions}
    kept = {"masks": MASKS_NAME if masks is not None else None}
    write_json(out / INFO_NAME, info | kept | {"sparsity": {"layers": result.get("by_layer", {})}})


def _write_config(out: Path, recipe: ClassifierRecipe, model: PreTrainedModel) -> None:
    """What transformers loads a network by: its config, and what comes beside one that came as a folder."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(out)
    own = config_of(recipe.model)
    if own is not None:
        copy_small_files(own.parent, out)


def _rates(trace: Mapping[str, Any]) -> list[float]:
    whole = [value for value, length in trace.get("lrs", []) for _ in range(int(length))]
    return whole[:: max(1, len(whole) // _RATES)]
