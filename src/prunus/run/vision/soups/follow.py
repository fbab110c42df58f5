"""Chains of trainings followed side by side: what each wants next is trained as soon as there is room for it.

A chain is a generator that yields the branches it needs, and is resumed when they are in the store.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar

from prunus.run.vision.soups.branches import Branch, Store
from prunus.run.vision.soups.pools import Failure, Pool
from prunus.run.vision.soups.units import Unit, name_of

__all__ = ["Chain", "abreast", "follow"]

log = logging.getLogger(__name__)
Result = TypeVar("Result")
Chain = Generator[Sequence[Branch], None, Result]


def follow(
    chains: Mapping[str, Chain[Any]],
    store: Store,
    pool: Pool,
    *,
    retries: int = 0,
    units: Callable[[Sequence[Branch]], Sequence[Unit]] = lambda branches: [(branch,) for branch in branches],
    on_done: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """What each chain returns, when all have ended. units: how what is wanted now is bundled.

    A unit that dies is tried again `retries` times; a chain that needs one that failed for good is given up when all
    else that it wanted is there.
    Raises RuntimeError at the end, after all others ended, when a chain was given up.
    """
    results: dict[str, Any] = {}
    wanted: dict[str, Sequence[Branch]] = {name: [] for name in chains}
    tried: dict[str, int] = {}
    lost: dict[str, Failure] = {}
    while True:
        for name in list(wanted):
            _advance(name, chains[name], wanted, results, store)
        for name in [name for name, branches in wanted.items() if _given_up(branches, lost, store)]:
            del wanted[name]
        if not wanted:
            break
        missing = {b.key: b for each in wanted.values() for b in each if b.key not in lost and not store.finished(b)}
        if not missing:  # another thread or process has just finished the last of them
            continue
        for unit, failure in pool.some(units(list(missing.values()))):
            if failure is None:
                on_done(len(unit))
                continue
            tried[name_of(unit)] = tried.get(name_of(unit), 0) + 1
            again = failure.again and tried[name_of(unit)] <= retries
            log.warning("a member died%s: %s", ", and is tried again" if again else "", failure.text)
            if not again:
                lost |= {branch.key: failure for branch in unit}
    if lost:
        raise RuntimeError(f"{len(lost)} members failed; the first: {next(iter(lost.values())).text}")
    return results


def abreast(chains: Sequence[Chain[Result]]) -> Chain[list[Result]]:
    """Several chains as one, which wants what they want: for chains with steps of one length."""
    results: dict[int, Result] = {}
    while len(results) < len(chains):
        wanted: list[Branch] = []
        for place, chain in enumerate(chains):
            if place not in results:
                try:
                    wanted += next(chain)
                except StopIteration as end:
                    results[place] = end.value
        if wanted:
            yield wanted
    return [results[place] for place in range(len(chains))]


def _given_up(branches: Sequence[Branch], lost: Mapping[str, Failure], store: Store) -> bool:
    failed = [branch for branch in branches if branch.key in lost]
    return bool(failed) and all(store.finished(branch) for branch in branches if branch not in failed)


def _advance(
    name: str, chain: Chain[Any], wanted: dict[str, Sequence[Branch]], results: dict[str, Any], store: Store
) -> None:
    """Resume a chain for as long as all that it wants is there."""
    try:
        while all(store.finished(branch) for branch in wanted[name]):
            wanted[name] = next(chain)
    except StopIteration as end:
        results[name] = end.value
        del wanted[name]
