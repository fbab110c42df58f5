"""Branches as tasks of a Ray cluster: nothing is shared but what goes in and out, and Ray retries what dies.

A task gets its branch, the start as an object of the cluster's store, and gives the trained states back; the process
that asked writes them. So workers need no folder in common, only the images under the same path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunus.masks import Masks
from prunus.run.vision.soups.branches import Grown, State, Store
from prunus.run.vision.soups.pools import Failure
from prunus.run.vision.soups.units import Unit, grow_unit, name_of

__all__ = ["Rays"]

_RETRIES = 3  # of a task whose machine, process or training died
_AGAIN = [RuntimeError, OSError, MemoryError]


class Rays:
    """Runs units as Ray tasks. together: how many share a GPU, where the cluster has any.

    address: of a running cluster (auto finds this machine's), or "local", which starts one here and ends it.
    Raises ImportError without Ray, ConnectionError when there is no cluster at the address.
    """

    def __init__(self, store: Store, address: str, together: int) -> None:
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("members on a cluster need Ray: pip install 'prunus[ray]'") from error
        self.ray: Any = ray
        self.store, self.own = store, not ray.is_initialized()
        if self.own:
            ray.init(address=None if address == "local" else address, include_dashboard=False, log_to_driver=False)
        gpus = 1 / together if self.ray.cluster_resources().get("GPU") else 0
        options: dict[str, Any] = {"num_cpus": 1, "num_gpus": gpus, "max_retries": _RETRIES, "retry_exceptions": _AGAIN}
        self.task: Any = ray.remote(**options)(_grown)
        self.starts: dict[str, Any] = {}
        self.running: dict[Any, Unit] = {}

    def some(self, wanted: Sequence[Unit]) -> list[tuple[Unit, Failure | None]]:
        """See `Pool`; a failure is final, because Ray has tried again already."""
        begun = {name_of(unit) for unit in self.running.values()}
        for unit in wanted:
            if name_of(unit) not in begun:
                self.running[self.task.remote(unit, self._start(unit[0].start))] = unit
        ready, _ = self.ray.wait(list(self.running), num_returns=1)
        return [self._taken(reference, self.running.pop(reference)) for reference in ready]

    def close(self) -> None:
        """End the cluster, if it was started here; else its tasks."""
        if self.own:
            self.ray.shutdown()
        else:
            for reference in self.running:
                self.ray.cancel(reference, force=True)

    def _start(self, key: str) -> Any:
        if key not in self.starts:
            self.starts[key] = self.ray.put(self.store.start(key))
        return self.starts[key]

    def _taken(self, reference: Any, unit: Unit) -> tuple[Unit, Failure | None]:
        try:
            grown = self.ray.get(reference)
        except Exception as error:  # whatever the task raised, or what became of its process
            return unit, Failure(f"{type(error).__name__}: {error}", again=False)
        for branch, each in zip(unit, grown, strict=True):
            self.store.put(branch, each)
        return unit, None


def _grown(unit: Unit, start: tuple[State, Masks | None]) -> list[Grown]:
    """What a task does, on a machine of the cluster."""
    return grow_unit(unit, *start, alone=True)
