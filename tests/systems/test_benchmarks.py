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
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def measures(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in tree.body)


SCRIPTS = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if measures(path)]

SMALL = {  # two or three of what there is more of say as much
    "retraining_step": {"BLOCKS": 2, "STEPS": 2},
    "recorded_step": {"BATCHES": (1, 2), "STEPS": 12},  # of which a CPU does the fourth part
    "reconstruction": {"BLOCKS": 2, "EXAMPLES": 2},
    "growth": {"SIZES": {"parameters": (1, 2, 4), "tokens": (1, 2, 4), "length": (1, 2, 4)}},
}


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
def test_a_benchmark_measures_at_small_sizes(name: str, load, monkeypatch: pytest.MonkeyPatch):
    claims: ModuleType = load("claims")
    args = claims.parse("", ["--device", "cpu", "--scale", "0.01", "--repeats", "1"])
    script = load(name)
    for constant, value in SMALL.get(name, {}).items():
        monkeypatch.setattr(script, constant, value)
    rows = list(script.measure(args))
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


def test_rows_of_a_script_that_is_stopped_are_there(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claims, out = load("claims"), tmp_path / "nm_mask.json"
    row = claims.Row("work", "2 x 2", "a sort", 1.0, 20.0)

    def measure(args):
        yield row
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["nm_mask", "--device", "cpu", "--json", str(out)])
    with pytest.raises(KeyboardInterrupt):
        claims.main("", measure)
    found = json.loads(out.read_text())
    assert found["rows"] == [asdict(row)]
    assert not found["complete"]
    assert found["setting"]["device"] == "CPU"
    claims.main("", lambda args: [row, row])
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert json.loads(out.read_text())["complete"]


def test_a_page_of_single_runs(load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    claims, every = load("claims"), load("all")
    row = asdict(claims.Row("work", "2 x 2", "a sort", 1.0, 20.0))
    setting = {"device": "G", "scale": 1.0, "torch": "1", "triton": "1", "commit": "unknown", "date": "2026-01-02"}

    def put(name: str, complete: bool = True, **changes: object) -> None:
        wrote = {"setting": {**setting, **changes}, "complete": complete, "rows": [row]}
        (tmp_path / f"{name}.json").write_text(json.dumps(wrote))

    put("nm_mask", host="load 0.5 on 8 cores before it began")
    put("growth", complete=False, commit="b", date="2026-01-03")
    monkeypatch.setattr(sys, "argv", ["all", "--from", str(tmp_path), "--out", str(tmp_path / "page"), "--commit", "a"])
    every.main()
    page = (tmp_path / "page" / "speed.md").read_text()
    assert "G, torch\n1, triton 1, commit `b, a`, 2026-01-03" in page
    assert page.count("| work | 2 x 2 | 1 ms | 20 ms | 20 |") == 2
    assert page.count("Stopped before its last row") == 1
    assert (
        page.count("; host: ") == page.count("`benchmarks/nm_mask.py`; host: load 0.5 on 8 cores before it began") == 1
    )
    put("hessian", torch="2")
    with pytest.raises(ValueError, match=r"hessian.json has torch 2, the page 1"):
        every.read(tmp_path, None)
    put("hessian", scale=0.5)
    with pytest.raises(ValueError, match=r"hessian.json has scale 0.5, the page 1"):
        every.read(tmp_path, None)
    (tmp_path / "hessian.json").write_text("[]")
    with pytest.raises(ValueError, match="does not say what its rows were measured on"):
        every.read(tmp_path, None)


@pytest.mark.parametrize("name", ["training", "frank_wolfe"])
def test_scripts_of_training_run_from_their_command_line(name: str, load, monkeypatch: pytest.MonkeyPatch, capsys):
    options = {
        "training": ["--model", "resnet8", "--batch-size", "4", "--images", "16", "--steps", "1", "--together", "2"],
        "frank_wolfe": ["--model", "resnet8", "--batch-size", "4", "--steps", "1"],
    }
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # put back what the script sets
    monkeypatch.setattr(sys, "argv", [name, "--device", "cpu", *options[name]])
    load(name).main()
    printed = capsys.readouterr().out
    assert "resnet8" in printed
    assert "Error" not in printed
