"""A room imports only from rooms above it in docs/architecture.md, through their `__init__`, and no private name."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "prunus"


def read_rooms(text):
    """The rooms ("layers", "save") in the table's order."""
    return [name.removesuffix(".py").strip("/") for name in re.findall(r"^\| `([^`|]+)` \|", text, re.MULTILINE)]


ROOMS = read_rooms((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
SHOWN = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source):
    """(room, rest of the module's path, imported name) of everything of ours that a file imports anywhere, also inside
    functions and for types only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            ours = [alias.name.split(".", 2) for alias in node.names if alias.name.startswith("prunus.")]
            yield from ((parts[1], "".join(parts[2:]), "") for parts in ours)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name"
            front, _, path = (node.module or "").partition(".")
            if front == "prunus":
                room, _, rest = path.partition(".")
                yield from ((room, rest, alias.name) for alias in node.names)


def faults(source, own, rooms):
    """What a file of the room `own` must not import, in words."""
    for room, rest, name in imports(source):
        if room == own or not room:
            continue
        if rooms.index(room) > rooms.index(own):
            yield f"{room} lies below {own}"
        if rest:
            yield f"prunus.{room}.{rest} is what lies inside {room}: import {name} from prunus.{room}"
        if name.startswith("_"):
            yield f"{name} is private to {room}"


def circles(graph):
    """Modules that reach themselves."""

    def reached(start):
        seen, todo = set(), list(graph[start])
        while todo:
            if (module := todo.pop()) not in seen:
                seen.add(module)
                todo += graph.get(module, ())
        return seen

    return {module for module in graph if module in reached(module)}


def test_the_plan_names_every_room_and_no_other():
    assert len(ROOMS) == len(set(ROOMS)) > 15
    assert set(ROOMS) == {room_of(path) for path in FILES}


@SHOWN
def test_imports_go_up_through_the_door(path):
    assert not list(faults(path.read_text(encoding="utf-8"), room_of(path), ROOMS))


@SHOWN
def test_files_say_what_they_hold(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path.name} does not say what it holds"


@pytest.mark.parametrize("stub", sorted(PACKAGE.rglob("__init__.pyi")), ids=lambda path: path.parent.name)
def test_public_names_are_there_and_no_file_hides_one(stub):
    """Python binds a file to its folder when it is first imported, over a name that another file defines."""
    room = importlib.import_module(".".join(("prunus", *stub.parent.relative_to(PACKAGE).parts)))
    assert all(getattr(room, name) is not None for name in room.__all__)
    nodes = [node for node in ast.walk(ast.parse(stub.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    inside = {path.stem for path in stub.parent.iterdir()}
    named = [(node.module, alias.name) for node in nodes if node.module for alias in node.names]
    assert not [name for module, name in named if name in inside - {module}]


def test_no_module_reaches_itself():
    modules = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in FILES}
    graph = {}
    for module, path in modules.items():
        found = list(imports(path.read_text(encoding="utf-8")))
        near = {".".join(filter(None, each)) for each in found} | {".".join(filter(None, each[:2])) for each in found}
        graph[module] = near & modules.keys()
    assert not circles(graph)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from prunus.a import f", 0),
        ("from prunus.b.deep import _g", 0),
        ("from prunus import a, __version__", 0),
        ("def f():\n    from prunus.c import g", 1),
        ("from prunus.a.deep import f", 1),
        ("from prunus.a import _f", 1),
        ("import prunus.c.deep", 2),
        ("import prunuses.c, torch", 0),
    ],
)
def test_faults_are_found(source, wrong):
    assert len(list(faults(source, "b", ["a", "b", "c"]))) == wrong


def test_rooms_and_circles_are_read():
    assert read_rooms("| `a.py` | x |\n| `b/` | `c.py` |\n") == ["a", "b"]
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"a"}}) == {"a", "b"}
