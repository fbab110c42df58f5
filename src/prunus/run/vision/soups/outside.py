"""A soup out of distribution: what it, its members, their ensemble and single runs make of corrupted images."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunus.measure import Ensemble
from prunus.run.vision import stages
from prunus.run.vision.soups.begin import Begin
from prunus.run.vision.soups.branches import Branch

__all__ = ["outside"]


def outside(begin: Begin, states: Mapping[str, Mapping[str, Tensor]], members: Sequence[Branch]) -> dict[str, Any]:
    """Name -> {"mean", "by_severity", "by_name"} over all corrupted sets, of each state and of what members give.

    The best member is that of the highest accuracy on images as they are. All networks are measured on a set before the
    next one is made or read.
    """
    asked = begin.recipe.corruptions
    assert asked is not None
    networks: dict[str, nn.Module] = {name: copy.deepcopy(begin.put(state)) for name, state in states.items()}
    singles = [copy.deepcopy(begin.put(begin.store.state(branch))) for branch in members]
    networks |= {f"member {place}": single for place, single in enumerate(singles)} | {"ensemble": Ensemble(singles)}
    whole = stages.all_corrupted(networks, begin.setting, asked)
    found = {name: {key: value for key, value in each.items() if key != "sets"} for name, each in whole.items()}
    each = [found.pop(f"member {place}") for place in range(len(members))]
    clean = [begin.store.numbers(branch)["measured"]["top1"] for branch in members]
    return found | {"mean_member": _mean(each), "best_member": each[max(range(len(each)), key=clean.__getitem__)]}


def _mean(found: Sequence[Any]) -> Any:
    """The mean of numbers at the leaves of equal mappings."""
    if not isinstance(found[0], Mapping):
        return statistics.fmean(found)
    return {key: _mean([each[key] for each in found]) for key in found[0]}
