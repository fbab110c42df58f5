"""Where the members of a soup begin: at a dense network, or at what a method left that pruned while it trained.

dense ─▶ prune ─▶ members                        in phases
during a method, to the end ─▶ members           that are retrained on a schedule of their own
gmp or dpf, until the mask is final ─▶ members   that do the rest of the training
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor, nn

from prunus.during import During, Part, cubic
from prunus.machine import write_json
from prunus.masks import Masks
from prunus.run.recipe import digest, said
from prunus.run.vision import stages
from prunus.run.vision.dense import dense
from prunus.run.vision.experiment import _finished, _method
from prunus.run.vision.recipe import dense_key
from prunus.run.vision.setting import Setting
from prunus.run.vision.soups.branches import Store, plain_state
from prunus.run.vision.soups.mixing import settle_
from prunus.run.vision.soups.recipe import SoupRecipe
from prunus.train import Original

__all__ = ["Bar", "Begin", "begin_at"]

State = Mapping[str, Tensor]
Bar = Callable[[str, int | None], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Begin:
    """Where all chains of a soup begin: the setting, the store, a network to measure with, and what was trained before.

    model: of the setting's shape, on its device; chains put weights into it as they need it. key, state: the trained
    network, its key in the store. masks: those of a method, None for a dense network. steps: done before the members.
    original: the rates of the training, the rest after a fork included. measured: by stage.
    """

    setting: Setting
    recipe: SoupRecipe
    store: Store
    model: nn.Module
    key: str
    state: State
    original: Original
    steps: int
    measured: Mapping[str, Any]
    masks: Masks | None = None

    def put(self, state: State) -> nn.Module:
        """The network with these weights."""
        self.model.load_state_dict(dict(state))
        return self.model

    def measure(self, state: State) -> dict[str, Any]:
        """What is measured of these weights."""
        return stages.measure(self.put(state), self.setting)

    def settled(self, state: State) -> State:
        """The weights with BatchNorm statistics counted anew as `stages.recalibrate` does."""
        settle_(state, self.setting, self.model)
        return plain_state(self.model)


def begin_at(
    setting: Setting, recipe: SoupRecipe, folder: Path, store: Store, checkpoint: Path | None, bar: Bar
) -> Begin:
    """Where a recipe's soup begins, after what has to be trained before its members, unless that is done.

    folder, checkpoint: of a dense training, as `dense` takes them. Raises ValueError for a mask that is never final.
    """
    if recipe.during is not None:
        return _after_method(setting, recipe, store, bar)
    with bar("train", setting.steps(recipe.train.epochs)) as advance:
        found = dense(setting, folder, checkpoint=checkpoint, on_step=_reports(advance))
    model = setting.new_model()
    model.load_state_dict(dict(found.state))
    measured = {"dense": stages.measure(model, setting)}
    steps, key = int(found.metrics["steps"]), dense_key(recipe)
    return Begin(setting, recipe, store, model, key, found.state, found.original, steps, measured)


def _after_method(setting: Setting, recipe: SoupRecipe, store: Store, bar: Bar) -> Begin:
    """Read from the store, or trained while a method prunes, and stored; others that need the same wait for it."""
    own = said(recipe, but={"out": True, "soup": True, "retrain": True, "train": {"evaluate_every"}})
    key = digest(["method", own, recipe.retrain is None])[:24]
    folder = store.folder / "starts" / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "training"):
        if not (folder / "model.safetensors").exists():
            _train_method(setting, recipe, store, key, bar)
    state, masks = store.start(key)
    numbers = json.loads((folder / "trace.json").read_text(encoding="utf-8"))
    original = Original.from_runs(numbers["lrs"], numbers["warmup"])
    model = setting.new_model()
    measured = numbers["measured"]
    return Begin(setting, recipe, store, model, key, state, original, int(numbers["steps"]), measured, masks)


def _train_method(setting: Setting, recipe: SoupRecipe, store: Store, key: str, bar: Bar) -> None:
    assert recipe.during is not None
    assert recipe.prune is not None
    name, options = next(iter(recipe.during.items()))
    method = _method(name, options, recipe.prune.sparsity, recipe.seed)
    whole = setting.steps(recipe.train.epochs)
    steps = whole if recipe.retrain is not None else _final(method, recipe.prune.sparsity, whole, name)
    taking: During = method if steps == whole else Part(method, whole)
    multiplier, warmup = stages.schedule(setting)
    folder = store.folder / "starts" / key
    model = setting.new_model()
    with bar(name, steps) as advance:
        trace = stages.fit(
            model,
            setting,
            multiplier,
            steps=steps,
            part=0,
            during=[taking],
            views=stages.views_of(model, recipe.prune),
            checkpoint=folder / "checkpoint.pt",
            on_step=_reports(advance),
        )
    masks = _finished(taking, name, model)
    measured = {"pruned": stages.measure(model, setting)}
    if recipe.retrain is not None and recipe.recalibrate and stages.has_batchnorm(model):  # as `experiment` does
        stages.recalibrate(model, setting)
        measured["recalibrated"] = stages.measure(model, setting)
    peak = recipe.train.lr
    runs = Original.of([peak * multiplier(step) for step in range(whole)], warmup).runs()
    numbers = {"lrs": runs, "warmup": warmup, "steps": steps, "seconds": trace.seconds, "measured": measured}
    write_json(folder / "trace.json", numbers)
    store.put_start(key, plain_state(model), Masks({name: mask.cpu() for name, mask in masks.items()}))
    (folder / "checkpoint.pt").unlink(missing_ok=True)


def _final(method: Any, sparsity: float, steps: int, name: str) -> int:
    """Steps after which the method's mask has its last sparsity; DPF, which would go on choosing, is stopped there."""
    last = max(cubic(sparsity, steps, every=method.every, start=method.start, stop=method.stop))
    if last >= steps:
        raise ValueError(
            f"during.{name}: the mask is final only at the end, so nothing is left to members: set during.{name}.stop "
            "below 1, or give a section retrain"
        )
    return last


def _reports(advance: Any) -> stages.OnStep | None:
    return None if advance is None else lambda done, _loss: advance.to(done)
