"""Every benchmark of a claim runs on a CPU at small sizes, and the results page is made of what they return."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measures(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in tree.body)


SCRIPTS = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if measures(path)]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Imports a file of benchmarks/, which finds its neighbours as it does when it is run."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_measures_at_small_sizes(name: str, load):
    claims: ModuleType = load("claims")
    args = claims.parse("", ["--device", "cpu", "--scale", "0.01", "--repeats", "1"])
    rows = load(name).measure(args)
    assert rows
    for row in rows:
        assert isinstance(row, claims.Row)
        assert row.name
        assert row.shape
        assert row.ours_ms > 0 or "not possible here" in row.note
        assert row.reference_ms is None or row.reference_ms > 0
    assert claims.table(rows).count("\n") == len(rows) + 2


def test_sizes_scale(load):
    claims = load("claims")
    args = claims.parse("", ["--device", "cpu", "--scale", "0.5"])
    assert claims.sized(28672, args) == 14336
    assert claims.sized(100, args) == 64
    assert claims.sized(1, args, multiple=4) == 4


def test_the_page_keeps_what_was_not_run_again(load, tmp_path: Path):
    claims, every = load("claims"), load("all")
    setting = {"device": "G", "torch": "1", "triton": "1", "commit": "a", "date": "d"}
    row = asdict(claims.Row("work", "2 x 2", "a sort", 1.0, 20.0, 0.5, 10, 30, target=10))
    every.write(tmp_path, {"setting": setting, "scripts": {"nm_mask": [row]}})
    every.write(tmp_path, {"setting": setting, "scripts": {"row_selection": "CUDA out of memory"}})
    page = (tmp_path / "speed.md").read_text()
    assert "| work | 2 x 2 | 1 ms | 20 ms | 20 | 10 | 0.5 ms | 2 |" in page
    assert "Failed: CUDA out of memory" in page
    every.write(tmp_path, {"setting": {**setting, "device": "H"}, "scripts": {"row_selection": [row]}})
    assert list(json.loads((tmp_path / "speed.json").read_text())["scripts"]) == ["row_selection"]


def test_a_script_that_fails_is_told(load, tmp_path: Path):
    script = tmp_path / "broken.py"
    script.write_text("def measure(args): ...\nraise SystemExit('no such device')\n")
    assert load("all").run(script, []) == "no such device"
