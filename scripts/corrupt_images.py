"""Make the corrupted test sets that a recipe or a grid of classifiers asks for, in processes, without a GPU.

    python scripts/corrupt_images.py recipes/soups/resnet18-grid.yaml --processes 8

They go into the recipe's `corruptions.folder`, where runs find them; a run makes those that are missing itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from prunus.data.images import CORRUPTIONS
from prunus.measure.corruptions import corrupted_images
from prunus.run.grid import Grid
from prunus.run.recipe import ClassifierRecipe, parse, read_yaml
from prunus.run.vision import stages
from prunus.run.vision.setting import Setting

_open: dict[str, Setting] = {}


def recipes(raw: dict[str, Any], name: str) -> Iterator[ClassifierRecipe]:
    """The recipe of a file, or those of its cells."""
    if "base" not in raw:
        yield parse(raw, ClassifierRecipe, name)
        return
    grid = parse(raw, Grid, name)
    for labels in grid.cells():
        yield grid.recipe(labels, grid.seeds[0], {})


def make(recipe: ClassifierRecipe, name: str, severity: int) -> None:
    """One set, on the CPU."""
    torch.set_num_threads(1)
    asked = recipe.corruptions
    assert asked is not None
    assert asked.folder is not None
    key = recipe.images.model_dump_json()
    setting = _open.setdefault(key, _open.get(key) or Setting.of(recipe))
    folder = Path(asked.folder).expanduser()
    images = stages.corruptible(setting, asked)
    corrupted_images(images, name, severity, seed=asked.seed, strengths=asked.strengths, folder=folder)


def main() -> None:
    """Collect the sets of all cells, each once, and make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    args = parser.parse_args()
    jobs: dict[str, tuple[ClassifierRecipe, str, int]] = {}
    for recipe in recipes(read_yaml(args.recipe), str(args.recipe)):
        asked = recipe.corruptions
        if asked is None or asked.folder is None:
            continue
        plain = recipe.model_copy(update={"device": "cpu"})
        for name in asked.names or CORRUPTIONS:
            for severity in asked.severities:
                fixed = recipe.images.model_dump_json() + asked.model_dump_json(exclude={"names", "severities"})
                jobs.setdefault(f"{fixed} {name} {severity}", (plain, name, severity))
    if not jobs:
        parser.error("no cell has corruptions with a folder: set corruptions.folder")
    with ProcessPoolExecutor(args.processes) as pool:
        for done in [pool.submit(make, *job) for job in jobs.values()]:
            done.result()
    sys.stdout.write(f"{len(jobs)} corrupted sets are there\n")


if __name__ == "__main__":
    main()
