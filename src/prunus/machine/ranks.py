"""One process or several: which of them writes, where they wait for each other, and whose device is whose.

`accelerate launch` starts the same command several times. Each process computes everything alike, except that training
and calibration share their data; files, bars and tables are the main process's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from accelerate import PartialState


_BUCKET = 1 << 23  # values that are sent at once: a network's rate needs as many, and small tensors share a message


def count() -> int:
    """The number of processes that were launched together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def index() -> int:
    """Which of them this process is, from 0."""
    return int(os.environ.get("RANK", "0"))


def share(items: int) -> slice:
    """This process's part of so many items: as equal as can be, in order.

    >>> share(7)  # a single process
    slice(0, 7, None)
    """
    world, rank = count(), index()
    return slice(rank * items // world, (rank + 1) * items // world)


def is_main() -> bool:
    """Whether this process is the one that writes."""
    return index() == 0


def join(device: torch.device) -> torch.device:
    """The device of this process, after the launched processes found each other; `device` itself for a single one.

    Raises ValueError when several processes are given one numbered GPU.
    """
    if count() == 1:
        return device
    if ":" in str(device):
        raise ValueError(f"device: {str(device)!r} is one GPU, but {count()} processes run; use device: auto")
    state = _state(cpu=device.type == "cpu")
    # accelerate says "cpu:0" and "cpu:1"; moving a Parameter there makes a copy that is none.
    return device if device.type == "cpu" else torch.device(str(state.device))


def wait() -> None:
    """Return when every process has come here."""
    if count() > 1:
        _state().wait_for_everyone()


def sum_(tensor: Tensor) -> None:
    """The sum over all processes, in place of each one's own contiguous tensor; the same bits everywhere."""
    if count() > 1:
        dist.all_reduce(tensor)


def mean_(tensors: Iterable[Tensor]) -> None:
    """The mean over all processes, in place of each one's own tensors; the same bits everywhere.

    Nothing waits on the host, so that a recorded step may do it. Tensors and their order are the same everywhere.

    >>> mean_([torch.ones(2)])  # a single process
    """
    world = count()
    for bucket in _buckets(tensors) if world > 1 else ():
        if len(bucket) == 1 and bucket[0].is_contiguous():  # a large one is not copied
            dist.all_reduce(bucket[0].div_(world))
            continue
        flat = torch.cat([each.flatten() for each in bucket]).div_(world)
        dist.all_reduce(flat)
        means = flat.split([each.numel() for each in bucket])
        for tensor, mean in zip(bucket, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype that follow each other, as many as fit."""
    bucket, values = list[Tensor](), 0
    for tensor in tensors:
        if bucket and (values + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, values = [], 0
        bucket.append(tensor)
        values += tensor.numel()
    if bucket:
        yield bucket


def send_(tensor: Tensor, sender: int) -> None:
    """The contiguous tensor of process `sender`, in place of everyone else's."""
    if count() > 1:
        dist.broadcast(tensor.view(torch.uint8) if tensor.ndim else tensor, sender)  # bytes: any dtype, any backend


def agree(value: Any) -> Any:
    """The main process's value, anything that can be pickled."""
    if count() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, 0)
    return held[0]


def first_said(text: str) -> str:
    """What the first of the processes says that says anything; each calls this.

    >>> first_said("out of memory")  # a single process
    'out of memory'
    """
    if count() == 1:
        return text
    held: list[Any] = [None] * count()
    dist.all_gather_object(held, text)
    return next((each for each in held if each), "")


def all_failed(seconds: float = 60.0) -> bool:
    """Whether all processes say that they failed, each by this call; waits so long for the others.

    Asks the launcher's store, because a process that did not fail waits in a collective operation. Where the answer is
    False, no collective operation can follow: raise, and the launcher ends the others.

    >>> all_failed()  # a single process
    True
    """
    if count() == 1:
        return True
    store, key = dist.distributed_c10d._get_default_store(), "prunus/failed"
    said = store.add(key, 1)
    needed = -(-said // count()) * count()  # of this failure and of those before, which all had
    end = time.monotonic() + seconds
    while store.add(key, 0) < needed:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def leave() -> None:
    """Take leave of the other processes, at the end of a command."""
    if count() > 1:
        _state().destroy_process_group()


def _state(**options: Any) -> PartialState:
    """accelerate's, which takes long to import, and which one process does not need."""
    from accelerate import PartialState

    return PartialState(**options)
