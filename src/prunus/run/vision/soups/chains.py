"""The chains of a soup: the soup itself, and what it is compared with, each as a generator of the trainings it needs.

    soup       prune ─▶ m members ─▶ average, phase by phase       imp, longer    the same with one member
    reprune    m runs of imp ─▶ average ─▶ prune again             dense_soup     m dense copies ─▶ average ─▶ prune

Nothing here trains: a chain yields branches, and reads them from the store when it is resumed (see `follow`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from prunus.masks import Masks
from prunus.run.names import criteria
from prunus.run.recipe import digest, said
from prunus.run.vision import stages
from prunus.run.vision.experiment import budgets
from prunus.run.vision.soups.begin import Begin
from prunus.run.vision.soups.branches import Branch, Rates, Rest, plain_state
from prunus.run.vision.soups.follow import Chain, abreast
from prunus.run.vision.soups.mixing import Mixed, Mixer
from prunus.run.vision.soups.recipe import member_of, order_of
from prunus.soup import Distance, average, average_and_reprune, distance, phase_sparsities

__all__ = ["Cooked", "Phase", "dense_soup", "reprune", "souped"]

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Phase:
    """One phase of a chain: its masks, members, their average, and ALLR's first signal."""

    sparsity: float
    masks: Masks
    distance: float
    branches: tuple[Branch, ...]
    mixed: Mixed


@dataclass(frozen=True)
class Cooked:
    """What a chain ends with: weights, masks, the phases that led there, and every training that it took."""

    state: State
    masks: Masks
    phases: tuple[Phase, ...]
    branches: tuple[Branch, ...] = field(default=())

    @property
    def steps(self) -> int:
        """Training steps after the dense training, each training once."""
        own = {branch.key: branch.steps for branch in (*self.branches, *self.members)}
        return sum(own.values())

    @property
    def members(self) -> tuple[Branch, ...]:
        """The members of all phases."""
        return tuple(branch for phase in self.phases for branch in phase.branches)


def souped(
    begin: Begin, places: Sequence[int | None], mix: Mixer, *, slower: int = 1, swa: float | None = None
) -> Chain[Cooked]:
    """The loop. places: the members of each phase; [None] is one run as the recipe itself says it, which is imp.

    slower: how many times as long each retraining lasts. swa: as `Branch` takes it, in the last phase. What a method
    pruned is not pruned again: one phase, under its masks.
    """
    asked = begin.recipe.prune
    assert asked is not None
    state, key, masks, phases = begin.state, begin.key, None, list[Phase]()
    for index, target in enumerate(phase_sparsities(asked.sparsity, asked.phases)):
        if begin.masks is None:
            start, _, chosen, lost = _prune(begin, state, key, target, masks, index)
        else:
            start, chosen, lost = key, begin.masks, 0.0
        last = index + 1 == asked.phases
        branches = [
            _branch(begin, place, start, index, lost, slower=slower, swa=swa if last else None) for place in places
        ]
        yield branches
        mixed = mix(begin.store, branches, chosen)
        state, masks, key = mixed.state, chosen, digest([mixed.how, *(branch.key for branch in branches)])
        phases.append(Phase(target, chosen, lost, tuple(branches), mixed))
    assert masks is not None
    return Cooked(state, masks, tuple(phases))


def reprune(begin: Begin, one: Mixer) -> Chain[Cooked]:
    """As many runs of imp as members, their average, pruned again: IMP-RePrune of the paper.

    In one phase all masks are equal and this is the uniform soup.
    """
    runs = yield from abreast([souped(begin, [place], one) for place in range(begin.recipe.soup.members)])
    masks = [run.masks for run in runs]
    state, again = average_and_reprune(
        [dict(run.state) for run in runs], masks, select=lambda mean, _: _select(begin, mean)
    )
    branches = tuple(branch for run in runs for branch in run.members)
    return Cooked(begin.settled(state), again, (), branches)


