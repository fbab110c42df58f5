"""What a run measures, in other people's trackers: TensorBoard, Weights & Biases, MLflow, through accelerate's.

    log({"retrain/loss": 2.5}, step) ─▶ every tracker that was asked for

They are started by the first number, so a run that is refused leaves nothing with them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from prunus.machine import import_extra, put_back

__all__ = ["TRACKERS", "Log", "check_trackers", "named_log", "tracked"]

Log = Callable[[Mapping[str, float], "int | None"], None]
TRACKERS = ("tensorboard", "wandb", "mlflow")
_inside: list[list[bool]] = []


def check_trackers(names: Sequence[str]) -> None:
    """Raise ImportError for a tracker whose package is missing.

    >>> check_trackers([])
    """
    for name in names:
        import_extra(name, name, f"log_with: [{name}]")


@contextmanager
def tracked(names: Sequence[str], folder: Path, said: Mapping[str, Any]) -> Generator[Log]:
    """A function that writes numbers by name, at a step or none, to the trackers named; to none of no names.

    TensorBoard's files are in folder/logs; the others get a run named after the folder, in their project prunus. said:
    what the run was asked for, shown beside its curves.

    >>> with tracked(["tensorboard"], Path("runs/run"), {}) as log:
    ...     log({"loss": 2.5}, 1)
    """
    started: list[Any] = []

    def log(values: Mapping[str, float], step: int | None) -> None:
        with _state():
            if not started:
                started.extend(_started(name, folder, said) for name in names)
            for each in started:
                each.log(dict(values), step=step)

    try:
        yield log
    finally:
        with _state() if started else nullcontext():
            for each in started:
                each.finish()


def named_log(log: Log, name: str) -> Log:
    """The same for numbers of one part of the run, whose name stands before theirs.

    >>> named_log(lambda values, step: print(values), "retrain")({"loss": 2.5}, 1)
    {'retrain/loss': 2.5}
    """
    return lambda values, step: log({f"{name}/{key}": value for key, value in values.items()}, step)


@contextmanager
def _state() -> Generator[None]:
    """accelerate's state of processes, without which its trackers may not log; not kept, for it has a device.

    It is the process's: of threads that log at once the last one takes it away.
    """
    from accelerate import PartialState

    def made() -> bool:
        was_there = bool(PartialState._shared_state)
        PartialState()
        return was_there

    with put_back(_inside, made, lambda was_there: None if was_there else PartialState._reset_state()):
        yield


def _started(name: str, folder: Path, said: Mapping[str, Any]) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    where: dict[str, dict[str, Any]] = {
        "tensorboard": {"run_name": "logs", "logging_dir": str(folder)},
        "wandb": {"run_name": "prunus", "name": str(folder)},
        "mlflow": {"experiment_name": "prunus", "run_name": str(folder)},
    }
    tracker: Any = LOGGER_TYPE_TO_CLASS[name](**where[name])
    tracker.start()
    tracker.store_init_configuration(_flat(said))
    return tracker


def _flat(said: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys and plain values: what all trackers take."""
    flat: dict[str, Any] = {}
    for key, value in said.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat
