"""A soup out of distribution: what it, its members, their ensemble and single runs make of corrupted images."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from prunus.measure import Ensemble
from prunus.run.store import Job, Store
from prunus.run.vision import stages
from prunus.run.vision.jobs import measured_of
from prunus.run.vision.soups.averaging import Meter

__all__ = ["corrupted"]


def corrupted(
    meter: Meter, store: Store, states: Mapping[str, Mapping[str, Tensor]], members: Sequence[Job]
) -> dict[str, Any]:
    """Name -> {"mean", "by_severity", "by_name"} over all corrupted sets, of each state and of what members give.

    The best member is that of the highest accuracy on images as they are. All networks are measured on a set before the
    next one is made or read.
    """
    asked = meter.setting.recipe.corruptions
    assert asked is not None
    networks: dict[str, nn.Module] = {name: copy.deepcopy(meter.put(state)) for name, state in states.items()}
    singles = [copy.deepcopy(meter.put(store.state(member))) for member in members]
    networks |= {f"member {place}": single for place, single in enumerate(singles)} | {"ensemble": Ensemble(singles)}
    whole = stages.all_corrupted(networks, meter.setting, asked)
    found = {name: {key: value for key, value in each.items() if key != "sets"} for name, each in whole.items()}
    each = [found.pop(f"member {place}") for place in range(len(members))]
    clean = [measured_of(store.result(member))["top1"] for member in members]
    return found | {"mean_member": _mean(each), "best_member": each[max(range(len(each)), key=clean.__getitem__)]}


def _mean(found: Sequence[Any]) -> Any:
    """The mean of numbers at the leaves of equal mappings."""
    if not isinstance(found[0], Mapping):
        return statistics.fmean(found)
    return {key: _mean([each[key] for each in found]) for key in found[0]}