def dense_soup(begin: Begin, one: Mixer) -> Chain[tuple[State, Cooked, Cooked]]:
    """An average of dense members; pruned in one shot; and that retrained once, as a member of the soup is.

    Each dense member is trained on, without masks, for as long as a member of the soup is in all phases together.
    """
    asked = begin.recipe.prune
    assert asked is not None
    key = digest(["dense", begin.key])[:24]
    begin.store.put_start(key, begin.state, None)
    members = [_branch(begin, place, key, 0, 0.0, whole=True) for place in range(begin.recipe.soup.members)]
    yield members
    mean = begin.settled(average([begin.store.state(branch) for branch in members]))
    start, pruned, masks, lost = _prune(
        begin, mean, digest([branch.key for branch in members]), asked.sparsity, None, 0
    )
    shot = Cooked(pruned, masks, (), tuple(members))
    branch = _branch(begin, None, start, asked.phases - 1, lost)
    yield [branch]
    mixed = one(begin.store, [branch], masks)
    return mean, shot, Cooked(mixed.state, masks, (), (*members, branch))


def _prune(
    begin: Begin, state: State, key: str, target: float, within: Masks | None, index: int
) -> tuple[str, State, Masks, float]:
    """Key of the pruned network, its weights and masks, and what pruning took away.

    It is stored: every baseline, and every soup of the grid that begins alike, needs it as well.
    """
    asked = begin.recipe.prune
    assert asked is not None
    seed = begin.recipe.seed + 7919 * index  # as `experiment` draws them
    how = said(asked, but={"sparsity", "phases"})
    last = target == asked.sparsity
    whole = [
        key,
        how,
        target,
        last and begin.recipe.recalibrate,
        seed if "seed" in criteria.takes(asked.criterion) else None,
    ]
    start = digest(whole)[:24]

    def choose() -> tuple[State, Masks]:
        model = begin.put(state)
        masks = stages.select(model, target, within, asked, seed, setting=begin.setting)
        # The last phase begins with settled statistics, as that of `experiment` does, which measures them.
        pruned = begin.settled(plain_state(model)) if last else plain_state(model)
        return pruned, Masks({name: mask.cpu() for name, mask in masks.items()})

    pruned, masks = begin.store.once(start, choose)
    device = begin.setting.device
    masks = Masks({name: mask.to(device) for name, mask in masks.items()})
    lost = distance({name: state[name].to(device) for name in masks}, masks, within)
    return start, pruned, masks, lost


def _branch(
    begin: Begin,
    place: int | None,
    start: str,
    index: int,
    lost: float,
    *,
    slower: int = 1,
    whole: bool = False,
    swa: float | None = None,
) -> Branch:
    """The retraining of a member in a phase; whole: as long as in all phases together."""
    own = member_of(begin.recipe, place)
    asked, prune = own.retrain, own.prune
    assert prune is not None
    if asked is None:  # members do the rest of the training
        steps, rest = slower * (begin.original.steps - begin.steps), Rest(begin.steps, slower)
        return Branch(own, start, 1, steps, own.train.lr, rest, order_of(begin.recipe, place), swa)
    each = budgets(asked, prune.phases, begin.original.steps, begin.setting.epoch_steps)
    steps = slower * (sum(each) if whole else each[index])
    signals = Distance(lost, min(1.0, steps / begin.original.steps))
    rates = Rates(asked.schedule, begin.original, steps, signals.distance, signals.share, asked.warmup)
    peak = asked.lr or begin.original.peak
    return Branch(own, start, index + 1, steps, peak, rates, order_of(begin.recipe, place), swa)


@torch.no_grad()
def _select(begin: Begin, mean: Mapping[str, Tensor]) -> Masks:
    """Masks as the recipe chooses them, of an average of which only the prunable tensors are given."""
    asked = begin.recipe.prune
    assert asked is not None
    parameters = dict(begin.model.named_parameters())
    for name, value in mean.items():
        parameters[name].copy_(value)
    masks = stages.select(begin.model, asked.sparsity, None, asked, begin.recipe.seed, setting=begin.setting)
    return Masks({name: mask.cpu() for name, mask in masks.items()})
