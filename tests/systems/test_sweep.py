"""Sweeps: many compression rates of one dense training, resumed, from runs and from files, and its mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from prunus.measure.accuracy import accuracy
from prunus.measure.speed import latency
from prunus.vision import stages
from prunus.vision import sweeps as sweeping
from prunus.vision.setting import Setting
from prunus.vision.sweeps import rows_of, sweep, sweep_of
from prunus.vision.train import train_run
from tests.systems.test_cli import call
from tests.systems.test_vision import Tiny, checked, learning, raw, tiny

__all__ = ["call", "learning", "tiny"]


@pytest.fixture
def run(tmp_path: Path, learning: None) -> Path:
    """A finished run of the tiny network."""
    train_run(checked(tmp_path / "run"))
    return tmp_path / "run"


def numbers(result: dict[str, Any]) -> list[Any]:
    """The points without what a clock says."""
    return [{k: v for k, v in point.items() if k not in ("latency", "key")} for point in result["points"]]


def test_a_sweep_measures_what_pruning_alone_leaves(run: Path) -> None:
    result = sweep(sweep_of(run, kinds=["zeros"], rates=[0.0, 0.5, 0.9], timed=8))
    whole, half, tenth = result["points"]
    model, setting = Tiny(), Setting.of(checked(run))
    model.load_state_dict(load_file(run / "model.safetensors"))
    assert whole["stages"]["pruned"] == whole["stages"]["dense"]
    assert whole["stages"]["recalibrated"]["top1"] == accuracy(model, setting.measured()).top1 > 0.5
    assert result["dense"]["accuracy"] == whole["stages"]["recalibrated"]["top1"]
    assert whole["nonzero"] == whole["parameters"] == sum(p.numel() for p in model.parameters())
    assert half["nonzero"] == pytest.approx(whole["nonzero"] - 0.5 * 1864, abs=1)  # 1,864 prunable weights
    assert whole["sparse_flops"] > half["sparse_flops"] > tenth["sparse_flops"]
    assert tenth["accuracy"] == tenth["stages"]["recalibrated"]["top1"]
    assert tenth["latency"]["CPU"] > 0
    assert json.loads((run / "sweep" / "sweep.json").read_text()) == result
    table = (run / "sweep" / "table.md").read_text()
    assert table.count("\n") == 2 + 1 + 3
    assert "| dense | 0 % |" in table
    assert (run / "sweep" / "sweep.png").stat().st_size > 1000
    assert [row["rate"] for row in rows_of(result)] == ["0 %", "0 %", "50 %", "90 %"]


def test_a_killed_sweep_repeats_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = sweep_of(run, kinds=["zeros"], rates=[0.3, 0.6], timed=8)
    calls: list[float] = []
    whole = sweeping.outcome

    def dying(plan: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(0.0 if plan.recipe.prune is None else plan.recipe.prune.sparsity)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(plan, *args, **kwargs)

    monkeypatch.setattr(sweeping, "outcome", dying)
    with pytest.raises(KeyboardInterrupt):
        sweep(asked)
    result = sweep(asked)
    assert calls == [0.0, 0.3, 0.6, 0.6]
    assert sweep(asked) == result
    assert len(calls) == 4
    other = sweep_of(run, kinds=["zeros"], rates=[0.3], overrides={"prune.allocation": "uniform"}, timed=8)
    assert sweep(other)["points"][0]["accuracy"] is not None  # the old point is of another recipe
    assert len(calls) == 5


def test_a_sweep_may_retrain(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *args, **kwargs: (parts.append(kwargs["part"]), fit(*args, **kwargs))[1])
    retrain = {"retrain": {"schedule": "llr", "epochs": 1}}
    (point,) = sweep(sweep_of(run, kinds=["zeros"], rates=[0.9], overrides=retrain, timed=8))["points"]
    assert parts == [1]
    assert point["accuracy"] == point["stages"]["settled"]["top1"] > point["stages"]["recalibrated"]["top1"]
    assert point["epochs"] == 1
    assert not (run / "sweep" / "work").exists()


def test_the_dense_network_of_a_soup_is_swept_as_any(run: Path, tmp_path: Path) -> None:
    soup = {"members": 2, "line": 0, "plane": 0, "baselines": []}
    pruned = {"prune": {"sparsity": 0.8}, "retrain": {"schedule": "llr", "epochs": 1}}
    train_run(checked(tmp_path / "soup", **pruned, soup=soup))
    options: dict[str, Any] = {"kinds": ["zeros"], "rates": [0.5], "timed": 8}
    assert numbers(sweep(sweep_of(tmp_path / "soup", **options))) == numbers(sweep(sweep_of(run, **options)))


def test_a_state_dict_is_swept_as_its_run_is(run: Path, tmp_path: Path) -> None:
    made = raw(tmp_path)
    del made["out"]
    torch.save(load_file(run / "dense" / "model.safetensors"), tmp_path / "weights.pt")
    options: dict[str, Any] = {"kinds": ["zeros"], "rates": [0.5], "timed": 8}
    expected = numbers(sweep(sweep_of(run, **options)))
    for name in ("run/dense/model.safetensors", "weights.pt"):
        asked = sweep_of(tmp_path / name, recipe=made, out=tmp_path / f"out-{name[:3]}", **options)
        assert numbers(sweep(asked)) == expected
    retrain = {"retrain.epochs": 1}
    retrained = sweep_of(tmp_path / "weights.pt", recipe=made, overrides=retrain, out=tmp_path / "r", **options)
    assert sweep(retrained)["points"][0]["epochs"] == 1


def test_mistakes_end_in_one_line(run: Path, tmp_path: Path, call: Any) -> None:
    other = {**raw(tmp_path), "model": "resnet8"}
    del other["out"]
    (tmp_path / "broken.safetensors").write_bytes(b"nonsense")
    (tmp_path / "empty").mkdir()
    torch.save([1], tmp_path / "list.pt")
    torch.save({"0.weight": torch.zeros(1)}, tmp_path / "other.pt")
    wrong: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"start": tmp_path / "nowhere"}, {}, "is not there; give the folder of a finished run"),
        ({"start": tmp_path / "empty"}, {}, "run its recipe first"),
        ({"kinds": ["zeroes"]}, {}, "sweep.kinds.0: Input should be 'zeros'"),
        ({"rates": [0.5, 1]}, {}, "sparsity is the share of zeros, in [0, 1)"),
        ({"rates": "half"}, {}, "sweep.rates"),
        ({"timed": 0}, {}, "sweep.timed"),
        ({"image": 8}, {}, "unknown key 'sweep.image'"),
        ({}, {"retrain": {"epochs": -1}}, "retrain.epochs"),
        ({}, {"retrain": {"epochs": 1, "schedule": "lr"}}, "retrain.schedule"),
        ({}, {"train": {"lr": 1}}, "was trained otherwise"),
        ({"start": run / "model.safetensors"}, {}, "needs the recipe of its network as `base`"),
        ({"start": tmp_path / "broken.safetensors"}, other, "is not a complete safetensors file"),
        ({"start": tmp_path / "list.pt"}, other, "holds a list, not a state dict"),
        ({"start": tmp_path / "other.pt"}, other, "is not of the recipe's network"),
    ]
    for asked, base, message in wrong:
        file = {"sweep": {"start": str(run), **asked}, "base": base}
        file["sweep"]["start"] = str(file["sweep"]["start"])
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(file))
        status, _, error = call("grid", tmp_path / "sweep.yaml")
        assert (status, message in error, error.count("\n")) == (2, True, 1), (file, error)
    assert not (run / "sweep").exists()


def test_the_command_shows_a_row_a_point(run: Path, tmp_path: Path, call: Any) -> None:
    asked = {"start": str(run), "kinds": ["zeros"], "rates": [0.5, 0.8], "timed": 8}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"sweep": asked}))
    status, out, _ = call("grid", tmp_path / "sweep.yaml")
    assert status == 0
    assert out.count("zeros") >= 2
    assert "sweep.json" in out


def test_latency_is_that_of_the_model_given() -> None:
    class Slow(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            Slow.calls += 1
            return x @ torch.ones(600, 600)

    model = Slow()
    slow, fast = latency(model, torch.zeros(600, 600), repeats=5), latency(nn.Identity(), torch.zeros(1), repeats=5)
    assert model.training
    assert Slow.calls == 8
    assert slow > 3 * fast
    with pytest.raises(ValueError, match="at least 1 repeat"):
        latency(model, torch.zeros(1), repeats=0)
