"""How the members of a phase become one network: uniform, greedy, learned or given weights, and BatchNorm after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunus.data import ImageBatches
from prunus.masks import Masks
from prunus.run.vision import stages
from prunus.run.vision.recipe import ClassifierRecipe
from prunus.run.vision.setting import Setting
from prunus.soup import average, check_masks, greedy, learn_weights
from prunus.train import alone, classification_loss

__all__ = ["Average", "Meter", "averaged", "on_device", "plain_state"]

State = Mapping[str, Tensor]
Average = str | tuple[float, ...]


@dataclass(frozen=True)
class Meter:
    """A setting, and a network of its shape on its device into which weights are put to be measured."""

    setting: Setting
    model: nn.Module

    @classmethod
    def of(cls, recipe: ClassifierRecipe) -> Meter:
        """The meter of a recipe."""
        setting = Setting.of(recipe)
        return cls(setting, setting.new_model())

    def put(self, state: State) -> nn.Module:
        """The network with these weights."""
        self.model.load_state_dict(dict(state))
        return self.model

    def settle(self, state: State) -> nn.Module:
        """The network with these weights, BatchNorm counted anew as `stages.settle` does."""
        model = self.put(state)
        stages.settle(model, self.setting)
        return model

    def settled(self, state: State) -> State:
        """The weights after `settle`."""
        return plain_state(self.settle(state))

    def measure(self, state: State) -> dict[str, Any]:
        """What is measured of these weights."""
        return stages.measure(self.put(state), self.setting)


def averaged(asked: Average, states: Sequence[State], masks: Masks, meter: Meter) -> tuple[State, tuple[float, ...]]:
    """The average that a recipe asks for, BatchNorm settled, and the share of each member in it."""
    states = on_device(states, meter.setting.device)
    check_masks(states, [masks] * len(states))
    if asked == "greedy":
        chosen, state = greedy(states, lambda state: _score(state, meter))
        shares = tuple(1 / len(chosen.members) if i in chosen.members else 0.0 for i in range(len(states)))
    else:
        shares = _shares(asked, states, meter)
        state = average(states, shares)
    return meter.settled(state), tuple(shares)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a network's state on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def on_device(states: Sequence[State], device: Any) -> list[dict[str, Tensor]]:
    """The states on a device, where averages and distances take a hundredth of the time."""
    return [{name: value.to(device) for name, value in state.items()} for state in states]


def _shares(asked: Average, states: Sequence[State], meter: Meter) -> Sequence[float]:
    if asked == "learned":
        return _learned(states, meter)
    return [1 / len(states)] * len(states) if isinstance(asked, str) else asked


def _learned(states: Sequence[State], meter: Meter) -> list[float]:
    """Weights learned on the held-out images, which are not augmented; BatchNorm uses each batch's own statistics."""
    setting, held = meter.setting, meter.setting.sets.held
    assert held is not None
    batches = ImageBatches(
        held,
        batch_size=min(setting.recipe.train.batch_size, len(held)),
        seed=setting.recipe.seed,
        mean=setting.sets.mean,
        std=setting.sets.std,
        channels_last=setting.channels_last,
    )
    meter.model.train()
    with alone():
        loss = classification_loss(setting.recipe.train.label_smoothing)
        return learn_weights(states, meter.model, batches, loss)


def _score(state: State, meter: Meter) -> float:
    """Accuracy on the held-out images with BatchNorm settled, as the average would be used."""
    return float(stages.measure_held(meter.settle(state), meter.setting)["top1"])
