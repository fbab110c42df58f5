"""Where a block's weights come from, and how the next block is brought while this one is worked on.

A source brings one block to the device and frees it again; it knows nothing of pruning: the model itself in memory
(`Memory`), or the checkpoint of a model built on meta (`Shards`). `ahead` puts threads in front of one:

    bring        block 1 | block 2 | block 3 |            a thread, its own stream, pinned memory
    compute                block 1 | block 2 | block 3
    behind                           save 1, release 1 | save 2, ...      a thread, its own stream

The whole takes about as long as the slowest of the three, and holds three blocks at most. What is computed, and in
which order, does not change, so neither do the bits. An error of a thread is raised again in the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from prunus.checkpoint import Checkpoint, Layout, check_causal, check_finite, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Ahead", "Memory", "Shards", "ahead", "carried"]

log = logging.getLogger(__name__)


class Memory:
    """A model whose weights are all in memory; blocks travel to the device and back into the same memory."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.home = next(model.parameters()).device
        self._homes: dict[str, dict[str, Tensor]] = {}  # block -> key -> where a tensor that travelled came from

    def load(self, name: str, device: torch.device) -> nn.Module:
        """The named submodule, moved to `device`."""
        block = self.model.get_submodule(name)
        away = {key: each for key, each in _tensors(block) if not _is_on(each.device, device)}
        self._homes[name] = {key: each.data for key, each in away.items()}
        for each in away.values():
            each.data = carried(each.data, device)
        return block

    def release(self, name: str) -> None:
        """Move the submodule back to where the model lives."""
        homes = self._homes.pop(name, {})
        for key, each in _tensors(self.model.get_submodule(name)):
            if key in homes and homes[key].shape == each.shape and homes[key].dtype == each.dtype:
                each.data = homes[key].copy_(carried(each.data, self.home))
            else:
                each.data = each.data.to(self.home)

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """One parameter, on `device`."""
        return self.model.get_parameter(name).detach().to(device)

    @contextmanager
    def outside(self, device: torch.device) -> Generator[None]:
        """Everything on `device` that the blocks do not hold."""
        parts = _outside(self.model)
        for owner, key in parts:
            _move(owner, key, device)
        try:
            yield
        finally:
            for owner, key in parts:
                _move(owner, key, self.home)


