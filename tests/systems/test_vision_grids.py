"""Grids of classifiers on handwritten digits: tuning, shared dense trainings, threads, failures, kills, the demo."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from corrupt_images import make  # pyright: ignore[reportMissingImports] - a script, on pytest's path

from prunus.jobs import pictures_of
from prunus.jobs.store import closure
from prunus.recipe import ClassifierRecipe, Unfinished, parse
from prunus.run import digits as showing
from prunus.run.compare import GridJobs, compare, compare_all, load_grids, tabulate
from prunus.run.grid import Grid, final_members, likely_members, load_grid, tuning_members
from prunus.run.show import grid_rows
from prunus.vision import stages
from prunus.vision.setting import Setting
from prunus.vision.train import train_run
from tests.processes import start_command
from tests.systems.test_cli import call
from tests.systems.test_vision import few, learning, raw, tiny

__all__ = ["call", "few", "learning", "tiny"]


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


def test_a_cell_is_judged_with_the_values_that_are_tried_for_it(tmp_path: Path) -> None:
    def asked(*values: dict[str, Any]) -> Grid:
        axes: dict[str, Any] = {"method": {"LC": {"during": "lc", "train.weight_decay": 0}}}
        tune = {"by": "accuracy", "axis": "method", "cells": {"LC": {"values": list(values)}}}
        return grid(tmp_path, axes=axes, tune=tune, more_seeds=None)

    found = asked({"during.lc.mu": 1e-3}, {"during.lc.mu": 2e-3})  # without any, LC has no penalty
    assert [each.recipe.during for each in likely_members(found, {})] == [{"lc": {"mu": 1e-3}}]
    with pytest.raises(ValueError, match=r"LC: .*its penalty is the weight decay"):
        asked({"during.lc.mu": 1e-3}, {"train.lr": 0.1})


def test_methods_have_their_steps_counted_before_any_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(delta: int) -> Grid:
        axes: dict[str, Any] = {"method": {"RigL": {"during": {"rigl": {"delta": delta}}}}}
        return grid(tmp_path, axes=axes, tune=None, more_seeds=None)

    monkeypatch.delattr("prunus.vision.setting.read_images")
    GridJobs(asked(1)).look()
    with pytest.raises(ValueError, match="delta"):
        GridJobs(asked(10_000)).look()


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


@pytest.mark.usefixtures("learning")
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
    assert len(list(tmp_path.glob("dense/*/metrics.json"))) == 5
    found = {(row["sparsity"], row["method"]): row for row in rows}
    assert found["90 %", "LLR"]["seeds"] == [0, 1]
    assert found["90 %", "LLR"]["tuned"] == {"retrain.lr": 0.1}
    assert found["80 %", "GMP"]["tuned"] == {"train.lr": 0.1, "during.gmp.every": 0.2}
    assert "train.lr=0.1, during.gmp.every=0.2" in {row["chosen"] for row in grid_rows(rows)}
    assert found["80 %", "LLR"]["accuracy"]["mean"] > found["80 %", "pruned"]["pruned"]["mean"]
    assert not [*tmp_path.glob("members/*.safetensors"), *tmp_path.glob("starts"), *tmp_path.glob("trainings")]
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
@pytest.mark.parametrize("together", [1, 3])
def test_grids_in_one_folder_and_their_tries_share_dense_networks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """Where images are held out in any case, the value that was chosen is not trained again; and each of two grids
    reads what the other trained, on whatever images that was measured."""
    trained: list[Any] = []
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *args, **kwargs: (trained.append(1), fit(*args, **kwargs))[1])
    base = raw(tmp_path)
    del base["out"]
    base |= {"images": {**base["images"], "measure_on": "both", "validation": 0.25}, "retrain": None}
    asked: dict[str, Any] = {
        "base": base,
        "axes": {
            "lr": {"0.1": {"train.lr": 0.1}, "tuned": {"train.epochs": 1}},
            "rate": {f"{rate} %": {"prune.sparsity": rate / 100} for rate in (50, 90)},
        },
        "seeds": [0, 1],
    }
    tune: dict[str, Any] = {
        "by": "accuracy",
        "axis": "lr",
        "cells": {"tuned": {"key": "train.lr", "values": [0.01, 0.1]}},
    }
    tune["cells"]["tuned"]["at"] = {"rate": "90 %"}
    for name, more in (("one", {"tune": tune}), ("two", {})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**asked, **more}))
    grids = load_grids([tmp_path / "one.yaml", tmp_path / "two.yaml"], tmp_path / "both")
    one, _ = compare_all(grids, together=together)
    # Two seeds of lr 0.1; two values with the first seed, the better one with the second; the rest of the second grid.
    assert len(trained) == len(list(tmp_path.glob("both/dense/*/metrics.json"))) <= 2 + 3 + 1
    alone = compare(load_grid(tmp_path / "one.yaml", tmp_path / "alone"))
    results = [{key: row[key] for key in ("accuracy", "dense", "pruned", "tuned")} for row in one]
    assert results == [{key: row[key] for key in ("accuracy", "dense", "pruned", "tuned")} for row in alone]
    measured = {str(json.loads(p.read_text())["measured_on"]) for p in tmp_path.glob("both/one/members/*.json")}
    assert measured == {"validation", "test"}


@pytest.mark.usefixtures("tiny")
def test_a_member_is_the_same_alone_beside_others_and_in_prunus_train(tmp_path: Path) -> None:
    one = compare(grid(tmp_path / "one", **SMALL))
    beside = compare(grid(tmp_path / "beside", **SMALL), together=3)
    assert [row["accuracy"] for row in one] == [row["accuracy"] for row in beside]
    asked = grid(tmp_path / "one", **SMALL)
    alone = [train_run(asked.recipe({"method": "LLR"}, seed, {"out": str(tmp_path / str(seed))})) for seed in (0, 1)]
    assert 50 * sum(result["accuracy"] for result in alone) == pytest.approx(one[1]["accuracy"]["mean"])


def test_pictures_of_another_layout_do_not_stay(tmp_path: Path) -> None:
    (tmp_path / "grid-sparsity.png").write_bytes(b"of an earlier call")
    assert tabulate(grid(tmp_path)) == []
    assert pictures_of(tmp_path) == []


def test_where_members_fail_the_page_shows_what_is_finished(
    tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(grids: list[Grid], **asked: Any) -> Any:
        cell = {"method": "LLR", "seeds": [0], "tuned": {}, "accuracy": {"mean": 98.0, "std": None}}
        (tmp_path / "table.json").write_text(json.dumps([cell]))
        raise Unfinished("1 job failed")

    monkeypatch.setattr("prunus.run.compare.compare_all", failing)
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(grid(tmp_path).model_dump(exclude_none=True)))
    status, _, error = call("grid", tmp_path / "grid.yaml")
    assert (status, error) == (1, "prunus: 1 job failed\n")
    assert "98.00" in (tmp_path / "report.html").read_text()


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
        with pytest.raises(RuntimeError, match="1 job failed, 2 for want of them; the first: RuntimeError: out of"):
            compare(grid(tmp_path, **SMALL))
    errors = [path.read_text() for path in tmp_path.glob("members/*.error.txt")]
    assert ["what it starts from failed" in error for error in errors] == [True, True]
    assert [row["seeds"] for row in json.loads((tmp_path / "table.json").read_text())] == [[0], [0]]
    assert [row["seeds"] for row in compare(grid(tmp_path, **SMALL))] == [[0, 1], [0, 1]]


@pytest.mark.usefixtures("tiny")
def test_grids_run_side_by_side_as_each_alone(tmp_path: Path) -> None:
    other = {**SMALL, "axes": {"method": {"FT": {"retrain": {"schedule": "ft", "epochs": 1}}}}}
    alone = [compare(grid(tmp_path / "alone", **SMALL)), compare(grid(tmp_path / "other", **other))]
    paths = []
    for name, changes in (("b", SMALL), ("a", other)):
        paths.append(tmp_path / f"{name}.yaml")
        paths[-1].write_text(yaml.safe_dump(grid(tmp_path, **changes).model_dump(mode="json"), sort_keys=False))
    together = compare_all(load_grids(paths, tmp_path / "both"), together=2)
    assert [[row["accuracy"] for row in rows] for rows in together] == [
        [row["accuracy"] for row in rows] for rows in alone
    ]
    with pytest.raises(ValueError, match="two grids would be written to"):
        compare_all([grid(tmp_path), grid(tmp_path)])


def test_a_tuned_cell_joins_when_all_its_tries_have_ended_and_waits_for_no_other(tmp_path: Path) -> None:
    asked = grid(tmp_path)
    (tmp_path / "members").mkdir()
    jobs = GridJobs(asked)

    def known(measured_on: str) -> list[Any]:
        members = [job.what.__self__ for job in jobs.jobs()]  # type: ignore[attr-defined]
        return [member for member in members if member.recipe.images.measure_on == measured_on]

    def final() -> dict[str, set[Any]]:
        """Method -> learning rates of retraining that its members on test images got."""
        found: dict[str, set[Any]] = {}
        for member in known("test"):
            found.setdefault(member.labels["method"], set()).add(member.tuned.get("retrain.lr"))
        return found

    assert final() == {"pruned": {None}, "BIMP": {None}}
    # 4 + 4 * 2 members, 6 tries, and the dense trainings: of two seeds and two lengths, and of the tries of LLR;
    # what 3 members prune and 3 retrain, BIMP twice, GMP at once, and the same of the tries.
    parts = Counter(job.room for job in closure(jobs.expected(), asked.store.finished))
    assert parts == {"members": 12 + 6, "dense": 2 * 2 + 1, "starts": 3 + 3 * 2 + 3 + 1 + 4, "trainings": 3 + 3 * 2 + 2}
    tries = [member.key for member in known("validation") if "retrain.lr" in member.tuned]
    assert len(tries) == 2
    (tmp_path / "members" / f"{tries[0]}.json").write_text('{"accuracy": 0.5}')
    assert final() == {"pruned": {None}, "BIMP": {None}}
    (tmp_path / "members" / f"{tries[1]}.error.txt").write_text("out of memory")
    assert final() == {"pruned": {None}, "BIMP": {None}, "LLR": {1e-6}}  # the only try that ended well


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
    with pytest.raises(ValueError, match="together are at least 1"):
        compare(grid(tmp_path), together=0)


def _methods(out: Path, **options: Any) -> Grid:
    axes = {"method": {"dense": {"prune": None}, "RigL": {"during": {"rigl": options}}}}
    return grid(out, **SMALL | {"axes": axes, "seeds": [0]})


def test_a_method_that_a_member_leaves_too_few_steps_is_refused_before_any_training(tmp_path: Path, tiny: None) -> None:
    """By what members are run with: where a value is tried for all, that of the cell itself is not."""
    with pytest.raises(ValueError, match=r"^RigL: RigL with delta=1000 changes nothing before"):
        compare(_methods(tmp_path / "wrong", delta=1000))
    assert not list((tmp_path / "wrong").glob("*/*"))
    asked = _methods(tmp_path / "tuned", delta=1000).model_dump()
    tried = {"by": "accuracy", "axis": "method", "cells": {"RigL": {"key": "during.rigl.delta", "values": [1, 2]}}}
    assert len(compare(parse(asked | {"tune": tried}, Grid, "grid.yaml"))) == 2


@pytest.mark.slow
def test_a_grid_killed_for_good_repeats_nothing_finished(tmp_path: Path, few: str) -> None:
    def asked(out: Path) -> dict[str, Any]:
        made = grid(out, **SMALL).model_dump(mode="json")
        made["base"]["images"] = few
        made["base"]["train"]["epochs"] = 1
        return made

    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(asked(tmp_path / "killed")))
    process = start_command("grid", tmp_path / "grid.yaml", "--workers", "2")
    deadline = time.monotonic() + 120
    while not (done := list((tmp_path / "killed").glob("dense/*/metrics.json"))):
        assert process.exitcode is None, "the grid ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    times = {path: path.stat().st_mtime_ns for path in done}
    resumed = compare(parse(asked(tmp_path / "killed"), Grid, "killed"))
    whole = compare(parse(asked(tmp_path / "whole"), Grid, "whole"))
    assert [row["accuracy"] for row in resumed] == [row["accuracy"] for row in whole]
    assert {path: path.stat().st_mtime_ns for path in done} == times


def test_a_grid_shows_what_corruptions_do_and_does_not_choose_by_them(tiny: None, tmp_path: Path) -> None:
    folder = str(tmp_path / "sets")
    base = {"prune": {"sparsity": 0.8}, "corruptions": {"names": ["fog"], "severities": [1, 3], "folder": folder}}
    make(parse(raw(tmp_path / "grid", **base), ClassifierRecipe, "test"), "fog")
    columns = ["corrupted.accuracy", "corrupted.loss", "corrupted.severity_3", "corrupted.fog"]
    shown = {"seeds": [0], "show": {"columns": columns}}
    asked = grid(tmp_path / "grid", **{**SMALL, "base": raw(tmp_path / "grid", **base)} | shown)
    tuned = asked.task.recipe(asked.base, 0, tuning=True, where="here")
    assert tuned.corruptions is None
    rows = compare(asked)
    for row in rows:
        assert row["metrics"]["corrupted.fog"]["mean"] == pytest.approx(row["metrics"]["corrupted.accuracy"]["mean"])
        assert row["metrics"]["corrupted.severity_3"]["mean"] < row["accuracy"]["mean"]
    table = (tmp_path / "grid" / "table.md").read_text()
    assert f"{rows[0]['metrics']['corrupted.severity_3']['mean']:.2f}" in table
    assert "corrupted.loss" in table
