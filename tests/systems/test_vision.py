"""Classifier recipes: what is refused, one run from end to end, kills and resumes, grids on handwritten digits."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from prunus.evaluate.accuracy import accuracy
from prunus.evaluate.cost import cost
from prunus.masks import Masks
from prunus.report import read_metrics
from prunus.run import workers
from prunus.run.compare import compare
from prunus.run.grid import Grid, final_members, tuning_members
from prunus.run.recipe import parse
from prunus.run.vision import demo as showing
from prunus.run.vision import setting as settings
from prunus.run.vision import stages
from prunus.run.vision.experiment import budgets
from prunus.run.vision.recipe import ClassifierRecipe, Retraining, dense_key
from prunus.run.vision.setting import Setting
from prunus.run.vision.train import prune_run, pruning_of, train_run
from tests.systems.test_cli import start

TRAIN = {"epochs": 2, "batch_size": 32, "lr": 0.1, "warmup": 0, "augment": {"crop": 1}}


class Tiny(nn.Sequential):
    """Two convolutions with BatchNorm and a head, 2,378 prunable weights: members of a hundredth of a second."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
        )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes build the tiny network, whatever they name."""
    monkeypatch.setattr(settings, "build_model", lambda name, *, classes, channels: Tiny())
    monkeypatch.setattr(stages, "_operations", {})


def raw(out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "images": {"source": "digits"},
        "model": "resnet8",
        "train": TRAIN,
        "device": "cpu",
        "out": str(out),
    } | changes


def checked(out: Path, **changes: Any) -> ClassifierRecipe:
    return parse(raw(out, **changes), ClassifierRecipe, "test")


PRUNED = {"prune": {"sparsity": 0.8}, "retrain": {"schedule": "llr", "epochs": 1}}

WRONG = [
    ({"images": "./nowhere"}, "images.source: no file or folder"),
    ({"images": {"source": "digits", "measure_on": "train"}}, "images.measure_on"),
    ({"model": "resnet9"}, "no model 'resnet9'"),
    ({"train": {"schedule": "cosin"}}, "use constant, linear, cosine, or one of {multistep: milestones in epochs}"),
    ({"train": {"schedule": {"multistep": 3}}}, "multistep takes milestones in epochs"),
    ({"train": {"epochs": 2, "warmup": 2}}, "set a smaller warmup"),
    ({"train": {"schedule": {"one_cycle": 0.3}}}, "set warmup: 0"),
    ({"train": {"snapshots": [31]}}, "epoch 31 lies behind the end"),
    ({"train": {"nesterov": True, "momentum": 0}}, "nesterov needs momentum"),
    ({"prune": {"sparsity": 1.0}}, "[0, 1)"),
    ({"prune": {"pattern": "2:4", "phases": 2}}, "leave out allocation and phases"),
    ({"prune": {}, "retrain": {"schedule": "llr"}}, "give either epochs or share"),
    ({"prune": {}, "retrain": {"epochs": 1, "share": 0.1}}, "not both"),
    ({"prune": {}, "retrain": {"epochs": 1, "rewind": 1}}, "set train.snapshots: [1]"),
    ({"retrain": {"epochs": 1}}, "retrain needs prune.sparsity"),
    ({"during": "gmp"}, "during needs prune.sparsity"),
    ({"prune": {}, "during": "gmpp"}, "did you mean 'gmp'?"),
    ({"prune": {}, "during": {"gmp": {"evry": 1}}}, "did you mean 'every'?"),
    ({"prune": {}, "during": {"rigl": {"alpha": 2.0}}}, "alpha"),
    ({"prune": {"phases": 2}, "during": "gmp"}, "prune.phases: a method that prunes during training"),
    ({"device": "gpu"}, "a device is auto, cpu"),
    ({"epochs": 3}, "unknown key 'epochs'"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_recipes_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse({"images": "digits", **changes}, ClassifierRecipe, "test")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_nm_pattern_says_its_sparsity() -> None:
    prune = parse({"images": "digits", "prune": {"pattern": "2:4"}}, ClassifierRecipe, "test").prune
    assert prune is not None
    assert (prune.sparsity, prune.allocation) == (0.5, "uniform")


@pytest.mark.parametrize(
    ("asked", "phases", "expected"),
    [
        ({"epochs": 2}, 3, [20, 20, 20]),
        ({"epochs": 2, "of": "total"}, 3, [6, 6, 8]),
        ({"share": 0.25}, 1, [25]),
        ({"share": 0.001}, 1, [1]),
    ],
)
def test_budgets_are_exact_in_steps(asked: dict[str, Any], phases: int, expected: list[int]) -> None:
    assert budgets(Retraining(**asked), phases, dense_steps=100, epoch_steps=10) == expected
    assert budgets(None, 2, dense_steps=100, epoch_steps=10) == [0, 0]


def test_what_decides_the_dense_training_is_in_its_key(tmp_path: Path) -> None:
    plain = dense_key(checked(tmp_path))
    same = [PRUNED, {"recalibrate": 0.5}, {"train": {**TRAIN, "evaluate_every": 1}}, {"capture": "auto"}]
    assert {dense_key(checked(tmp_path, **changes)) for changes in same} == {plain}
    other = [{"seed": 1}, {"train": {**TRAIN, "lr": 0.2}}, {"images": {"source": "digits", "measure_on": "validation"}}]
    assert len({plain, *(dense_key(checked(tmp_path, **changes)) for changes in other)}) == 4


@pytest.mark.usefixtures("tiny")
def test_a_run_leaves_what_it_says(tmp_path: Path) -> None:
    recipe = checked(tmp_path, **PRUNED, train={**TRAIN, "evaluate_every": 1})
    result = train_run(recipe)
    assert list(result["stages"]) == ["dense", "pruned", "recalibrated", "retrained"]
    assert result["accuracy"] == result["stages"]["retrained"]["top1"]
    assert result["epochs"] == 3
    assert result["phases"][0]["share"] == 0.5
    names = "dense masks.safetensors metrics.jsonl model.safetensors prunus.json recipe.yaml report.png result.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == names.split()

    model, setting = Tiny(), Setting.of(recipe)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    masks = Masks.load(tmp_path / "masks.safetensors")
    masks.check(model)
    assert masks.sparsity == result["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert accuracy(model, setting.measured()).top1 == result["accuracy"]
    counted = asdict(cost(model, next(setting.measured())[0][:1], masks))
    assert counted["speedup"] > 2
    assert {name: result[name] for name in counted} == counted
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["stage"] for row in rows] == ["train", "train", *result["stages"], "phase"]
    assert rows[1]["top1"] == result["stages"]["dense"]["top1"] > 0.5
    assert train_run(recipe) == json.loads((tmp_path / "result.json").read_text())
    with pytest.raises(ValueError, match="result of another recipe"):
        train_run(checked(tmp_path, **PRUNED))


class Killed(Exception):
    """The run was killed here."""


def same_bits(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dies_in", ["dense", "the first phase", "the second phase"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_in: str) -> None:
    changes: dict[str, Any] = {
        "train": {**TRAIN, "snapshots": [1]},
        "prune": {"sparsity": 0.8, "phases": 2},
        "retrain": {"schedule": "allr", "epochs": 1, "rewind": 1},
    }
    whole = train_run(checked(tmp_path / "whole", **changes))
    place = ["dense", "the first phase", "the second phase"].index(dies_in)
    calls, train = 0, stages.train

    def dying(model: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1

        def until_killed(step: int) -> Any:
            if calls - 1 == place and step == 7:
                raise Killed
            return batches(step)

        return train(model, until_killed, *args, **{**kwargs, "save_every": 3})

    monkeypatch.setattr(stages, "train", dying)
    with pytest.raises(Killed):
        train_run(checked(tmp_path / "killed", **changes))
    begun = calls
    monkeypatch.setattr(
        settings.ImageBatches, "__call__", _counting(steps := Counter(), settings.ImageBatches.__call__)
    )
    place = -1
    resumed = train_run(checked(tmp_path / "killed", **changes))
    assert calls == begun + 3 - ["dense", "the first phase", "the second phase"].index(dies_in)
    assert min(steps) == 6 or dies_in != "the second phase"  # from the checkpoint, not from the beginning
    assert same_bits(tmp_path / "whole", tmp_path / "killed")
    timed = ("seconds", "train_seconds", "images_per_second", "key")
    assert [resumed[k] for k in resumed if k not in (*timed, "stages")] == [
        whole[k] for k in whole if k not in (*timed, "stages")
    ]
    assert resumed["stages"].keys() == whole["stages"].keys()
    assert not (tmp_path / "killed" / "work").exists()


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("method", ["gmp", "str", "rigl"])
def test_a_method_killed_in_training_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    options = {"rigl": {"delta": 5}}.get(method, {})
    changes: dict[str, Any] = {"during": {method: options}, "prune": {"sparsity": 0.8}}
    whole = train_run(checked(tmp_path / "whole", **changes))
    train = stages.train

    def dying(model: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        def until_killed(step: int) -> Any:
            if step == 50:
                raise Killed
            return batches(step)

        return train(model, until_killed, *args, **{**kwargs, "save_every": 20})

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", dying)
        with pytest.raises(Killed):
            train_run(checked(tmp_path / "killed", **changes))
    monkeypatch.setattr(
        settings.ImageBatches, "__call__", _counting(steps := Counter(), settings.ImageBatches.__call__)
    )
    assert train_run(checked(tmp_path / "killed", **changes))["stages"] == whole["stages"]
    assert min(steps) == 40
    assert same_bits(tmp_path / "whole", tmp_path / "killed")


def _counting(steps: Counter[int], call: Any) -> Any:
    def counted(self: Any, step: int) -> Any:
        steps[step] += 1
        return call(self, step)

    return counted


@pytest.mark.usefixtures("tiny")
def test_a_method_during_training_is_retrained_under_its_masks(tmp_path: Path) -> None:
    recipe = checked(tmp_path, during={"gmp": {"every": 0.25}}, **PRUNED)
    result = train_run(recipe)
    assert list(result["stages"]) == ["pruned", "recalibrated", "retrained"]
    assert result["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert result["epochs"] == 3
    with pytest.raises(ValueError, match="its network was pruned while it was trained"):
        pruning_of(tmp_path, {"prune.sparsity": 0.5})


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_is_pruned_again_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run(checked(tmp_path / "run"))
    both = train_run(checked(tmp_path / "both", prune={"sparsity": 0.7}, retrain={"schedule": "slr", "epochs": 1}))
    calls: list[int] = []
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *args, **kwargs: (calls.append(kwargs["part"]), fit(*args, **kwargs))[1])
    asked = {"prune.sparsity": 0.7, "retrain.schedule": "slr", "retrain.epochs": 1}
    recipe = pruning_of(tmp_path / "run", asked)
    assert prune_run(recipe, tmp_path / "run")["accuracy"] == both["accuracy"]
    assert calls == [1]
    assert same_bits(tmp_path / "run" / "pruned", tmp_path / "both")
    for changes, message in [({"train.lr": 1.0}, "only prune, retrain"), ({}, "give --sparsity")]:
        with pytest.raises(ValueError, match=message):
            pruning_of(tmp_path / "run", {**({"prune.sparsity": 0.5} if changes else {}), **changes})
    with pytest.raises(FileNotFoundError, match="train one first"):
        pruning_of(tmp_path / "nowhere", {})


def grid(out: Path, **changes: Any) -> Grid:
    base = raw(out, prune={"sparsity": 0.8})
    del base["out"]
    asked: dict[str, Any] = {
        "base": base,
        "axes": {
            "sparsity": {"80 %": {}, "90 %": {"prune.sparsity": 0.9}},
            "method": {
                "pruned": {},
                "LLR": {"retrain": {"schedule": "llr", "epochs": 1}},
                "BIMP": {"train.epochs": 1, "prune.phases": 2, "retrain": {"epochs": 2, "of": "total"}},
                "GMP": {"during": "gmp"},
            },
        },
        "tune": {
            "by": "accuracy",
            "axis": "method",
            "cells": {
                "LLR": {"key": "retrain.lr", "values": [1e-6, 0.1], "at": {"sparsity": "80 %"}},
                "GMP": {"values": [{"train.lr": 1e-6}, {"train.lr": 0.1, "during.gmp.every": 0.2}]},
            },
        },
        "more_seeds": {"seeds": [1], "where": {"sparsity": ["90 %"]}},
        "show": {"columns": ["pruned", "sparsity", "initial_lr"]},
        "out": str(out),
    }
    return parse(asked | changes, Grid, "grid.yaml")


SMALL: dict[str, Any] = {
    "axes": {"method": {"dense": {"prune": None}, "LLR": {"retrain": {"schedule": "llr", "epochs": 1}}}},
    "tune": None,
    "more_seeds": None,
    "seeds": [0, 1],
}


def test_members_that_choose_values_never_see_the_test_images(tmp_path: Path) -> None:
    asked = grid(tmp_path)
    tuning = tuning_members(asked)
    assert len(tuning) == 2 + 2 * 2
    assert {member.recipe.images.measure_on for member in tuning} == {"validation"}
    results = {m.key: {"accuracy": m.recipe.train.lr + 10 * (m.tuned.get("retrain.lr") or 0)} for m in tuning}
    final = final_members(asked, results)
    assert {member.recipe.images.measure_on for member in final} == {"test"}
    assert len(final) == 4 + 4 * 2
    chosen = {m.labels["method"]: m.tuned for m in final}
    assert chosen["LLR"] == {"retrain.lr": 0.1}
    assert chosen["GMP"] == {"train.lr": 0.1, "during.gmp.every": 0.2}


@pytest.mark.usefixtures("tiny")
def test_a_grid_trains_each_dense_network_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[tuple[int, int, bool]] = []
    fit = stages.fit

    def counted(model: Any, setting: Setting, *args: Any, **kwargs: Any) -> Any:
        dense = kwargs["part"] == 0 and setting.recipe.during is None
        parts.append((setting.recipe.seed, setting.recipe.train.epochs, dense))
        return fit(model, setting, *args, **kwargs)

    monkeypatch.setattr(stages, "fit", counted)
    asked = grid(tmp_path)
    rows = compare(asked)
    assert len(rows) == 8
    dense = Counter(part for part in parts if part[2])
    # Two seeds of the long and of the short training, and the one that the tuning of LLR starts from.
    assert dense == {(0, 2, True): 2, (1, 2, True): 1, (0, 1, True): 1, (1, 1, True): 1}
    assert len(list((tmp_path / "dense").iterdir())) == 5
    found = {(row["sparsity"], row["method"]): row for row in rows}
    assert found["90 %", "LLR"]["seeds"] == [0, 1]
    assert found["90 %", "LLR"]["tuned"] == {"retrain.lr": 0.1}
    assert found["80 %", "GMP"]["tuned"] == {"train.lr": 0.1, "during.gmp.every": 0.2}
    assert found["80 %", "LLR"]["accuracy"]["mean"] > found["80 %", "pruned"]["pruned"]["mean"]
    assert not list(tmp_path.glob("members/*.safetensors"))
    table = (tmp_path / "table.md").read_text()
    assert "| method | 80 % | 90 % |" in table
    assert "| sparsity | method | accuracy | pruned | sparsity, measured | initial_lr |" in table
    assert (tmp_path / "grid.png").stat().st_size > 1000

    parts.clear()
    assert compare(asked) == json.loads(json.dumps(rows))
    shutil.rmtree(tmp_path / "members")
    shutil.rmtree(tmp_path / "dense")
    assert compare(asked) == json.loads(json.dumps(rows))  # from members.jsonl alone
    assert parts == []


@pytest.mark.usefixtures("tiny")
def test_a_member_is_the_same_alone_beside_others_and_in_prunus_train(tmp_path: Path) -> None:
    one = compare(grid(tmp_path / "one", **SMALL))
    beside = compare(grid(tmp_path / "beside", **SMALL), together=3)
    assert [row["accuracy"] for row in one] == [row["accuracy"] for row in beside]
    asked = grid(tmp_path / "one", **SMALL)
    alone = [train_run(asked.recipe({"method": "LLR"}, seed, {"out": str(tmp_path / str(seed))})) for seed in (0, 1)]
    assert 50 * sum(result["accuracy"] for result in alone) == pytest.approx(one[1]["accuracy"]["mean"])


@pytest.mark.usefixtures("tiny")
def test_what_starts_from_a_failed_training_fails_with_it_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit = stages.fit

    def failing(model: Any, setting: Setting, *args: Any, **kwargs: Any) -> Any:
        if setting.recipe.seed == 1 and kwargs["part"] == 0:
            raise RuntimeError("out of memory")
        return fit(model, setting, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(stages, "fit", failing)
        with pytest.raises(RuntimeError, match="2 members failed"):
            compare(grid(tmp_path, **SMALL))
    errors = sorted(path.read_text() for path in tmp_path.glob("members/*.error.txt"))
    assert sum("out of memory" in error for error in errors) == 1
    assert sum("what it starts from failed" in error for error in errors) == 1
    assert [row["seeds"] for row in json.loads((tmp_path / "table.json").read_text())] == [[0], [0]]
    assert [row["seeds"] for row in compare(grid(tmp_path, **SMALL))] == [[0, 1], [0, 1]]


@pytest.mark.usefixtures("tiny")
def test_after_the_minutes_nothing_begins(tmp_path: Path) -> None:
    assert compare(grid(tmp_path), minutes=0) == []
    assert not list(tmp_path.glob("members/*.json"))
    assert "Nothing is finished" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("tiny")
def test_the_demo_shows_a_table_and_leaves_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(showing, "EPOCHS", 4)
    monkeypatch.setattr(showing, "RETRAINED", 1)
    made = showing.recipe(0.9, tmp_path)
    monkeypatch.setattr(showing, "recipe", lambda *_: made | {"seeds": [0]})
    rows = showing.demo(tmp_path, 0.9)
    assert [row["method"] for row in rows] == ["dense", "pruned", "FT", "LLR", "ALLR", "BIMP", "GMP"]
    assert {row["metrics"]["epochs"]["mean"] for row in rows[2:]} == {5.0}
    assert {round(row["metrics"]["sparsity"]["mean"], 1) for row in rows[1:]} == {90.0}
    shown = capsys.readouterr().out
    assert all(row["method"] in shown for row in rows)
    assert {"table.json", "table.md", "grid.png", "members.jsonl"} <= {path.name for path in tmp_path.iterdir()}


def test_a_member_of_a_dead_process_is_waited_for_by_nobody(tmp_path: Path) -> None:
    (tmp_path / "members").mkdir()
    assert workers._pending(tmp_path, "x")  # not begun
    assert workers._claim(tmp_path, "x")
    assert not workers._claim(tmp_path, "x")
    assert workers._pending(tmp_path, "x")  # this process has it, and is alive
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / "members" / "x.claim").write_text(str(process.pid))
    assert not workers._pending(tmp_path, "x")
    workers.clear(tmp_path)
    assert workers._claim(tmp_path, "x")


def test_wrong_grids_of_classifiers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by: accuracy"):
        grid(tmp_path, tune={"text": "x", "axis": "method", "cells": {}})
    with pytest.raises(ValueError, match="did you mean 'speedup'"):
        grid(tmp_path, show={"columns": ["speed_up"]})
    with pytest.raises(ValueError, match="'LLLR' is not a label of method"):
        grid(tmp_path, tune={"by": "accuracy", "axis": "method", "cells": {"LLLR": {"values": [{}]}}})
    with pytest.raises(ValueError, match="80 % / LLR is skipped, and LLR is tuned there"):
        grid(tmp_path, skip=[{"sparsity": ["80 %"], "method": ["LLR"]}])
    with pytest.raises(ValueError, match="give the key"):
        grid(tmp_path, tune={"by": "accuracy", "axis": "method", "cells": {"LLR": {"values": [1]}}})
    with pytest.raises(ValueError, match="together 1"):
        compare(grid(tmp_path), together=0)


@pytest.mark.slow
def test_a_grid_killed_for_good_repeats_nothing_finished(tmp_path: Path) -> None:
    def asked(out: Path) -> dict[str, Any]:
        made = grid(out, **SMALL).model_dump(mode="json")
        made["base"]["train"]["epochs"] = 1
        return made

    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(asked(tmp_path / "killed")))
    process = start("compare", tmp_path / "grid.yaml", "--workers", "2")
    deadline = time.monotonic() + 120
    while not (done := list((tmp_path / "killed").glob("dense/*/metrics.json"))):
        assert process.poll() is None, "the grid ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    times = {path: path.stat().st_mtime_ns for path in done}
    resumed = compare(parse(asked(tmp_path / "killed"), Grid, "killed"))
    whole = compare(parse(asked(tmp_path / "whole"), Grid, "whole"))
    assert [row["accuracy"] for row in resumed] == [row["accuracy"] for row in whole]
    assert {path: path.stat().st_mtime_ns for path in done} == times
