"""The averages that recipes name: how the members of a phase become one network.

    uniform   every member alike
    greedy    from best to worst, those with which the average of held-out data is no worse (Wortsman et al. 2022)
    learned   weights that gradient descent finds on held-out data
    ties      task vectors trimmed, and joined by their signs (Yadav et al. 2023)
    dare      task vectors thinned at random (Yu et al. 2024); dare_ties: joined by their signs
    slerp     two members on the sphere (Shoemake 1985)

A new one is a function (states), (states, held) or (states, base) -> state, shares, and one `__all__` entry: recipes
find it there. One that asks for `held` is refused where no data are held out; `base` is the state that members were
retrained from. Its other arguments are options. Recipes first ask it for members without a tensor, and `NOTHING` as
`held`: options that it refuses are refused before members are trained. All but those with `held` treat each tensor by
itself, so that models on disk are averaged a tensor at a time. Formulas of the last four are in `vectors`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from prunus.soup import vectors
from prunus.soup.average import State, average, check_alike, check_weights, learn_weights, mean_tensor
from prunus.soup.average import greedy as take_greedily
from prunus.train import unrecorded

__all__ = ["Held", "dare", "dare_ties", "greedy", "learned", "slerp", "ties", "uniform"]

_STATISTICS = ("running_mean", "running_var")  # of BatchNorm, which have a mean and no task

Averaged = tuple[dict[str, Tensor], tuple[float, ...]]


@dataclass(frozen=True)
class Held:
    """What held-out data say: how good a state is, higher is better, or how wrong a model is on batch number i."""

    score: Callable[[dict[str, Tensor]], float]
    model: nn.Module
    batches: Callable[[int], Any]
    loss: Callable[[nn.Module, Any], Tensor]


NOTHING = Held(lambda state: 0.0, nn.Identity(), lambda step: None, lambda model, batch: torch.zeros(()))


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


def ties(states: Sequence[State], base: State, density: float = 0.2) -> Averaged:
    """TIES: the largest of each task vector, as many as `density` says, joined by the signs that most of them have."""
    _check_density(density)
    return _joined(states, base, lambda each, start: vectors.ties(each, start, density))


def dare(states: Sequence[State], base: State, density: float = 0.5, seed: int = 0) -> Averaged:
    """DARE: each entry of a task vector stays with probability `density`, scaled up; then the mean."""
    _check_density(density)
    return _joined(states, base, lambda each, start: vectors.dare(each, start, density, _drawn(each, seed)))


def dare_ties(states: Sequence[State], base: State, density: float = 0.5, seed: int = 0) -> Averaged:
    """DARE, joined by signs as TIES does."""
    _check_density(density)
    return _joined(states, base, lambda each, start: vectors.dare_ties(each, start, density, _drawn(each, seed)))


def slerp(states: Sequence[State], t: float = 0.5) -> Averaged:
    """Two members, tensor by tensor on the sphere; t: the share of the second."""
    if len(states) != 2 or not 0 <= t <= 1:
        raise ValueError(f"slerp is of 2 members, with t in [0, 1]; got {len(states)} and {t}. Take uniform for more")
    state, _ = _joined(states, states[0], lambda each, _: vectors.slerp(each, t))
    return state, (1 - t, t)


@torch.no_grad()
def _joined(states: Sequence[State], base: State, join: Callable[[Sequence[Tensor], Tensor], Tensor]) -> Averaged:
    """The state of which `join` made each floating tensor; statistics have a plain mean, integers must agree."""
    check_alike([base, *states])
    shares = check_weights(None, len(states))
    found: dict[str, Tensor] = {}
    for name, start in base.items():
        each = [state[name] for state in states]
        if not start.is_floating_point() or name.endswith(_STATISTICS):
            found[name] = mean_tensor(name, each, shares)
        else:
            found[name] = (join(each, start) + 0.0).to(start.dtype)  # -0.0 + 0.0 is +0.0
    return found, shares


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density is the share of a task vector that is kept, in (0, 1]; got {density}")


def _drawn(tensors: Sequence[Tensor], seed: int) -> torch.Generator:
    """The same for the same tensors under any name, whatever is averaged before them: tied weights stay tied."""
    found = crc32(str(seed).encode())
    for each in tensors:
        found = crc32(each.detach().cpu().reshape(-1).view(torch.uint8).numpy().data, found)
    return torch.Generator().manual_seed(found)  # of which a CPU's generator reads 32 bits
