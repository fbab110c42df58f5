"""Loading, computing and writing at once: the next block is brought while this one is worked on, finished ones follow.

    bring        block 1 | block 2 | block 3 |            a thread, its own stream, pinned memory
    compute                block 1 | block 2 | block 3
    behind                           save 1, release 1 | save 2, ...      a thread, its own stream

The whole takes about as long as the slowest of the three, and holds three blocks at most. What is computed, and in
which order, does not change, so neither do the bits. An error of a thread is raised again in the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from typing import Protocol

import torch
from torch import nn

__all__ = ["Ahead", "ahead"]

log = logging.getLogger(__name__)


class _Source(Protocol):
    """What `sources.Source` promises."""

    def load(self, name: str, device: torch.device) -> nn.Module: ...
    def release(self, name: str) -> None: ...
    def outside(self, device: torch.device) -> AbstractContextManager[None]: ...


@contextmanager
def ahead(source: _Source, names: Sequence[str], device: torch.device) -> Generator[Ahead]:
    """A source that brings the blocks `names`, asked for in this order, before they are needed, and frees them later.

    On leaving, whatever was begun is finished and every block is released; an error of the background is raised then,
    unless another one is under way.

    >>> with ahead(Memory(model), names, device) as source:
    ...     block = source.load(names[0], device)
    """
    found = Ahead(source, names, device)
    try:
        yield found
    except BaseException:
        found.close(quietly=True)
        raise
    found.close(quietly=False)


class Ahead:
    """A source in front of another one; `ahead` makes and closes it."""

    def __init__(self, source: _Source, names: Sequence[str], device: torch.device) -> None:
        self.source, self.device = source, device
        self._next = dict(pairwise(names))
        self._brings = ThreadPoolExecutor(1, thread_name_prefix="bring")
        self._follows = ThreadPoolExecutor(1, thread_name_prefix="behind")
        self._coming: tuple[str, Future[nn.Module]] | None = None
        self._behind: list[Future[None]] = []
        self._streams = _streams(device)

    def load(self, name: str, device: torch.device) -> nn.Module:
        """The block on `device`; the one after it is on its way when this returns."""
        block = self._take(name) or self.source.load(name, device)
        self._settle(most=1)  # the block before this one may still be on its way
        following = self._next.get(name)
        if following is not None and not self._shares(name, following):
            self._coming = following, self._brings.submit(self._bring, following)
        return block

    def release(self, name: str, after: Callable[[], None] | None = None) -> None:
        """Free the block while the next one is worked on; first do `after`, which reads its tensors."""

        def task() -> None:
            if after is not None:
                after()
            self.source.release(name)

        self._follow(task)

    @contextmanager
    def outside(self, device: torch.device) -> Generator[None]:
        """As the source's own, when nothing is in the background any more."""
        self._settle(most=0)
        with self.source.outside(device):
            yield

    def close(self, *, quietly: bool) -> None:
        """Finish everything; raise the first error, or only log it."""
        try:
            if self._coming is not None:
                name, future = self._coming
                self._coming = None
                if future.exception() is None:
                    self._follow(lambda: self.source.release(name))
            self._settle(most=0)
        except BaseException as error:
            if not quietly:
                raise
            log.warning("While another error ended the work, so did this in the background: %r", error)
        finally:
            self._brings.shutdown()
            self._follows.shutdown()

    def _take(self, name: str) -> nn.Module | None:
        """The block that was brought, fit for use on this thread's stream; None for any other."""
        if self._coming is None or self._coming[0] != name:
            return None
        future, self._coming = self._coming[1], None
        block = future.result()
        if self._streams is not None:
            here = torch.cuda.current_stream(self.device)
            here.wait_stream(self._streams[0])
            for tensor in (*block.parameters(), *block.buffers()):
                if tensor.is_cuda:
                    tensor.data.record_stream(here)  # its memory must not serve another block before this one is done
        return block

    def _bring(self, name: str) -> nn.Module:
        with self._on(0):
            return self.source.load(name, self.device)

    def _follow(self, task: Callable[[], None]) -> None:
        done = None if self._streams is None else torch.cuda.current_stream(self.device).record_event()

        def run() -> None:
            with self._on(1) as stream:
                if stream is not None and done is not None:
                    stream.wait_event(done)
                task()
                if stream is not None:
                    stream.synchronize()  # what was copied may be written, and what was read may be freed

        self._behind.append(self._follows.submit(run))

    def _settle(self, *, most: int) -> None:
        """Wait until at most so many tasks are left behind; raise the error of any that is done."""
        while len(self._behind) > most:
            self._behind.pop(0).result()

    def _shares(self, name: str, other: str) -> bool:
        """Whether two blocks are one module or share parameters: the second must not move before the first is done."""
        model = getattr(self.source, "model", None)
        if not isinstance(model, nn.Module):
            return False
        one, two = model.get_submodule(name), model.get_submodule(other)
        return one is two or bool({id(each) for each in one.parameters()} & {id(each) for each in two.parameters()})

    @contextmanager
    def _on(self, which: int) -> Generator[torch.cuda.Stream | None]:
        """No gradients, and on CUDA the stream of one of the two threads."""
        with torch.no_grad(), ExitStack() as stack:
            stream = None if self._streams is None else self._streams[which]
            if stream is not None:
                stack.enter_context(torch.cuda.device(self.device))
                stack.enter_context(torch.cuda.stream(stream))
            yield stream


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
