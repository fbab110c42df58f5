"""Which task a recipe is of, and how it is run: what stands in the recipe decides, not the command.

    images, soup ─▶ a soup of classifiers       images ─▶ a classifier       axes ─▶ a grid       else a language model

A folder of a finished classifier run in place of a recipe is that run's recipe, and starts from its dense network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prunus.machine import ranks
from prunus.recipe import LanguageRecipe, load_recipe, read_yaml

__all__ = ["is_sweep", "load", "plan_recipe", "run_recipe"]

Show = Callable[[], None]
GRIDS = ("axes", "sweep")


def load(path: Path | None, overrides: Mapping[str, Any]) -> Any:
    """The checked recipe of a YAML file, of whichever task, with dotted overrides put on top.

    Raises ValueError that lists every wrong key with its value and mend; FileNotFoundError for a missing recipe.
    """
    found = next((key for key in GRIDS if key in (overrides if path is None else read_yaml(path))), None)
    if found is not None:
        raise ValueError(f"{path}: with the key {found!r} this is a grid, not one recipe; run it with `prunus grid`")
    return load_recipe(path, overrides)


def is_sweep(paths: Sequence[Path]) -> bool:
    """Whether a YAML file is of a sweep of rates; grids are several files, too.

    Raises FileNotFoundError without a file; ValueError for one that is of a single recipe, and for a sweep among grids.
    """
    raws = {path: read_yaml(path) for path in paths}
    for path, raw in raws.items():
        if not any(key in raw for key in ("base", *GRIDS)):
            raise ValueError(f"{path}: without the key 'axes' this is no grid but one recipe; run it with `prunus run`")
        if "sweep" in raw and len(paths) > 1:
            raise ValueError(f"{path}: a sweep runs by itself; leave out the other files")
    return any("sweep" in raw for raw in raws.values())


def run_recipe(
    path: Path | None,
    overrides: Mapping[str, Any],
    *,
    workers: int = 1,
    together: int = 1,
    ray: str | None = None,
) -> Show:
    """Run a recipe to its end; returns what shows the result.

    path: a YAML file, or the folder of a finished classifier run, whose dense network is pruned as `overrides` say.
    workers, together, ray: of the members of a soup of classifiers. Raises ValueError for them with any other task.
    """
    recipe = _asked(path, overrides)
    soup = recipe.soup is not None and not isinstance(recipe, LanguageRecipe)
    if not soup and (workers != 1 or together != 1 or ray is not None):
        raise ValueError("workers, together and ray share the members of a soup of classifiers; this recipe has none")
    if isinstance(recipe, LanguageRecipe):
        return _language(recipe)
    if ranks.count() > 1:
        raise ValueError(f"a classifier is trained in one process, not in {ranks.count()}; start `prunus run` alone")
    return _classifier(recipe, path, processes=workers, threads=together, ray=ray)


def plan_recipe(path: Path | None, overrides: Mapping[str, Any]) -> Show:
    """What shows the plan of a recipe; all that can be refused before work is."""
    from prunus.run.show import show_outline

    recipe = _asked(path, overrides)
    if isinstance(recipe, LanguageRecipe):
        from prunus.language import planned

        plan = planned(recipe)
    else:
        from prunus.vision import planned as planned_classifier

        plan = planned_classifier(recipe)
    return lambda: show_outline(plan, Path(recipe.out))


def _language(recipe: LanguageRecipe) -> Show:
    from prunus.language import compress
    from prunus.run.show import show_result

    result = compress(recipe)
    return _reported(recipe, lambda out: show_result(result, out))


def _classifier(recipe: Any, path: Path | None, **workers: Any) -> Show:
    from prunus.jobs import Workers
    from prunus.run.show import show_run, show_soup
    from prunus.vision import train_run

    dense = path / "dense" if path is not None and path.is_dir() else None
    result = train_run(recipe, dense=dense, workers=Workers(**workers))
    show = show_run if recipe.soup is None else show_soup
    return _reported(recipe, lambda out: show(result, out))


def _reported(recipe: Any, show: Callable[[Path], None]) -> Show:
    """Shows a result and leaves its page, once."""
    from prunus.run.page import write_report

    def shown() -> None:
        out = Path(recipe.out)
        show(out)
        page, result = out / "report.html", out / "result.json"
        if not page.exists() or page.stat().st_mtime_ns < result.stat().st_mtime_ns:
            write_report(out)

    return shown


def _asked(path: Path | None, overrides: Mapping[str, Any]) -> Any:
    """The recipe of a file, or of what is pruned of a finished run."""
    if path is None or not path.is_dir():
        return load(path, overrides)
    from prunus.vision import pruning_of

    out = overrides.get("out")
    rest = {key: value for key, value in overrides.items() if key != "out"}
    return pruning_of(path, rest, None if out is None else Path(out))
