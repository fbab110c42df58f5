"""Trainings that branch off a stored network, and the folder of those that are finished: each is done once.

    starts/KEY/model.safetensors, masks.safetensors     what branches start from
    branches/KEY.safetensors, KEY.json                  a finished branch: its network, its numbers (written last)
    branches/KEY.swa.safetensors                        the mean of its snapshots, if it took any
    branches/KEY.pt, KEY.lock                           its checkpoint while it is trained; locked by who trains it

Keys are hashes of what decides the result, the start included. So soups of 3, 5 and 10 members, and the baselines of
each, share their members, in one run, between the cells of a grid, and after a kill.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from prunus.machine import write_json, write_tensors
from prunus.masks import Masks
from prunus.run.names import Choice, retrainings
from prunus.run.recipe import digest, said
from prunus.run.vision import stages
from prunus.run.vision.recipe import ClassifierRecipe
from prunus.run.vision.setting import Setting
from prunus.save import MASKS_NAME
from prunus.train import Multiplier, Original, Swa

__all__ = [
    "Branch",
    "Grown",
    "Rates",
    "Rest",
    "State",
    "Store",
    "drawing",
    "grow",
    "measured",
    "on_device",
    "plain_state",
    "setting_of",
]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Rates:
    """The learning rates of a retraining, by name, with its signals."""

    schedule: Choice
    original: Original
    steps: int
    distance: float
    share: float
    warmup: float

    def multiplier(self, setting: Setting) -> Multiplier:
        """step -> factor of the peak."""
        return retrainings.make(
            self.schedule, self.original, self.steps, distance=self.distance, share=self.share, warmup=self.warmup
        )


@dataclass(frozen=True)
class Rest:
    """The learning rates of the rest of a training from step `first`, passed through `slower` times as slowly."""

    first: int
    slower: int = 1

    def multiplier(self, setting: Setting) -> Multiplier:
        """step -> factor of the peak."""
        whole = stages.schedule(setting)[0]
        return lambda step: whole(self.first + step // self.slower)


@dataclass(frozen=True)
class Branch:
    """One training that starts from a stored network.

    recipe: of this training, with seed, weight decay and augmentation of its own. start: key of the stored network.
    part: which batches, as in `Setting.batches`. order: seed of the images' order where that alone is its own.
    swa: share of the training after which snapshots of every epoch are averaged, besides.
    """

    recipe: ClassifierRecipe
    start: str
    part: int
    steps: int
    peak: float
    rates: Rates | Rest
    order: int | None = None
    swa: float | None = None

    @cached_property
    def key(self) -> str:
        """Hash of what decides the result."""
        recipe = said(self.recipe, but=_ELSEWHERE)
        rates = vars(self.rates) | ({"original": self.rates.original.runs()} if isinstance(self.rates, Rates) else {})
        own: dict[str, Any] = {name: getattr(self, name) for name in ("start", "part", "steps", "peak", "order", "swa")}
        return digest([recipe, type(self.rates).__name__, rates, own])[:24]


# What decides only the start, or is said by the branch itself.
_ELSEWHERE = {"out", "during", "prune", "retrain", "soup", "corruptions"}


@dataclass(frozen=True)
class Grown:
    """A trained branch: its state, the mean of its snapshots if it took any, and its numbers."""

    state: State
    mean: State | None
    numbers: dict[str, Any]


@dataclass(frozen=True)
class Store:
    """The folder of starts and branches."""

    folder: Path

    def start(self, key: str) -> tuple[State, Masks | None]:
        """A stored start."""
        folder = self.folder / "starts" / key
        masks = folder / MASKS_NAME
        return load_file(folder / "model.safetensors"), Masks.load(masks) if masks.exists() else None

    def put_start(self, key: str, state: Mapping[str, Tensor], masks: Masks | None) -> None:
        """Store a start, unless it is there; the network last, because it says that all is there."""
        folder = self.folder / "starts" / key
        if (folder / "model.safetensors").exists():
            return
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            if not (folder / "model.safetensors").exists():
                if masks is not None:
                    masks.save(folder / MASKS_NAME)
                write_tensors(folder / "model.safetensors", state)

    def once(self, key: str, make: Callable[[], tuple[Mapping[str, Tensor], Masks]]) -> tuple[State, Masks]:
        """A stored start with masks, made if it is not there; others that need the same wait for it."""
        folder = self.folder / "starts" / key
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "making"):
            if not (folder / "model.safetensors").exists():
                self.put_start(key, *make())
        state, masks = self.start(key)
        assert masks is not None
        return state, masks

    def finished(self, branch: Branch) -> bool:
        """Whether a branch is there."""
        return self.path(branch, ".json").exists()

    def numbers(self, branch: Branch) -> dict[str, Any]:
        """What was measured of a finished branch."""
        return json.loads(self.path(branch, ".json").read_text(encoding="utf-8"))

    def state(self, branch: Branch) -> State:
        """The network of a finished branch, on the CPU."""
        return load_file(self.path(branch, ".safetensors"))

    def mean(self, branch: Branch) -> State:
        """The mean of a finished branch's snapshots."""
        return load_file(self.path(branch, ".swa.safetensors"))

    def put(self, branch: Branch, grown: Grown) -> None:
        """Store a branch; its numbers last, because they say that all is there."""
        write_tensors(self.path(branch, ".safetensors"), grown.state)
        if grown.mean is not None:
            write_tensors(self.path(branch, ".swa.safetensors"), grown.mean)
        write_json(self.path(branch, ".json"), grown.numbers)

    def path(self, branch: Branch, suffix: str) -> Path:
        """Where a branch keeps something."""
        return self.folder / "branches" / f"{branch.key}{suffix}"


