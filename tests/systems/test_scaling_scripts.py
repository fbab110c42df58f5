"""The benchmarks of growth, inference and two GPUs, tiny: a power law is fitted, and what cannot run says so."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tiny(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cpu", "scale": 0.03, "repeats": 1, "seed": 0, "json": None} | changes)


def test_exponents_are_those_of_power_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    growth = script("growth", monkeypatch)
    sizes = [1.0, 2.0, 4.0, 8.0]
    for power in (0.0, 1.0, 1.5):
        assert growth.exponent(sizes, [7 * size**power for size in sizes]) == pytest.approx(power, abs=1e-6)
    monkeypatch.setattr(growth, "cost", lambda run, args, repeats: run() or growth.Cost(1.0, None))
    rows = list(growth.measure(tiny()))
    assert len(rows) == 4 * 3
    assert all("^0.00" in row.note or "^-0.00" in row.note for row in rows), "a constant time does not grow"


def test_inference_reports_every_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    inference = script("inference", monkeypatch)
    rows = list(inference.measure(tiny()))
    assert len(rows) == 3 * 2 * 2
    for row in rows:
        assert math.isnan(row.ours_ms) == row.note.startswith("not possible here")
        slower = row.reference_ms is not None and row.ours_ms > row.reference_ms
        assert slower == ("no gain" in row.note)


def test_the_better_backend_counts_and_one_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    inference = script("inference", monkeypatch)

    def fails(*_: torch.Tensor) -> None:
        raise RuntimeError("no such\n hardware")

    weight, x = torch.randn(64, 32), torch.randn(16, 32)
    monkeypatch.setattr(inference, "BACKENDS", {"good": lambda w, _: (w, " (algorithm 3)"), "bad": fails})
    row = inference._semi_structured_row("2:4", weight, x, tiny())
    assert row.ours_ms > 0
    assert "good (algorithm 3)" in row.note
    assert "bad: no such hardware" in row.note
    monkeypatch.setattr(inference, "BACKENDS", {"bad": fails})
    row = inference._semi_structured_row("2:4", weight, x, tiny())
    assert math.isnan(row.ours_ms)
    assert row.note.startswith("not possible here: dense")


def test_a_pruned_weight_has_two_zeros_in_every_four(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.tensor([[1.0, -3.0, 2.0, 0.5], [0.1, 0.2, -0.4, 0.3]])
    found = script("inference", monkeypatch)._semi_structured(weight)
    assert found.tolist() == [[0, -3, 2, 0], [0, 0, pytest.approx(-0.4), pytest.approx(0.3)]]
    with pytest.raises(RuntimeError, match="differs by"):
        script("inference", monkeypatch)._check(found, weight)


def test_two_gpus_writes_each_row_and_goes_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")  # the script sets both: put back afterwards
    monkeypatch.setenv("FSDP_VERSION", "2")
    two = script("two_gpus", monkeypatch)
    few = ["--device", "cpu", "--layers", "2", "--steps", "2", "--samples", "4", "--scale", "0.02"]
    args = two.parse([*few, "--json", str(tmp_path / "rows.json")])

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(two, "stream", fail)
    rows = two.compare(args.modes, args, torch.device("cpu"))
    assert [row.name for row in rows] == [*two.RETRAINED, "Wanda 2:4", "SparseGPT 2:4"]
    assert [bool(row.error) for row in rows] == [False, False, False, True, True]
    assert all(row.rate > 0 and len(row.losses) == 3 for row in rows[:3])
    assert "| SparseGPT 2:4 | alone | failed: RuntimeError: out of memory" in capsys.readouterr().out
    again = two.parse([*few, "--alone", str(tmp_path / "rows.json")])
    stored = [two.Row(**row) for row in json.loads(again.alone.read_text())]
    shared = dataclasses.replace(rows[0], mode="replicated", processes=2, seconds=rows[0].seconds / 2)
    assert "| 2 replicated |" in two.line(shared, stored)
    assert "| 2.00 | 0.0e+00 |" in two.line(shared, stored)


def test_two_gpus_needs_processes_for_sharing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two = script("two_gpus", monkeypatch)
    with pytest.raises(SystemExit):
        two.parse(["--modes", "alone,sharded"])
    assert "need several processes" in capsys.readouterr().err
