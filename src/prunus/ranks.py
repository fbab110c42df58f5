"""One process or several: which of them writes, where they wait for each other, and whose device is whose.

`accelerate launch` starts the same command several times. Each process computes everything alike, except that training
shares each batch; files, bars and tables are the main process's.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

__all__ = ["count", "is_main", "join", "leave", "wait"]


def count() -> int:
    """The number of processes that were launched together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def join(device: torch.device) -> torch.device:
    """The device of this process, after the launched processes found each other; `device` itself for a single one.

    Raises ValueError when several processes are given one numbered GPU.
    """
    if count() == 1:
        return device
    if ":" in str(device):
        raise ValueError(f"device: {str(device)!r} is one GPU, but {count()} processes run; use device: auto")
    state = PartialState(cpu=device.type == "cpu")
    # accelerate says "cpu:0" and "cpu:1"; moving a Parameter there makes a copy that is none.
    return device if device.type == "cpu" else torch.device(str(state.device))


def wait() -> None:
    """Return when every process has come here."""
    if count() > 1:
        PartialState().wait_for_everyone()


def leave() -> None:
    """Take leave of the other processes, at the end of a command."""
    if count() > 1:
        PartialState().destroy_process_group()
