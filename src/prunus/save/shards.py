"""Safetensors shards written tensor by tensor, so that a model larger than memory can be saved.

A shard grows in a spool file that has room for the header; when it is full the header is put in. Tensors whose
elements grow on the way (16 bits, then 32) would lie askew there: such a shard is laid out anew, as the safetensors
library would (largest elements first, then by name). It appears under its name in one `os.replace`:

    8 bytes: length of the header | JSON header padded with spaces | raw tensors

What comes from a GPU is written by a thread, while the next tensor is on its way. A file takes one writer at a time, so
a large model is written faster into several shards at once, each by a thread of its own.

Names and dtypes are the caller's; nothing here knows a model.
"""

from __future__ import annotations

import json
import os
import secrets
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Literal

import torch
from torch import Tensor

from prunus.checkpoint import DTYPES
from prunus.machine import write_json
from prunus.stream import carried

__all__ = ["ShardWriter"]

_CHUNK = 16 * 2**20
_ROOM = 1 << 15  # bytes of a spool before its tensors: the header of some 200


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # in the spool, after the room for the header
    bytes: int


@dataclass(eq=False)
class _Shard:
    """A shard that grows in its spool, and the thread that writes there."""

    number: int  # from 0
    path: Path
    spool: BinaryIO
    thread: ThreadPoolExecutor
    entries: list[_Entry] = field(default_factory=list)
    writes: list[Future[None]] = field(default_factory=list)
    filled: int = 0  # bytes in the spool

    def add(self, name: str, tensor: Tensor, here: Tensor) -> Future[None]:
        """The write, begun, of a tensor whose values are `here` on the host."""
        size = tensor.numel() * tensor.element_size()
        self.entries.append(_Entry(name, tensor.dtype, tuple(tensor.shape), self.filled, size))
        self.filled += size
        self.writes.append(self.thread.submit(_append, self.spool, here))
        return self.writes[-1]

    def settle(self) -> None:
        """Wait until everything is in the spool; raise what went wrong."""
        self.thread.shutdown()
        for write in self.writes:
            write.result()


class ShardWriter:
    """Takes named tensors one after another and writes them as the safetensors shards of a Hugging Face folder.

    stem: how the files are called. max_shard_bytes: a shard is closed before it would hold more; a tensor larger than
    that is a shard of its own.
    writers: shards that grow side by side, once the first is full; each next tensor goes to the emptiest.
    Memory: two tensors and one for each writer. Disk: a shard that is laid out anew, twice. `close` (or leaving the
    `with` block without an error) gives the shards their final names and writes the index, or one `model.safetensors`
    when a shard was enough.

    >>> with ShardWriter(folder) as writer:
    ...     writer.write("lm_head.weight", torch.zeros(4, 2))

    Raises ValueError for a name written twice, a dtype that safetensors lacks, or no tensor at all.
    """

    def __init__(
        self, folder: str | Path, *, stem: str = "model", max_shard_bytes: float = 4e9, writers: int = 1
    ) -> None:
        self.folder, self.stem, self.max_shard_bytes, self.writers = Path(folder), stem, int(max_shard_bytes), writers
        self.total_bytes = 0
        self._parts: dict[int, Path] = {}  # number of a full shard -> its file
        self._names: dict[str, int] = {}  # tensor -> number of its shard
        self._open: list[_Shard] = []
        self._pending: list[Future[None]] = []

    def write(self, name: str, tensor: Tensor) -> None:
        """Add one tensor (any shape, device and layout); it may be changed when this returns."""
        if name in self._names:
            raise ValueError(f"tensor {name!r} was written twice to {self.folder}; pass tied weights once")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {tensor.dtype}, which safetensors cannot hold; cast it first")
        if tensor.is_meta:
            raise ValueError(f"tensor {name!r} is on the meta device and has no values; load it before saving")
        size = tensor.numel() * tensor.element_size()
        shard = self._emptiest(size)
        self._names[name] = shard.number
        here = carried(tensor.detach().contiguous(), torch.device("cpu"))
        self._pending.append(shard.add(name, tensor, here))
        most = 0 if tensor.device.type == "cpu" else len(self._open) + 1  # the caller's own memory may change
        self._settle(most=most)
        self.total_bytes += size

    def close(self) -> tuple[str, ...]:
        """File names of the finished checkpoint, the index last if there is one."""
        if not self._names:
            raise ValueError(f"no tensor was written to {self.folder}; a model without weights is not saved")
        for shard in list(self._open):
            self._close_shard(shard)
        count, stem = len(self._parts), self.stem
        several = [f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        files = [f"{stem}.safetensors"] if count == 1 else several
        for file, part in zip(files, sorted(self._parts), strict=True):
            os.replace(self._parts[part], self.folder / file)
        if count > 1:
            weight_map = {name: files[i] for name, i in sorted(self._names.items())}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            files.append(f"{stem}.safetensors.index.json")
            write_json(self.folder / files[-1], index)
        return tuple(files)

    def abort(self) -> None:
        """Delete what was written so far."""
        for shard in self._open:
            shard.thread.shutdown()
            shard.spool.close()
        for path in (*self._parts.values(), *(shard.path for shard in self._open)):
            path.unlink(missing_ok=True)
            path.with_suffix(".part").unlink(missing_ok=True)
        self._open = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> Literal[False]:
        if kind is None:
            self.close()
        else:
            self.abort()
        return False

    def _emptiest(self, size: int) -> _Shard:
        """An open shard with room for so many bytes."""
        shard = min(self._open, key=lambda each: each.filled, default=None)
        if shard is not None and shard.entries and shard.filled + size > self.max_shard_bytes:
            self._close_shard(shard)
            shard = None
        if shard is not None and len(self._open) >= min(self.writers, len(self._parts) + 1):
            return shard
        return self._open_shard()

    def _open_shard(self) -> _Shard:
        self.folder.mkdir(parents=True, exist_ok=True)
        number = len(self._parts) + len(self._open)
        path = self.folder / f".{secrets.token_hex(8)}.spool"
        spool = path.open("x+b")
        spool.seek(_ROOM)
        shard = _Shard(number, path, spool, ThreadPoolExecutor(1, thread_name_prefix="write"))
        self._open.append(shard)
        return shard

    def _close_shard(self, shard: _Shard) -> None:
        shard.settle()
        part, header = shard.path, _header(shard.entries, _ROOM)
        sizes = [entry.dtype.itemsize for entry in shard.entries]
        if len(header) == _ROOM and sizes == sorted(sizes, reverse=True):
            shard.spool.seek(0)
            shard.spool.write(header)
            _close(shard.spool)
        else:
            part = self._lay_out(shard)
            shard.spool.close()
            shard.path.unlink()
        self._open.remove(shard)
        self._parts[shard.number] = part

    def _lay_out(self, shard: _Shard) -> Path:
        part = shard.path.with_suffix(".part")
        entries = sorted(shard.entries, key=lambda e: (-e.dtype.itemsize, e.name))
        with part.open("wb") as file:
            file.write(_header(entries))
            for entry in entries:
                _copy(shard.spool, file, entry)
            _close(file)
        return part

    def _settle(self, *, most: int) -> None:
        """Wait until at most so many tensors are not written yet; raise what went wrong."""
        while len(self._pending) > most:
            self._pending.pop(0).result()


def _append(spool: BinaryIO, tensor: Tensor) -> None:
    spool.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _close(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _header(entries: list[_Entry], room: int = 0) -> bytes:
    """Length and header, padded to `room` bytes if it takes no more, else to a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.bytes
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(room - 8 - len(text), -len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _copy(spool: BinaryIO, file: BinaryIO, entry: _Entry) -> None:
    spool.seek(_ROOM + entry.offset)
    left = entry.bytes
    while left:
        chunk = spool.read(min(left, _CHUNK))
        file.write(chunk)
        left -= len(chunk)
