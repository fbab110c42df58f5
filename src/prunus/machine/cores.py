"""What OpenMP's threads are told of the processor, before torch starts; nothing here imports torch.

Threads that wait for one another turn in a loop for milliseconds by default. That is fast where a core is theirs; where
it is not, they take the time of those they wait for: six retraining steps of the demo, on two cores that other programs
used besides, took 37 s with two threads, 15 s with two that turn 5,000 times at most, 10 s with one.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["bound_threads"]

_TURNS = 5000  # tenths of a millisecond: the time between two products, not that of another program's slice


def bound_threads() -> None:
    """Say in the environment that waiting threads sleep soon, and how many there are where a quota allows fewer.

    What the user set of OMP_NUM_THREADS, OMP_WAIT_POLICY and GOMP_SPINCOUNT stays. The quota is the control group's
    (a container with `--cpus=2`), which OpenMP does not look at, unlike the cores that a process may run on.

    >>> bound_threads()  # before torch is imported
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(_TURNS))
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = quota()
    if cores is not None and cores < allowed:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, int(cores))))


def quota(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float | None:
    """The cores' worth of time that the control groups of this process leave it; None without a limit.

    root: where they are mounted, version 2 or 1; own: the list of those this process is in.
    """
    lines = own.read_text().splitlines() if own.exists() else []
    group = next((line[3:].strip("/") for line in lines if line.startswith("0::")), "")
    folders = [root / group, *(root / group).parents]
    files = [folder / "cpu.max" for folder in folders if folder.is_relative_to(root)]
    limits = [file.read_text().split() for file in files if file.exists()]
    old = [root / "cpu" / f"cpu.cfs_{word}_us" for word in ("quota", "period")]
    if all(file.exists() for file in old):
        limits.append([file.read_text().strip() for file in old])
    found = [int(time) / int(period) for time, period in limits if time not in ("max", "-1")]
    return min(found, default=None)
