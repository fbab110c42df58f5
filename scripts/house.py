"""Figures of the package: how large it is, how it hangs together, and how many of its files a Wanda run executes.

    python scripts/house.py            in a checkout; a minute, the last figure trains nothing and saves nothing kept

A file counts as executed when the body of one of its functions runs; what importing it runs does not count.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = Path(__file__).parents[1] / "src" / "prunus"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(("prunus", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in FILES
}
POSITIONAL = 5


def inside(path: Path) -> str:
    """A file as seen from the package."""
    return str(path.relative_to(PACKAGE))


Function = ast.FunctionDef | ast.AsyncFunctionDef


def functions(path: Path) -> list[Function]:
    """Every function of a file, methods and inner ones too."""
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, Function)]


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, also inside of functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module}
    return {name for name in found if name in MODULES and name != "prunus" and MODULES[name] != path}


def circles() -> set[frozenset[str]]:
    """The sets of modules that reach one another."""
    graph = {name: imported(path) for name, path in MODULES.items()}

    def reached(start: str) -> set[str]:
        seen, todo = set[str](), list(graph[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph[name]
        return seen

    reach = {name: reached(name) for name in graph}
    return {frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]}


def positional(function: Function) -> list[str]:
    """The arguments that may be given by position, without self and cls."""
    args = function.args
    return [arg.arg for arg in args.posonlyargs + args.args if arg.arg not in ("self", "cls")]


def length(function: Function) -> int:
    """Lines of the body, without the docstring."""
    body = function.body[1:] if ast.get_docstring(function, clean=False) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def executed(run: Callable[[], Any]) -> set[Path]:
    """The files of the package of which `run` executes a function, in any thread."""
    seen: set[CodeType] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            seen.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # pyright: ignore[reportArgumentType]
    bodies = {code for code in seen if code.co_flags & inspect.CO_OPTIMIZED}  # neither a module nor a class
    return {Path(code.co_filename).resolve() for code in bodies} & set(FILES)


def pruned() -> Callable[[], Any]:
    """Wanda of a small module in memory."""
    import torch
    from torch import nn

    from prunus import prune, wanda

    small = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    return lambda: prune(small, wanda, sparsity=0.5, batches=[torch.randn(4, 8)])


def streamed() -> Callable[[], Any]:
    """Wanda of the embedded model, block by block."""
    import torch
    from transformers import AutoModelForCausalLM

    from prunus import stream, wanda
    from prunus.data import ASSETS

    model = AutoModelForCausalLM.from_pretrained(ASSETS)
    tokens = torch.randint(0, 1000, (2, 32))
    return lambda: stream(model, wanda, sparsity=0.5, tokens=tokens)


def commanded() -> Callable[[], Any]:
    """The whole command, with few windows and no retraining."""
    from prunus.run.cli import app

    few = ["prune.sparsity=0.5", "prune.criterion=wanda", "calibrate.samples=2", "calibrate.length=32"]
    keys = [f"--set={key}" for key in (*few, "evaluate.window=32")]

    def run() -> None:
        with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
            app(["run", "--out", out, *keys], standalone_mode=False)

    return run


WANDA = {"prune": pruned, "stream": streamed, "command": commanded}


def show(title: str, *figures: object) -> None:
    """One line."""
    sys.stdout.write(f"{title:42}{', '.join(map(str, figures))}\n")


def show_all(title: str, items: Iterable[str]) -> None:
    """How many there are, and each on a line of its own."""
    found = sorted(items)
    show(title, len(found))
    sys.stdout.writelines(f"    {each}\n" for each in found)


def main() -> None:
    """Write the figures."""
    every = [(path, function) for path in FILES for function in functions(path)]
    lines = {path: path.read_text(encoding="utf-8").count("\n") for path in FILES}
    sizes = sorted(length(function) for _, function in every)
    show("files, lines", len(FILES), sum(lines.values()))
    rooms = Counter[str]()
    for path, count in lines.items():
        rooms[path.relative_to(PACKAGE).parts[0]] += count
    show("lines of the largest rooms", *(f"{room}/ {count}" for room, count in rooms.most_common(6)))
    show("lines of a function: median, p90, most", sizes[len(sizes) // 2], sizes[len(sizes) * 9 // 10], sizes[-1])
    show_all("files in the root", (path.name for path in FILES if path.parent == PACKAGE))
    show_all("import circles", (" ".join(sorted(circle)) for circle in circles()))
    outside = [(path, function) for path, function in every if path.parent.name != "kernels"]
    long = [(path, function) for path, function in outside if len(positional(function)) > POSITIONAL]
    show_all("more than 5 positional arguments", (f"{inside(path)}:{each.lineno} {each.name}" for path, each in long))
    for name in MODULES:
        with contextlib.suppress(ImportError):  # an extra that is missing
            importlib.import_module(name)
    for name, make in WANDA.items():
        show_all(f"files that a Wanda run executes: {name}", map(inside, executed(make())))


if __name__ == "__main__":
    main()
