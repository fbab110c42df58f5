"""What lies between the members of a soup: distances and angles, the loss along lines and over the plane of three."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from prunus.recipe import given
from prunus.soup import Line, Plane, distances, loss_line, loss_plane
from prunus.train import unrecorded
from prunus.vision import stages
from prunus.vision.soups.averaging import Meter, on_device

__all__ = ["Geometry", "geometry"]

log = logging.getLogger(__name__)
State = Mapping[str, Tensor]
_LINES = 3  # of those between the first members
_SETTLED = 5000  # images, because there are a hundred points


@dataclass(frozen=True)
class Geometry:
    """Distances between members, lines between the first of them by name, and the plane of three, if asked for."""

    distances: dict[str, float]
    lines: dict[str, Line]
    plane: Plane | None

    def numbers(self) -> dict[str, Any]:
        """The same for result.json."""
        lines = {
            name: {"shares": line.shares.tolist(), "loss": line.values.tolist(), "barrier": line.barrier()}
            for name, line in self.lines.items()
        }
        plane = None if self.plane is None else {name: value.tolist() for name, value in vars(self.plane).items()}
        return {**self.distances, "lines": lines, "plane": plane}


def geometry(meter: Meter, states: Sequence[State], names: Sequence[str], *, picture: bool) -> Geometry:
    """What lies between members; names: the tensors that distances are taken over, the prunable ones.

    Losses are those on what the recipe measures on, BatchNorm settled at every point on at most 5,000 images. picture:
    whether the plane is measured too, which takes the most.
    """
    setting, recipe, states = meter.setting, meter.setting.recipe, on_device(states, meter.setting.device)
    asked, share = given(recipe.soup), min(recipe.recalibrate, _SETTLED / len(setting.sets.train))
    few = replace(meter, setting=replace(setting, recipe=recipe.model_copy(update={"recalibrate": share})))

    def loss(state: dict[str, Tensor]) -> float:
        try:
            return float(stages.measure(few.settle(state), setting)["loss"])
        except FloatingPointError:  # beyond the members weights may overflow; such points stay white
            return float("nan")

    lines = _lines(states, loss, asked.line) if asked.line else {}
    plane = None
    if picture and asked.plane and len(states) > 2:
        try:
            plane = loss_plane(states[0], states[1], states[2], loss, points=(asked.plane, asked.plane), names=names)
        except ValueError as error:  # members on one line span none
            log.warning("no plane: %s", error)
    with unrecorded():
        apart = distances(states, names).summary()
    return Geometry(apart, lines, plane)


def _lines(states: Sequence[State], loss: Callable[[dict[str, Tensor]], float], points: int) -> dict[str, Line]:
    """The lines between the first members, by name; the loss of a member itself is measured once for all of them."""
    shares = np.linspace(0, 1, points)
    pairs = list(itertools.combinations(range(len(states)), 2))[:_LINES]
    ends = {
        place: loss({k: value.clone() for k, value in states[place].items()}) for place in set(itertools.chain(*pairs))
    }
    lines: dict[str, Line] = {}
    for a, b in pairs:
        inner = loss_line(states[a], states[b], loss, shares[1:-1].tolist()).values
        lines[f"{a + 1} to {b + 1}"] = Line(shares, np.asarray([ends[a], *inner, ends[b]][:points]))
    return lines
