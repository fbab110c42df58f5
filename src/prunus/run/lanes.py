"""What threads and processes that train beside each other need: a CUDA stream, a GPU, and an end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

__all__ = ["begin_worker", "own_stream"]


def own_stream() -> AbstractContextManager[Any]:
    """Context in which a thread works on a CUDA stream of its own; without a GPU it does nothing.

    >>> with own_stream():
    ...     train(model, batches, optimizer, lr, steps=10)
    """
    return torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else nullcontext()


def begin_worker(place: int, workers: int) -> None:
    """Called once in a worker process, before it touches a GPU: the machine's GPUs are dealt to workers in turn."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    os.environ["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed run must not go on in its workers: the next call would do the same work beside them."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
