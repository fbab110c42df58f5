"""What a pool trains at a time: one branch, or several with the same rates as one vectorised network (stacked)."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from prunus.masks import Masks
from prunus.run.recipe import digest
from prunus.run.vision.soups.branches import Branch, Grown, State, Store, drawing, grow, setting_of
from prunus.run.vision.soups.together import grow_stacked

__all__ = ["Unit", "claimed", "grow_unit", "name_of", "train_unit"]

Unit = tuple[Branch, ...]


def name_of(unit: Unit) -> str:
    """A unit's name: the keys of its branches."""
    return " ".join(branch.key for branch in unit)


def train_unit(unit: Unit, store: Store, *, alone: bool) -> None:
    """Train and store those branches of a unit that are not there; for who has `claimed` them.

    alone: whether nothing else is trained in this process meanwhile, as `grow_unit` takes it.
    """
    missing = tuple(branch for branch in unit if not store.finished(branch))
    if missing:
        # A checkpoint of a stack fits no other: it is named for all of its members.
        checkpoint = store.path(missing[0], ".pt" if len(missing) == 1 else f".{digest(name_of(missing))[:8]}.pt")
        grown = grow_unit(missing, *store.start(missing[0].start), checkpoint, alone=alone)
        for branch, each in zip(missing, grown, strict=True):
            store.put(branch, each)
        checkpoint.unlink(missing_ok=True)


def grow_unit(
    unit: Unit, state: State, masks: Masks | None, checkpoint: Path | None = None, *, alone: bool
) -> list[Grown]:
    """The trained branches of a unit, from their start; nothing is stored but the checkpoint.

    alone: then what the networks draw (dropout) is the same in every call.
    """
    with drawing(unit[0].key, setting_of(unit[0]).device) if alone else nullcontext():
        if len(unit) == 1:
            return [grow(unit[0], state, masks, checkpoint)]
        return grow_stacked(unit, state, masks, checkpoint)


@contextmanager
def claimed(unit: Unit, store: Store, *, patient: bool) -> Generator[bool]:
    """Whether these branches are this thread's to train; patient: wait until they are.

    A claim is a lock on a file, which is free again when its process is gone, however that ended.
    """
    with ExitStack() as stack:
        try:
            for branch in sorted(unit, key=lambda branch: branch.key):  # in one order, so that nobody waits in a ring
                path = store.path(branch, ".lock")
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path, blocking=patient))
        except Timeout:
            yield False
            return
        yield True
