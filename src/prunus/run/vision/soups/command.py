"""`prunus run`: a soup in a folder that resumes, with its network, its numbers, a table and pictures.

    out/recipe.yaml      the resolved recipe          out/model.safetensors  the soup; masks.safetensors, prunus.json
    out/result.json      a row for each run           out/accuracy.png       accuracy by phase
    out/dense/           the dense training           out/lines.png, plane.png   the loss between members
    out/members/         every training that branched off it, each kept when it is finished

A killed run goes on when the same command is given again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.machine import write_json
from prunus.measure import Energy
from prunus.report import plot_accuracy, plot_lines, plot_plane
from prunus.run.folder import ran_on
from prunus.run.pool import Workers, run
from prunus.run.recipe import ClassifierRecipe, given
from prunus.run.store import Store
from prunus.run.vision.soups.experiment import SoupOutcome, outcome
from prunus.run.vision.soups.jobs import forks_after
from prunus.run.vision.soups.phases import by_phase
from prunus.run.vision.soups.plan import Plan
from prunus.run.vision.starts import ClassifierJobs
from prunus.run.vision.train import begin_classifier, begun, describe

__all__ = ["soup_run"]


def soup_run(
    recipe: ClassifierRecipe, *, workers: int = 1, together: int = 1, ray: str | None = None
) -> dict[str, Any]:
    """The result of a soup (the content of `out/result.json`); a finished one is read, a killed one goes on.

    workers: processes, GPUs in turn; together: members at once in each, in threads; ray: a cluster's address, or local.
    Raises ValueError for numbers that make no sense, when `out` holds another recipe's run, for images or a device that
    are not there, and for a mask that is final too late; ImportError without Ray; RuntimeError when a job failed.
    """
    asked = Workers(workers, together, ray)
    with begun(recipe, "accuracy.png") as (out, key, found):
        if found is not None:
            _plot_accuracy(out, recipe, found)
            return found
        setting, started = begin_classifier(recipe, key), time.perf_counter()
        forks_after(setting)
        plan, store = Plan(recipe), Store(out / "members", {"dense": out / "dense"})
        with Energy() as energy:
            wrong = run([ClassifierJobs(store, plan.jobs, recipe)], asked, name="members")
            if wrong:
                raise RuntimeError(wrong[0])
            made = outcome(plan, store)
        result = {"key": key, "model": recipe.model, **ran_on(out, setting.name), **made.result}
        result |= {"joules": energy.joules, "seconds": time.perf_counter() - started}
        _write(out, recipe, made, result)
        return result


def _write(out: Path, recipe: ClassifierRecipe, made: SoupOutcome, result: dict[str, Any]) -> None:
    """The network, its description, the pictures; the result last, because it says that all is there."""
    if recipe.save:
        describe(out, recipe, made.model, made.masks, result)
    title = _plot_accuracy(out, recipe, result)
    if made.geometry is not None and made.geometry.lines:
        plot_lines(made.geometry.lines, out / "lines.png", title=f"{title}: loss between two of them")
    if made.geometry is not None and made.geometry.plane is not None:
        plot_plane(made.geometry.plane, out / "plane.png", title=f"{title}: loss over the plane of three")
    write_json(out / "result.json", result)


def _plot_accuracy(out: Path, recipe: ClassifierRecipe, result: Mapping[str, Any]) -> str:
    """Draw accuracy by phase; the title of all pictures."""
    dense = 100 * result["stages"]["dense"]["top1"] if "dense" in result["stages"] else None
    title = f"{recipe.model}, {given(recipe.soup).members} members"
    plot_accuracy(
        {"": by_phase([result])}, out / "accuracy.png", xlabel="sparsity after the phase", dense=dense, title=title
    )
    return title
