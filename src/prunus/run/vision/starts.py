"""What classifiers start from: a job for each network that several of them share."""

from __future__ import annotations

from functools import partial
from typing import Any

from prunus.run.store import Job, Store
from prunus.run.vision.dense import dense
from prunus.run.vision.recipe import ClassifierRecipe, dense_key
from prunus.run.vision.setting import Setting

__all__ = ["dense_job"]


def dense_job(recipe: ClassifierRecipe) -> Job:
    """The dense training of a recipe, in the folder that `dense` describes; recipes that agree on it share it."""
    return Job("dense", dense_key(recipe), partial(_dense, recipe))


def _dense(recipe: ClassifierRecipe, job: Job, store: Store) -> dict[str, Any]:
    return dict(dense(Setting.of(recipe), store.path(job), checkpoint=store.checkpoint(job)).metrics)
