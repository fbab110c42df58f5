"""`prunus run`: a soup in a folder that resumes, with its network, its numbers, a table and pictures.

    out/recipe.yaml      the resolved recipe          out/model.safetensors  the soup; masks.safetensors, prunus.json
    out/result.json      a row for each run           out/accuracy.png       accuracy by phase
    out/dense/           the dense training           out/lines.png, plane.png   the loss between members
    out/members/         every training that branched off it, each kept when it is finished

A killed run goes on when the same command is given again.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunus.machine import write_json
from prunus.measure import Energy
from prunus.report import plot_accuracy, plot_lines, plot_plane, progress
from prunus.run import lanes
from prunus.run.vision.soups.branches import Store
from prunus.run.vision.soups.experiment import SoupOutcome, soup_experiment
from prunus.run.vision.soups.phases import by_phase
from prunus.run.vision.soups.pools import opened
from prunus.run.vision.soups.recipe import SoupRecipe
from prunus.run.vision.train import begin, begun, describe

__all__ = ["soup_run"]


def soup_run(recipe: SoupRecipe, *, workers: int = 1, together: int = 1, ray: str | None = None) -> dict[str, Any]:
    """The result of a soup (the content of `out/result.json`); a finished one is read, a killed one goes on.

    workers: processes, GPUs in turn; together: members at once in each, in threads; ray: a cluster's address, or local.
    Raises ValueError for numbers that make no sense, when `out` holds another recipe's run, and for images or a device
    that are not there; ImportError without Ray; RuntimeError at the end when a member failed for good.
    """
    if workers < 1 or together < 1 or (ray is not None and workers > 1):
        raise ValueError(
            f"workers and together are at least 1, and Ray has workers of its own; got {workers=}, {together=}"
        )
    out, key, found = begun(recipe)
    if found is not None:
        return found
    setting = begin(recipe, key)
    store = Store(out / "members")
    with Energy() as energy, opened(store, together=together, workers=workers, ray=ray) as pool, lanes.own_stream():
        outcome = soup_experiment(setting, out / "dense", store, pool, checkpoint=out / "work" / "dense.pt", bar=_bar)
    result = {"key": key, "model": recipe.model, "device": setting.name, **outcome.result, "joules": energy.joules}
    _write(out, recipe, outcome, result)
    return result


@contextmanager
def _bar(name: str, steps: int | None) -> Generator[Any]:
    with progress(name, steps) as advance:
        yield advance


def _write(out: Path, recipe: SoupRecipe, outcome: SoupOutcome, result: dict[str, Any]) -> None:
    """The network, its description, the pictures; the result last, because it says that all is there."""
    describe(out, recipe, outcome.model, outcome.masks, result)
    dense = 100 * result["stages"]["dense"]["top1"] if "dense" in result["stages"] else None
    title = f"{recipe.model}, {recipe.soup.members} members"
    plot_accuracy(
        {"": by_phase([result])}, out / "accuracy.png", xlabel="sparsity after the phase", dense=dense, title=title
    )
    apart = outcome.between
    if apart is not None and apart.lines:
        plot_lines(apart.lines, out / "lines.png", title=f"{title}: loss between two of them")
    if apart is not None and apart.plane is not None:
        plot_plane(apart.plane, out / "plane.png", title=f"{title}: loss over the plane of three")
    write_json(out / "result.json", result)
    shutil.rmtree(out / "work", ignore_errors=True)
