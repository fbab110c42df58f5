"""How the members of a phase become one network: uniform, greedy, learned or given weights, and BatchNorm after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunus.data import ImageBatches
from prunus.masks import Masks
from prunus.run.vision import stages
from prunus.run.vision.setting import Setting
from prunus.run.vision.soups.branches import Branch, Store, on_device, plain_state
from prunus.soup import average, check_masks, greedy, learn_weights
from prunus.train import alone, classification_loss

__all__ = ["Mixed", "Mixer", "mixer", "settle_", "single"]

State = Mapping[str, Tensor]
Average = str | tuple[float, ...]


@dataclass(frozen=True)
class Mixed:
    """An average: its weights in the state, BatchNorm settled, how it was made, and the share of each member in it."""

    state: State
    how: list[Any]
    shares: tuple[float, ...]


Mixer = Callable[[Store, Sequence[Branch], Masks], Mixed]


def single(store: Store, branches: Sequence[Branch], masks: Masks) -> Mixed:
    """The one member, as its branch left it."""
    assert len(branches) == 1
    return Mixed(store.state(branches[0]), ["single"], (1.0,))


def mixer(asked: Average, setting: Setting, model: nn.Module) -> Mixer:
    """The mixer of a recipe's `average`. model: of the setting's shape and device, into which averages are put."""

    def mix(store: Store, branches: Sequence[Branch], masks: Masks) -> Mixed:
        states = on_device([store.state(branch) for branch in branches], setting.device)
        check_masks(states, [masks] * len(states))
        if asked == "greedy":
            chosen, state = greedy(states, lambda state: _score(state, setting, model))
            shares = tuple(1 / len(chosen.members) if i in chosen.members else 0.0 for i in range(len(states)))
        else:
            shares = _shares(asked, states, setting, model)
            state = average(states, shares)
        how = [asked, setting.recipe.recalibrate, setting.sets.held is not None and setting.recipe.images.validation]
        settle_(state, setting, model)
        return Mixed(plain_state(model), how, tuple(shares))

    return mix


def settle_(state: State, setting: Setting, model: nn.Module) -> None:
    """Put weights into the model, and count BatchNorm statistics anew as `stages.recalibrate` does."""
    model.load_state_dict(dict(state))
    if setting.recipe.recalibrate and stages.has_batchnorm(model):
        stages.recalibrate(model, setting)


def _shares(asked: Average, states: Sequence[State], setting: Setting, model: nn.Module) -> Sequence[float]:
    if asked == "learned":
        return _learned(states, setting, model)
    return [1 / len(states)] * len(states) if isinstance(asked, str) else asked


def _learned(states: Sequence[State], setting: Setting, model: nn.Module) -> list[float]:
    """Weights learned on the held-out images, which are not augmented; BatchNorm uses each batch's own statistics."""
    held = setting.sets.held
    assert held is not None
    size = min(setting.recipe.train.batch_size, len(held))
    batches = ImageBatches(
        held,
        batch_size=size,
        seed=setting.recipe.seed,
        mean=setting.sets.mean,
        std=setting.sets.std,
        channels_last=setting.channels_last,
    )
    model.train()
    with alone():
        return learn_weights(states, model, batches, classification_loss(setting.recipe.train.label_smoothing))


def _score(state: State, setting: Setting, model: nn.Module) -> float:
    """Accuracy on the held-out images with BatchNorm settled, as the average would be used."""
    settle_(state, setting, model)
    return float(stages.measure_held(model, setting)["top1"])
