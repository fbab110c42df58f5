"""Sparse model soups: prune once, retrain copies of the pruned network apart, average them, and again.

    theta_(j-1) ─ prune ─▶ mask_j ─┬─ retrain member 1 ─┐
                                   ├─ ...               ├─ average ─▶ theta_j
                                   └─ retrain member m ─┘

Members share their zeros because they were pruned once, together. `sms` is the loop, whatever is pruned: networks, or
jobs that will make them (as recipes do). `sms_` is the same for a network in place.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor, nn

from prunus.machine import checksum, read_tensors, seed_of, write_tensors
from prunus.masks import Masks, unwrapped
from prunus.soup.average import average
from prunus.soup.imp import CHANGED, Phase, check_nested, distance, phase_sparsities
from prunus.train import seeded

if TYPE_CHECKING:
    from prunus.soup.imp import Select

State = dict[str, Tensor]
P = TypeVar("P")
T = TypeVar("T")
S = TypeVar("S")
Map = Callable[[Callable[[int], Any], Iterable[int]], Iterable[Any]]


@dataclass(frozen=True)
class Souped(Generic[P, T, S]):
    """One phase of a soup: what was pruned, the members retrained from it, and their average."""

    pruned: P
    members: tuple[T, ...]
    average: S


def sms(
    start: S,
    *,
    phases: int,
    members: int,
    prune: Callable[[S, int, P | None], P],
    retrain: Callable[[P, int, int], T],
    average: Callable[[P, tuple[T, ...]], S],
    map: Map = map,
) -> list[Souped[P, T, S]]:
    """The phases of a soup: prune, retrain `members` times from there, average, and go on with the average.

    prune: (what is averaged, phase from 0, what was pruned in the phase before or None). retrain: (what is pruned,
    phase, member from 0). average: (what is pruned, its members). map: how the members of a phase are run, such as
    that of an executor of `concurrent.futures`.

    Source: Zimmer, Spiegel & Pokutta 2024, algorithm 1. One member is iterative pruning.
    Raises ValueError for phases or members < 1.

    >>> mean = lambda pruned, members: sum(members) / len(members)
    >>> halve, nudge = lambda x, phase, before: x / 2, lambda x, phase, member: x + member
    >>> [each.average for each in sms(8.0, phases=2, members=3, prune=halve, retrain=nudge, average=mean)]
    [5.0, 3.5]
    """
    if members < 1 or phases < 1:
        raise ValueError(f"a soup needs at least one member and one phase; got {members=}, {phases=}")
    done: list[Souped[P, T, S]] = []
    state, pruned = start, None
    for phase in range(phases):
        pruned = prune(state, phase, pruned)
        each = tuple(map(partial(retrain, pruned, phase), range(members)))
        state = average(pruned, each)
        done.append(Souped(pruned, each, state))
    return done


def uniform(states: Sequence[State], masks: Masks) -> State:
    """The mean of members that share these masks, which is asserted.

    >>> uniform([{"w": torch.tensor([0.0, 1.0])}], Masks({"w": torch.tensor([False, True])}))
    {'w': tensor([0., 1.])}
    """
    return average(states, masks=[masks] * len(states))


def sms_(
    model: nn.Module,
    *,
    sparsity: float,
    phases: int,
    members: int,
    select: Select,
    retrain: Callable[[nn.Module, Phase, int], object],
    mix: Callable[[Sequence[State], Masks], State] = uniform,
    settle: Callable[[nn.Module], object] | None = None,
    on_soup: Callable[[Phase, Sequence[State]], None] | None = None,
    seed: int = 0,
    folder: Path | None = None,
    map: Map = map,
) -> Masks:
    """Prune, retrain `members` copies and average them in place, `phases` times; the masks of the last phase.

    select: as `imp` takes it. retrain: (a copy of the pruned model, phase, member from 0) trains the copy in place
    under `phase.masks`. mix: (states, masks) -> state, such as `uniform`, or `greedy` with a score. settle: mends the
    averaged model in place, as `recalibrate_` does where there is BatchNorm. on_soup: is shown every phase's members
    when their average is in the model. seed: of torch's generators while a member is retrained, which begin at another
    place for each; they are as before afterwards. folder: keeps finished members; a killed call that is repeated with
    the same weights trains only the others, and ends as the unbroken one. map: as in `sms`; generators are the
    process's, so members in threads must draw from their own.

    Raises ValueError for members or phases < 1, a sparsity outside [0, 1), masks that give pruned weights back, members
    that are not zero under their mask, and a folder of another soup.

    >>> layer = nn.Linear(4, 2)
    >>> select = lambda model, s, within: prune(model, sparsity=s, within=within)
    >>> sms_(layer, sparsity=0.75, phases=2, members=3, select=select, retrain=lambda copy, phase, member: None)
    Masks(1 parameter, sparsity 0.7500)
    """
    targets = phase_sparsities(sparsity, phases)
    asked = {"sparsity": sparsity, "phases": phases, "members": members, "seed": seed}
    inner = unwrapped(model)  # whose names states and masks bear
    start = {} if folder is None else {"weights": checksum(inner.state_dict())}

    def pruned(_: nn.Module, index: int, before: Phase | None) -> Phase:
        weights = {name: parameter.detach().clone() for name, parameter in inner.named_parameters()}
        within = None if before is None else before.masks
        masks = select(model, targets[index], within)
        check_nested(masks, within)
        masks.apply_(model)
        return Phase(index, phases, targets[index], masks, distance(weights, masks, within))

    def member(phase: Phase, index: int, place: int) -> State:
        path = None if folder is None else Path(folder) / f"phase-{index + 1}-member-{place + 1}.safetensors"
        job = "" if path is None else json.dumps({**asked, **start, "masks": checksum(phase.masks)})
        if path is not None and path.exists():
            return _finished(path, job, inner)
        own = copy.deepcopy(model)
        with seeded(seed_of(seed, members * index + place), next(own.parameters()).device):
            retrain(own, phase, place)
        phase.masks.check(own)
        state = {name: value.detach() for name, value in unwrapped(own).state_dict().items()}
        if path is not None:
            write_tensors(path, state, {"job": job})
        return state

    def averaged(phase: Phase, states: tuple[State, ...]) -> nn.Module:
        inner.load_state_dict(mix(states, phase.masks))
        phase.masks.check(model)
        if settle is not None:
            settle(model)
        if on_soup is not None:
            on_soup(phase, states)
        return model

    done = sms(model, phases=phases, members=members, prune=pruned, retrain=member, average=averaged, map=map)
    return done[-1].pruned.masks


def _finished(path: Path, job: str, model: nn.Module) -> State:
    """A finished member, where the model is: an average made elsewhere has other last bits."""
    state, said = read_tensors(path)
    if (found := said.get("job")) != job:
        raise ValueError(f"{path} is a member of another soup, {found}; this one is {job}: delete it. {CHANGED}")
    return {name: state[name].to(value.device) for name, value in model.state_dict().items()}
