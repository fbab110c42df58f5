"""What is measured while a model trains: the best weights are kept, and training ends when they get no better.

    every N steps ─▶ measure ─┬─ better than all before ─▶ weights kept      └─ none better, `patience` times ─▶ the end

What was measured, and the best weights, are in the run's checkpoints: a run that goes on measures nothing twice and
ends where the unbroken one does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from prunus.machine import ranks
from prunus.train.capture import unrecorded

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watch:
    """What `train` measures while it trains. measure: how wrong the model is, lower is better, on held-out data.

    every: steps between two measurements; one stands at the end, too. patience: training ends when so many in a row
    were no better than the best before them. keep_best: the model ends with the weights that measured best, of which
    those that it began with are one.
    Raises ValueError for counts below 1.

    >>> watch = Watch(lambda: perplexity(model, held_out), every=50, patience=3, keep_best=True)  # doctest: +SKIP
    """

    measure: Callable[[], float]
    every: int
    patience: int | None = None
    keep_best: bool = False

    def __post_init__(self) -> None:
        if self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"A watch's every and patience are at least 1; got {self.every} and {self.patience}.")


@dataclass
class Watched:
    """A watch under way: (step, value) of each measurement, and the weights of the best.

    shared: whether several processes train one model, of which the main one's measurement counts.
    """

    watch: Watch | None
    tensors: Callable[[], dict[str, Tensor]]
    shared: bool
    seen: list[tuple[int, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def ended(self) -> bool:
        """Whether patience is at its end."""
        patience = None if self.watch is None else self.watch.patience
        return patience is not None and len(self.seen) - 1 - self._best_place() >= patience

    @property
    def plan(self) -> dict[str, Any]:
        """What a run that goes on must agree in."""
        asked = self.watch
        return {} if asked is None else {"watch": [asked.every, asked.patience, asked.keep_best]}

    def is_due(self, done: int, steps: int) -> bool:
        """Whether it is measured after `done` of `steps` steps."""
        return self.watch is not None and (done % self.watch.every == 0 or done == steps)

    def look(self, done: int) -> None:
        """Measure after `done` steps."""
        assert self.watch is not None
        with unrecorded():
            value = self.watch.measure()
            value = float(ranks.agree(value) if self.shared else value)
        self.seen.append((done, value))
        if self.watch.keep_best and self._best_place() == len(self.seen) - 1:
            self.best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.tensors().items()}
        if self.ended:
            step, least = self.seen[self._best_place()]
            log.info("training ends after step %d: nothing was better than %.6g, after step %d", done, least, step)

    @torch.no_grad()
    def finish_(self) -> None:
        """Put the best weights back, if they are kept."""
        for name, tensor in self.tensors().items() if self.best else ():
            tensor.copy_(self.best[name])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"seen": self.seen, "best": self.best}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self.seen, self.best = [tuple(each) for each in state["seen"]], state["best"]

    def _best_place(self) -> int:
        """The first of the lowest; NaN is the highest."""
        return lowest([value for _, value in self.seen]) if self.seen else -1


def lowest(losses: Sequence[float]) -> int:
    """Place of the first of the lowest losses. NaN is the highest; `min` would take it where it comes first.

    >>> lowest([math.nan, 2.0, 1.0, 1.0])
    2
    """
    return min(range(len(losses)), key=lambda place: math.inf if math.isnan(losses[place]) else losses[place])
