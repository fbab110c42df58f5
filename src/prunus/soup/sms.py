"""Sparse model soups: prune once, retrain copies of the pruned network apart, average them, and again.

    theta_(j-1) ─ prune ─▶ mask_j ─┬─ retrain member 1 ─┐
                                   ├─ ...               ├─ average ─▶ theta_j
                                   └─ retrain member m ─┘

Members share their zeros because they were pruned once, together. This is `retrain.imp` whose retraining is a soup, so
sparsities, masks and the folder of finished phases are those of `imp`. How states are averaged is in `soup`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from prunus.machine import write_tensors
from prunus.masks import Masks
from prunus.soup.average import average
from prunus.soup.imp import Phase, imp
from prunus.train import Trace

if TYPE_CHECKING:
    from prunus.soup.imp import Select

__all__ = ["sms", "uniform"]

State = dict[str, Tensor]


def uniform(states: Sequence[State], masks: Masks) -> State:
    """The mean of members that share these masks, which is asserted.

    >>> uniform([{"w": torch.tensor([0.0, 1.0])}], Masks({"w": torch.tensor([False, True])}))
    {'w': tensor([0., 1.])}
    """
    return average(states, masks=[masks] * len(states))


def sms(
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
) -> Masks:
    """Prune, retrain `members` copies and average them in place, `phases` times; the masks of the last phase.

    select: as `imp` takes it. retrain: (a copy of the pruned model, phase, member from 0) trains the copy in place
    under `phase.masks`. mix: (states, masks) -> state, such as `uniform`, or `soup.greedy` with a score. settle: mends
    the averaged model in place, as `recalibrate_` does where there is BatchNorm. on_soup: is shown every phase's
    members when their average is in the model. seed: of torch's generators while a member is retrained; they are as
    before afterwards. folder: keeps finished members and phases; a killed call that is repeated goes on from there.

    Source: Zimmer, Spiegel & Pokutta 2024, algorithm 1. One member is `imp`.
    Raises ValueError for members < 1, members that are not zero under their mask, and as `imp`.

    >>> layer = nn.Linear(4, 2)
    >>> select = lambda model, s, within: prune(model, sparsity=s, within=within)
    >>> sms(layer, sparsity=0.75, phases=2, members=3, select=select, retrain=lambda copy, phase, member: None)
    Masks(1 parameters, sparsity 0.7500)
    """
    if members < 1:
        raise ValueError(f"a soup needs at least one member; got {members}")

    def soup(phase: Phase) -> Trace:
        states = [
            _member(model, phase, place, retrain, seed + members * phase.index + place, folder)
            for place in range(members)
        ]
        model.load_state_dict(mix(states, phase.masks))
        phase.masks.check(model)
        if settle is not None:
            settle(model)
        if on_soup is not None:
            on_soup(phase, states)
        return Trace()

    return imp(model, sparsity=sparsity, phases=phases, select=select, retrain=soup, folder=folder)


def _member(
    model: nn.Module,
    phase: Phase,
    place: int,
    retrain: Callable[[nn.Module, Phase, int], object],
    seed: int,
    folder: Path | None,
) -> State:
    """The state of one member, from its file if it is finished there."""
    path = None if folder is None else Path(folder) / f"phase-{phase.index + 1}-member-{place + 1}.safetensors"
    if path is not None and path.exists():
        return load_file(path)
    own = copy.deepcopy(model)
    device = next(own.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        retrain(own, phase, place)
    phase.masks.check(own)
    state = {name: value.detach() for name, value in own.state_dict().items()}
    if path is not None:
        write_tensors(path, state)
    return state
