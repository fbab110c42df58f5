"""Jobs of classifiers: the dense training that others start from, and any fixed number of them as a graph."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from prunus.run.recipe import ClassifierRecipe
from prunus.run.store import Job, Store
from prunus.run.vision import stages
from prunus.run.vision.dense import dense, dense_key
from prunus.run.vision.setting import Setting

__all__ = ["ClassifierJobs", "dense_job"]


@dataclass(frozen=True)
class ClassifierJobs:
    """Jobs of one network on one set of images, all known from the beginning, for the pool."""

    store: Store
    wanted: tuple[Job, ...]
    recipe: ClassifierRecipe

    def jobs(self) -> Sequence[Job]:
        """All of them."""
        return self.wanted

    def expected(self) -> Sequence[Job]:
        """The same: none joins later."""
        return self.wanted

    @contextmanager
    def prepared(self) -> Generator[None]:
        """Read the images and count the network's operations before any thread trains."""
        stages.operations(Setting.of(self.recipe))
        yield


def dense_job(recipe: ClassifierRecipe) -> Job:
    """The dense training of a recipe, in the folder that `dense` describes; recipes that agree on it share it."""
    return Job("dense", dense_key(recipe), partial(_dense, recipe))


def _dense(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    return dict(dense(Setting.of(recipe), store.path(job), checkpoint=store.checkpoint(job)).metrics)
