"""A file imports only from its own floor or lower ones; the floors are those of docs/architecture.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "prunus"


def read_floors(text):
    """Room ("layers", "export") -> floor, from the rows `| 0 | `layers.py` | ... |`."""
    rows = re.findall(r"^\| (\d) \| (`[^|]+`) \|", text, re.MULTILINE)
    return {
        name.removesuffix(".py").strip("/"): int(floor) for floor, cell in rows for name in re.findall(r"`(.+?)`", cell)
    }


FLOORS = read_floors((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(source, path=PACKAGE / "x.py"):
    """Rooms of our package that a file imports anywhere, also inside functions and for types only."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the whole name"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in modules if name.startswith("prunus.")} & FLOORS.keys()


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_the_plan_names_every_room_and_no_other():
    assert len(FLOORS) > 15
    assert set(FLOORS) == {room_of(path) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down_or_stay(path):
    floor = FLOORS[room_of(path)]
    above = {room for room in imported_rooms(path.read_text(encoding="utf-8"), path) if FLOORS[room] > floor}
    assert not above, f"{path.name} (floor {floor}) imports from above: {', '.join(sorted(above))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_say_what_they_hold(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 400
    assert ast.get_docstring(ast.parse(text)), f"{path.name} does not say what it holds"


@pytest.mark.parametrize(
    ("source", "rooms"),
    [
        ("import prunus.stream", {"stream"}),
        ("from prunus import masks, __version__", {"masks"}),
        ("from prunus.run.recipe import Recipe", {"run"}),
        ("def f():\n    from prunus.export import save_model", {"export"}),
        ("import prunuses.masks, torch", set()),
    ],
)
def test_imports_are_found(source, rooms):
    assert imported_rooms(source) == rooms


def test_floors_are_read():
    assert read_floors("| 0 | `a.py`, `b.py` | x |\n| 3 | `c/` | `d.py` |\n") == {"a": 0, "b": 0, "c": 3}
