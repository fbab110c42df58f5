"""What is made of a soup when all its jobs are done: its network, a row for each run, the geometry of its members."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import nn

from prunus.masks import Masks
from prunus.run.store import Store
from prunus.run.vision.soups.averaging import Meter
from prunus.run.vision.soups.geometry import Geometry, geometry
from prunus.run.vision.soups.plan import Plan
from prunus.run.vision.soups.rows import Rows

__all__ = ["SoupOutcome", "outcome"]


@dataclass(frozen=True)
class SoupOutcome:
    """A finished soup: the network, its masks, its numbers, and what lies between its members."""

    model: nn.Module
    masks: Masks
    result: dict[str, Any]
    geometry: Geometry | None


def outcome(plan: Plan, store: Store, *, picture: bool = True) -> SoupOutcome:
    """Measured, from a store in which all of the plan's jobs are finished. picture: the plane of three, too.

    Its seconds are those of measuring and of all trainings but the one that everything begins with.
    """
    started = time.perf_counter()
    meter = Meter.of(plan.recipe)
    rows = Rows(plan, store, meter)
    result, found = rows.result(), None
    members = [store.state(job) for job in rows.last.members]
    if len(members) > 1:
        found = geometry(meter, members, list(rows.masks), picture=picture)
        result["between"] = found.numbers()
    trained = sum(store.result(job)["seconds"] for job in plan.jobs if job.room == "trainings")
    result["seconds"] = trained + time.perf_counter() - started
    return SoupOutcome(meter.put(store.state(rows.soup.state)), rows.masks, result, found)
