"""Processes that tests start: forked from one server that has imported torch, transformers and the package.

A fresh interpreter spends two seconds of a CPU on imports, a fork of the server a hundredth. The server has computed
nothing, so that what is forked is a fresh interpreter in all but that; it is started when a test first needs it, and
what is forked asks the same server for its own processes.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import Any

__all__ = ["forked", "run_ranks", "start", "start_command", "stop"]

_PATIENCE = 120.0  # seconds


@cache
def _server() -> Any:
    import torch

    if torch.cuda.is_available():  # a CUDA context does not survive a fork
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


def start(function: Callable[..., object], *arguments: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A running process that calls the function, which is of a module; `.exitcode`, `.kill()`, `.join()` as ever.

    environment: what differs in it. The process writes to no terminal, and its own worker processes are forks as well.
    """
    whole = dict(os.environ) | (environment or {})
    process = _server().Process(target=_begin, args=(function, arguments, whole, _address()))
    process.start()
    return process


def start_command(*arguments: object) -> Any:
    """A running `prunus` with these arguments."""
    return start(_command, [str(each) for each in arguments])


def forked() -> None:
    """From now on this process starts its worker processes from the server, too, where it would spawn them."""
    own = multiprocessing.get_context
    if _server().get_start_method() == "spawn":
        return

    def context(method: str | None = None) -> Any:
        return _server() if method == "spawn" else own(method)

    multiprocessing.get_context = context


def stop() -> None:
    """End the server, if it was started, and wait for it, so that its time counts as this process's."""
    if _server.cache_info().currsize:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]


def run_ranks(
    function: Callable[..., object],
    *arguments: Any,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> list[str]:
    """What two ranks of one group printed, after each called the function; torchrun's variables say which is which.

    The ranks meet in a file of `folder`, so that no port is chosen that another test takes.
    Raises AssertionError with the output of a rank that failed, or with the stacks of those that do not end.
    """
    meeting = folder / f"meeting-{time.monotonic_ns()}"
    outputs = [folder / f"{meeting.name}-rank-{rank}.txt" for rank in (0, 1)]
    started: list[Any] = []
    for rank, output in enumerate(outputs):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        changed = {name: str(value) for name, value in own.items()} | dict(environment or {})
        started.append(start(_rank, str(meeting), str(output), function, arguments, environment=changed))
    _wait(started)
    texts = [output.read_text() if output.exists() else "" for output in outputs]
    statuses = [process.exitcode for process in started]
    assert statuses == [0, 0], f"ranks ended with {statuses}:\n" + "\n".join(text[-4000:] for text in texts)
    return texts


def _wait(started: Sequence[Any]) -> None:
    """Until all ended; when one fails, the others are not waited for long."""
    end = time.monotonic() + _PATIENCE + 10  # by then they have written where they stand
    while time.monotonic() < end and any(each.exitcode is None for each in started):
        if any(each.exitcode for each in started):
            time.sleep(1.0)  # for the others to fail of it
            break
        time.sleep(0.01)
    for each in started:
        each.kill()
        each.join()


def _address() -> str | None:
    """Where the server listens, which it has to be running for."""
    if _server().get_start_method() == "spawn":
        return None
    forkserver.ensure_running()
    return forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]


def _begin(
    function: Callable[..., object], arguments: Sequence[Any], environment: Mapping[str, str], address: str | None
) -> None:
    if address is not None:  # Python tells a fork everything of its server but this, so that it would start another
        server: Any = forkserver._forkserver  # type: ignore[attr-defined]
        server._forkserver_address, server.ensure_running = address, resource_tracker.ensure_running
    os.environ.clear()
    os.environ.update(environment)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    forked()
    function(*arguments)


def _command(arguments: list[str]) -> None:
    from prunus.run.cli import main

    sys.argv = ["prunus", *arguments]
    main()


def _rank(meeting: str, output: str, function: Callable[..., object], arguments: Sequence[Any]) -> None:
    import torch.distributed as dist

    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        faulthandler.dump_traceback_later(_PATIENCE, exit=True, file=file)
        try:
            backend = os.environ.get("RANKS_BACKEND", "gloo")
            dist.init_process_group(backend, f"file://{meeting}", rank=int(os.environ["RANK"]), world_size=2)
            function(*arguments)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        sys.stdout.flush()
        os._exit(0)  # gloo's threads may outlive the interpreter, and then end it by a signal
