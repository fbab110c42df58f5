"""Jobs and the folder of those that are finished: each is done once, by whoever comes first.

    ROOM/KEY.json     a job's numbers, written last: complete or absent      ROOM/KEY/       what else it leaves
    ROOM/KEY.claim    held by the process that runs it                       ROOM/KEY.work/  where a killed one goes on
    ROOM/KEY.tries    begun so often and not ended                           ROOM/KEY.error.txt   failed, and how

A key is the hash of what decides the result, so that jobs that agree on it are one job: of several cells of a grid, of
several grids, of this call and of one that was killed. A lock is free again when its process is gone, however it ended.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock
from torch import Tensor

from prunus.machine import atomic, locked, read_json, read_tensors, write_json, write_tensors, write_text
from prunus.masks import Masks

__all__ = ["Job", "Store", "closure"]

State = Mapping[str, Tensor]
_ERROR, _LOCK, _TRIES = ".error.txt", ".claim", ".tries"


@dataclass(frozen=True, eq=False)
class Job:
    """Something that is done once; other processes and machines are sent it.

    room: the part of the store that its result is in; key: hash of what decides the result. what: (the job, the store)
    -> its numbers; what is too large for them goes to `store.folder_of(job)`. needs: what must have ended well before;
    it reads nothing else from the store. passing: deleted when no job that is still to be done needs it. brief: done in
    seconds, and so one of them before what takes long: a call that ends early leaves numbers of what it trained.

    >>> Job("dense", digest(recipe), partial(train_dense, recipe))
    """

    room: str
    key: str
    what: Callable[[Job, Store], dict[str, Any]]
    needs: tuple[Job, ...] = ()
    passing: bool = False
    brief: bool = False

    def run(self, store: Store) -> dict[str, Any]:
        """Its numbers."""
        return self.what(self, store)


@dataclass(frozen=True)
class Store:
    """The folder of finished jobs.

    rooms: those that lie elsewhere. places: key of a job -> the folder of its files, where they are to lie elsewhere.
    log: where jobs write what they measure meanwhile.

    >>> Store(Path("runs/grid"), {"dense": Path("runs/dense")})
    """

    folder: Path
    rooms: Mapping[str, Path] = field(default_factory=dict[str, Path])
    places: Mapping[str, Path] = field(default_factory=dict[str, Path])
    log: Path | None = None

    def path(self, job: Job, suffix: str = "") -> Path:
        """Where a job keeps something: its numbers with .json, the folder of its files without a suffix."""
        path = self.rooms.get(job.room, self.folder / job.room) / f"{job.key}{suffix}"
        return path if suffix else self.places.get(job.key, path)

    def folder_of(self, job: Job) -> Path:
        """The folder of what a job leaves beside its numbers, made if need be."""
        folder = self.path(job)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def work(self, job: Job) -> Path:
        """A folder from which the job goes on if it is killed; gone when it has ended well."""
        return self.path(job, ".work")

    def checkpoint(self, job: Job) -> Path:
        """The file in it from which a training goes on."""
        self.work(job).mkdir(parents=True, exist_ok=True)
        return self.work(job) / "checkpoint.pt"

    def finished(self, job: Job) -> bool:
        """Whether its result is there."""
        return self.path(job, ".json").exists()

    def failed(self, job: Job) -> bool:
        """Whether it left an error."""
        return self.path(job, _ERROR).exists()

    def result(self, job: Job) -> dict[str, Any]:
        """The numbers of a finished job."""
        return read_json(self.path(job, ".json"))

    def error(self, job: Job) -> str:
        """The last line of how it failed."""
        return self.path(job, _ERROR).read_text(encoding="utf-8").strip().splitlines()[-1]

    def put(self, job: Job, result: Mapping[str, Any]) -> None:
        """Keep a result: now the job is finished."""
        write_json(self.path(job, ".json"), result)
        shutil.rmtree(self.work(job), ignore_errors=True)
        self._forget_try(job)

    def fail(self, job: Job, text: str) -> None:
        """Keep how a job failed: it is not tried again in this call."""
        write_text(self.path(job, _ERROR), text)
        self._forget_try(job)

    def drop(self, job: Job) -> None:
        """Delete a result that nothing needs any more."""
        self.path(job, ".json").unlink(missing_ok=True)
        shutil.rmtree(self.path(job), ignore_errors=True)

    def tidy(self, jobs: Iterable[Job]) -> None:
        """Remove the rooms of jobs in which nothing is left."""
        for room in {self.path(job, ".json").parent for job in jobs}:
            with suppress(OSError):  # of one that is in use
                room.rmdir()

    def claim(self, job: Job) -> FileLock | None:
        """The lock of a job that nobody else runs; `release` it."""
        path = self.path(job, _LOCK)
        path.parent.mkdir(parents=True, exist_ok=True)
        return locked(path)

    def release(self, job: Job, lock: FileLock) -> None:
        """Let others have a job that was claimed."""
        if self.finished(job) or self.failed(job):  # who claims it now finds it ended
            self.path(job, _LOCK).unlink(missing_ok=True)
        lock.release()

    def begin(self, job: Job) -> int:
        """How often a claimed job is begun by now without having ended, this time included."""
        path = self.path(job, _TRIES)
        tries = 1 + (int(path.read_text(encoding="utf-8")) if path.exists() else 0)
        write_text(path, str(tries))
        return tries

    def forget(self, jobs: Iterable[Job]) -> None:
        """Let those that failed or were killed in earlier calls be tried anew, unless a living process has them."""
        for job in jobs:
            left = [path for path in (self.path(job, _ERROR), self.path(job, _TRIES)) if path.exists()]
            lock = self.claim(job) if left else None
            if lock is not None:
                for path in (*left, self.path(job, _LOCK)):
                    path.unlink(missing_ok=True)
                lock.release()

    def pack(self, job: Job) -> dict[str, bytes]:
        """All that a job left, by path within its folder, its numbers by "": for a machine without them."""
        folder, numbers = self.path(job), self.path(job, ".json")
        files = {str(file.relative_to(folder)): file for file in folder.rglob("*")} | {"": numbers}
        return {name: file.read_bytes() for name, file in files.items() if file.is_file()}

    def unpack(self, job: Job, files: Mapping[str, bytes]) -> None:
        """Write what `pack` read elsewhere; the numbers last."""
        for name in sorted(files, key=lambda name: not name):
            with atomic(self.path(job) / name if name else self.path(job, ".json")) as partial:
                partial.write_bytes(files[name])

    def write_state(self, job: Job, state: State, masks: Masks | None = None, name: str = "model") -> None:
        """Keep a network of a job, and its masks."""
        folder = self.folder_of(job)
        if masks is not None:
            masks.save(folder / "masks.safetensors")
        write_tensors(folder / f"{name}.safetensors", state)

    def state(self, job: Job, name: str = "model") -> dict[str, Tensor]:
        """A network that a job left, on the CPU."""
        return read_tensors(self.path(job) / f"{name}.safetensors")[0]

    def masks(self, job: Job) -> Masks | None:
        """The masks that a job left, if it did."""
        path = self.path(job) / "masks.safetensors"
        return Masks.load(path) if path.exists() else None

    def _forget_try(self, job: Job) -> None:
        self.path(job, _TRIES).unlink(missing_ok=True)


def closure(jobs: Sequence[Job], ended: Callable[[Job], bool]) -> Iterator[Job]:
    """The jobs for which `ended` is false and what they need, each once, behind what it needs."""
    seen: set[tuple[str, str]] = set()

    def visit(job: Job) -> Iterator[Job]:
        name = (job.room, job.key)
        if name not in seen:
            seen.add(name)
            if not ended(job):
                for need in job.needs:
                    yield from visit(need)
                yield job

    for job in jobs:
        yield from visit(job)