class Shards:
    """The tensors of a checkpoint, read one block at a time into a model on the meta device; see `Shards.of`.

    Stored buffers are small: they are read once and stay.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint, layout: Layout) -> None:
        self.model, self.checkpoint, self.layout = model, checkpoint, layout
        self.tied = _tied(model)

    @classmethod
    def of(cls, model: PreTrainedModel, source: Checkpoint | str | Path) -> Shards:
        """The shards of a checkpoint or its path for its empty model, which gets its buffers and parameters' dtypes.

        Raises ValueError as `checkpoint.check_causal`, when they are not the model's.
        """
        checkpoint = source if isinstance(source, Checkpoint) else read_checkpoint(source)
        shards = cls(model, checkpoint, check_causal(checkpoint, model))
        stored = set(shards.layout.targets.values())
        for name, buffer in list(model.named_buffers()):
            if name in stored:
                owner, _, key = name.rpartition(".")
                model.get_submodule(owner)._buffers[key] = shards.tensor(name, buffer.device)
        return shards

    def tensor(self, name: str, device: torch.device | None = None) -> Tensor:
        """One tensor of the model, read to `device` (default: the CPU), in the model's dtype."""
        for each in (name, *self.tied.get(name, ())):
            prefix = each
            while prefix:  # one that is split off another is found below a module that both are in
                if stored := self.layout.below(prefix):
                    made = self._made(stored, device or torch.device("cpu"))
                    if each in made:
                        return made[each]
                prefix = prefix.rpartition(".")[0]
        raise ValueError(f"{self.checkpoint.path} holds no tensor for {name!r}")

    def load(self, name: str, device: torch.device) -> nn.Module:
        """The named submodule with its weights read from disk to `device`."""
        block = self.model.get_submodule(name)
        waiting = {f"{name}.{key}" for key, parameter in block.named_parameters() if parameter.is_meta}
        if waiting:
            made = self._made(self.layout.below(name), device)
            for each in waiting:
                self._put(each, made[each] if each in made else self.tensor(each, device))
        return block.to(device)

    def release(self, name: str) -> None:
        """Put the submodule back on meta."""
        for key, parameter in list(self.model.get_submodule(name).named_parameters()):
            self._put(f"{name}.{key}", parameter.data.to("meta"))

    @contextmanager
    def outside(self, device: torch.device) -> Generator[None]:
        """Embeddings and what else is outside the blocks, on `device`; the head only if it is tied to them."""
        from prunus.blocks import find_blocks

        blocks = tuple(f"{name}." for name in find_blocks(self.model))
        names = [name for name, _ in self.model.named_parameters() if not name.startswith(blocks)]
        buffers = [(owner, key) for owner, key in _outside(self.model) if key in owner._buffers]
        for name in names:
            self._put(name, self.tensor(name, device))
        for owner, key in buffers:
            _move(owner, key, device)
        try:
            yield
        finally:
            for name in names:
                self._put(name, self.model.get_parameter(name).data.to("meta"))

    def stored(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The checkpoint's own tensors from the model's; of what it does not store, nothing."""
        made = set(self.layout.targets.values())
        own = {next((n for n in (name, *self.tied.get(name, ())) if n in made), name): t for name, t in tensors.items()}
        return {name: t for name, t in self.layout.stored(own).items() if name in self.checkpoint.tensors}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of everything stored, one at a time, as the model has it; what it does not need as stored."""
        for name in self.checkpoint.tensors:
            yield name, self._read(name, torch.device("cpu"))

    def _made(self, stored: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        read = {name: self._read(name, device) for name in stored}
        check_finite(read.items(), self.checkpoint.path)
        return self.layout.made(read)

    def _read(self, name: str, device: torch.device) -> Tensor:
        """A stored tensor in the dtype of what it makes."""
        tensor = carried(self.checkpoint.tensors[name].read(pin=device.type == "cuda"), device)
        return tensor.to(self.layout.dtypes[name]) if name in self.layout.dtypes else tensor

    def _put(self, name: str, value: Tensor) -> None:
        """Give the model a parameter of this value, and to those tied to it: data cannot be set across meta."""
        wanted = self.model.get_parameter(name).requires_grad
        parameter = nn.Parameter(value, requires_grad=wanted)
        for each in (name, *self.tied.get(name, ())):
            owner, _, key = each.rpartition(".")
            self.model.get_submodule(owner)._parameters[key] = parameter


def carried(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`; between host and CUDA through pinned memory, so that the copy does not hold others up.

    To CUDA the copy is only queued on the current stream; from CUDA it is complete when this returns.

    >>> carried(torch.ones(2), torch.device("cpu")).device
    device(type='cpu')
    """
    if tensor.device.type == "cpu" and device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    if tensor.is_cuda and device.type == "cpu":
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        torch.cuda.current_stream(tensor.device).synchronize()
        return host
    return tensor.to(device)


@contextmanager
def ahead(source: _Source, names: Sequence[str], device: torch.device) -> Generator[Ahead]:
    """A source that brings the blocks `names`, asked for in this order, before they are needed, and frees them later.

    On leaving, whatever was begun is finished and every block is released, but for the one at which an error ended the
    work; an error of the background is raised then, unless another one is under way.

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
        self._behind: list[tuple[str, Future[None]]] = []
        self._streams = _streams(device)

    def load(self, name: str, device: torch.device) -> nn.Module:
        """The block on `device`; the one after it is on its way when this returns."""
        block = self._take(name)
        if block is None:
            self._part(name)
            block = self.source.load(name, device)
        self._settle(most=1)  # the block before this one may still be on its way
        following = self._next.get(name)
        if following is not None and not self._shares(name, following):
            self._part(following)
            self._coming = following, self._brings.submit(self._bring, following)
        return block

    def release(self, name: str, after: Callable[[], None] | None = None) -> None:
        """Free the block while the next one is worked on; first do `after`, which reads its tensors."""

        def task() -> None:
            if after is not None:
                after()
            self.source.release(name)

        self._follow(name, task)

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
                    self._follow(name, lambda: self.source.release(name))
            self._settle(most=0)
        except BaseException as error:
            if not quietly:
                raise
            log.info("While another error ended the work, so did this in the background: %r", error)
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

    def _follow(self, name: str, task: Callable[[], None]) -> None:
        done = None if self._streams is None else torch.cuda.current_stream(self.device).record_event()

        def run() -> None:
            with self._on(1) as stream:
                if stream is not None and done is not None:
                    stream.wait_event(done)
                task()
                if stream is not None:
                    stream.synchronize()  # what was copied may be written, and what was read may be freed

        self._behind.append((name, self._follows.submit(run)))

    def _settle(self, *, most: int) -> None:
        """Wait until at most so many tasks are left behind; raise the error of any that is done."""
        while len(self._behind) > most:
            self._behind.pop(0)[1].result()

    def _part(self, name: str) -> None:
        """Wait until no block is left behind that shares parameters with this one, which is about to be brought."""
        if any(self._shares(name, other) for other, _ in self._behind):
            self._settle(most=0)

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


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Parameter name -> the other names of the same tensor."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: tuple(n for n in names if n != name) for names in groups.values() for name in names if len(names) > 1}


def _outside(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """(owner, key) of each parameter and buffer that no block holds."""
    from prunus.blocks import find_blocks

    inside = {id(module) for name in find_blocks(model) for module in model.get_submodule(name).modules()}
    parts: list[tuple[nn.Module, str]] = []
    for module in model.modules():
        if id(module) not in inside:
            parts += [
                (module, key) for key, value in {**module._parameters, **module._buffers}.items() if value is not None
            ]
    return parts


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()


def _is_on(device: torch.device, wanted: torch.device) -> bool:
    return device.type == wanted.type and wanted.index in (None, device.index)


def _move(owner: nn.Module, key: str, device: torch.device) -> None:
    if key in owner._buffers:
        buffer = owner._buffers[key]
        owner._buffers[key] = None if buffer is None else buffer.to(device)
    else:
        parameter = owner._parameters[key]
        assert parameter is not None
        parameter.data = parameter.data.to(device)


class _Source(Protocol):
    """What `ahead` needs of a `blocks.Source`."""

    def load(self, name: str, device: torch.device) -> nn.Module: ...
    def release(self, name: str) -> None: ...
    def outside(self, device: torch.device) -> AbstractContextManager[None]: ...


def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | None:
    if device.type != "cuda":
        return None
    return torch.cuda.Stream(device), torch.cuda.Stream(device)
