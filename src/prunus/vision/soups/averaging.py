"""How the members of a phase become one network: by a named average or given weights, and BatchNorm after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunus.data import ImageBatches, Images
from prunus.masks import Masks
from prunus.recipe import Choice, ClassifierRecipe, averages
from prunus.soup import Held, average, check_masks
from prunus.train import classification_loss
from prunus.vision import stages
from prunus.vision.setting import Setting

__all__ = ["Average", "Meter", "averaged", "on_device"]

State = Mapping[str, Tensor]
Average = Choice | tuple[float, ...]


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
        """A copy of the weights after `settle`, on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.settle(state).state_dict().items()}

    def measure(self, state: State) -> dict[str, Any]:
        """What is measured of these weights."""
        return stages.measure(self.put(state), self.setting)

    def held(self) -> Held:
        """What the held-out images say, as they are: of accuracy with BatchNorm settled, as the average would be used,
        and of the loss."""
        setting, images = self.setting, self.setting.sets.held
        assert isinstance(images, Images)
        batches = ImageBatches(
            images,
            batch_size=min(setting.recipe.train.batch_size, len(images)),
            seed=setting.recipe.seed,
            mean=setting.sets.mean,
            std=setting.sets.std,
            channels_last=setting.channels_last,
        )
        return Held(self._top1, self.model, batches, classification_loss(setting.recipe.train.label_smoothing))

    def _top1(self, state: State) -> float:
        return float(stages.measure_held(self.settle(state), self.setting)["top1"])


def averaged(
    asked: Average, states: Sequence[State], base: State, masks: Masks, meter: Meter
) -> tuple[State, tuple[float, ...]]:
    """The average that a recipe asks for, BatchNorm settled, and the share of each member in it.

    base: what the members were retrained from.
    """
    base, *states = on_device([base, *states], meter.setting.device)
    check_masks(states, [masks] * len(states))
    if isinstance(asked, tuple):
        state, shares = average(states, asked), asked
    else:
        held = {"held": meter.held()} if averages.knows(asked, "held") else {}
        state, shares = averages.make(asked, states, base=base, **held)
    return meter.settled(state), shares


def on_device(states: Sequence[State], device: Any) -> list[dict[str, Tensor]]:
    """The states on a device, where averages and distances take a hundredth of the time."""
    return [{name: value.to(device) for name, value in state.items()} for state in states]
