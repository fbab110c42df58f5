"""The averages that recipes name: how the members of a phase become one network.

    uniform   every member alike
    greedy    from best to worst, those with which the average of held-out data is no worse (Wortsman et al. 2022)
    learned   weights that gradient descent finds on held-out data

A new one is a function (states) or (states, held) -> state, shares, and one `__all__` entry: recipes find it there. One
that asks for `held` is refused where no data are held out. Its other arguments are options.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prunus.soup.average import State, average, check_weights, learn_weights
from prunus.soup.average import greedy as take_greedily
from prunus.train import unrecorded

__all__ = ["Held", "greedy", "learned", "uniform"]

Averaged = tuple[dict[str, Tensor], tuple[float, ...]]


@dataclass(frozen=True)
class Held:
    """What held-out data say: how good a state is, higher is better, or how wrong a model is on batch number i."""

    score: Callable[[dict[str, Tensor]], float]
    model: nn.Module
    batches: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]


def uniform(states: Sequence[State]) -> Averaged:
    """The mean of the members.

    >>> uniform([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])
    ({'w': tensor([2.])}, (0.5, 0.5))
    """
    return average(states), check_weights(None, len(states))


def greedy(states: Sequence[State], held: Held) -> Averaged:
    """The mean of those members that held-out data welcome, as `soup.greedy` takes them."""
    chosen, state = take_greedily(states, held.score)
    taken = [place in chosen.members for place in range(len(states))]
    return state, tuple(each / len(chosen.members) for each in taken)


def learned(states: Sequence[State], held: Held, steps: int = 50, lr: float = 0.1) -> Averaged:
    """The mean with weights learned on held-out data, BatchNorm using each batch's own statistics."""
    held.model.train()
    with unrecorded():
        shares = learn_weights(states, held.model, held.batches, held.loss, steps=steps, lr=lr)
    return average(states, shares), tuple(shares)