def setting_of(branch: Branch) -> Setting:
    """Where a branch is trained; images are read once a process."""
    return replace(Setting.of(branch.recipe), order=branch.order)


def grow(branch: Branch, state: Mapping[str, Tensor], masks: Masks | None, checkpoint: Path | None = None) -> Grown:
    """Train a branch from its start, settle it and measure it; a killed training goes on from its checkpoint."""
    setting = setting_of(branch)
    model = setting.new_model()
    model.load_state_dict(dict(state))
    swa = Swa(branch.swa) if branch.swa is not None else None
    trace = stages.fit(
        model,
        setting,
        branch.rates.multiplier(setting),
        steps=branch.steps,
        part=branch.part,
        lr=branch.peak,
        masks=masks,
        during=[swa] if swa is not None else [],
        # A short training would write it only when it is over.
        checkpoint=checkpoint if branch.steps > 5 * setting.epoch_steps else None,
    )
    if masks is not None:
        masks.check(model)
    stages.settle(model, setting)
    numbers = measured(model, setting) | {"steps": branch.steps, "seconds": trace.seconds, "initial_lr": max(trace.lrs)}
    own, mean = plain_state(model), None
    if swa is not None:
        swa.finish()
        mean = plain_state(model)
    return Grown(own, mean, numbers)


@contextmanager
def drawing(key: str, device: torch.device) -> Generator[None]:
    """Context in which torch's generators (dropout) begin at a place of this key's own; they are as before afterwards.

    The generators are the process's, so this is for who trains alone in it.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(key[:12], 16))
        yield


def measured(model: torch.nn.Module, setting: Setting) -> dict[str, Any]:
    """What is measured of a member: on what the recipe measures on, and on held-out images if there are any."""
    held = stages.measure_held(model, setting) if setting.sets.held is not None else None
    return {"measured": stages.measure(model, setting), "held": held}


def plain_state(model: torch.nn.Module) -> State:
    """A copy of the state on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def on_device(states: Sequence[Mapping[str, Tensor]], device: torch.device) -> list[State]:
    """The states on a device, where averages and distances take a hundredth of the time."""
    return [{name: value.to(device) for name, value in state.items()} for state in states]
