"""Soups in grids: corrupted images, starts chosen once, accuracy by phase, averages made beside other trainings."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import soup_tables
import torch
import yaml
from corrupt_images import make, recipes  # pyright: ignore[reportMissingImports] - a script, on pytest's path
from safetensors.torch import load_file

from prunus.data.images import plain_batches
from prunus.jobs.store import Store
from prunus.jobs.tables import by_phase
from prunus.measure import corrupted_sets
from prunus.measure.accuracy import accuracy
from prunus.measure.ensemble import ensemble_accuracy
from prunus.recipe import ClassifierRecipe, parse
from prunus.run.compare import compare
from prunus.run.grid import Grid
from prunus.run.show import show_soup
from prunus.vision import jobs, stages
from prunus.vision.setting import Setting
from prunus.vision.soups.averaging import averaged
from prunus.vision.soups.rows import _on_corrupted
from prunus.vision.train import train_run
from tests.systems.test_soups import asked, held_out, row
from tests.systems.test_vision import raw, tiny

__all__ = ["tiny"]


def grid_of(out: Path, axes: dict[str, Any], **changes: Any) -> dict[str, Any]:
    base = {key: value for key, value in asked(out, **changes).model_dump(mode="json").items() if key != "out"}
    return {"base": base, "axes": axes, "out": str(out)}


@pytest.mark.usefixtures("tiny")
def test_corruptions_are_measured_of_all_that_stands_beside_a_soup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Against each network, put together again, on each set, in turn."""
    chosen: list[Any] = []
    monkeypatch.setattr(
        "prunus.vision.soups.rows._on_corrupted", lambda *asked: chosen.append(asked[2:]) or _on_corrupted(*asked)
    )
    corruptions = {"names": ["contrast", "fog"], "severities": [1, 5], "images": 50, "folder": str(tmp_path / "sets")}
    recipe = asked(tmp_path / "soup", {"baselines": ["imp", "longer"]}, corruptions=corruptions)
    for name in ("contrast", "fog"):
        make(recipe, name)
    result = train_run(recipe)
    setting, store = Setting.of(recipe), Store(tmp_path / "soup" / "members")
    first = setting.sets.measured.take(torch.arange(50))
    sets = [images for *_, images in corrupted_sets(first, tmp_path / "sets", ("contrast", "fog"), (1, 5))]

    def network(state: Any) -> torch.nn.Module:
        model = setting.new_model()
        model.load_state_dict(dict(state))
        return model

    def batches(images: Any) -> Any:
        return plain_batches(images, batch_size=50, mean=setting.sets.mean, std=setting.sets.std)

    def mean(state: Any) -> float:
        return statistics.fmean(accuracy(network(state), batches(images)).top1 for images in sets)

    states, branches = chosen[0]
    members = [mean(store.state(branch)) for branch in branches]
    clean = [jobs.measured_of(store.result(branch))["top1"] for branch in branches]
    singles = [network(store.state(branch)) for branch in branches]
    expected = {
        "soup": mean(load_file(tmp_path / "soup" / "model.safetensors")),
        "imp": mean(states["imp"]),
        "longer": mean(states["longer"]),
        "mean_member": statistics.fmean(members),
        "best_member": members[clean.index(max(clean))],
        "ensemble": statistics.fmean(ensemble_accuracy(singles, batches(images)).top1 for images in sets),
    }
    found = {each["name"]: each["corrupted"]["top1"] for each in result["rows"] if "corrupted" in each}
    assert found == pytest.approx(expected, abs=1e-12)
    assert len(set(expected.values())) > 3
    assert result["corrupted"]["mean"] == row(result, "soup")["corrupted"]
    assert result["corrupted"]["rows"]["imp"]["by_severity"].keys() == {"1", "5"}
    show_soup(result, tmp_path / "soup")
    assert "corrupted" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_grid_measures_corruptions_with_members_that_are_there_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corruptions = {"names": ["contrast"], "severities": [3], "images": 20, "folder": str(tmp_path / "sets")}
    axes = {"sparsity": {"80 %": {}, "90 %": {"corruptions": corruptions}}}
    make(asked(tmp_path / "soup", corruptions=corruptions), "contrast")
    changes = {"prune": {"sparsity": 0.9}}
    plain = grid_of(tmp_path / "grid", {"sparsity": {"80 %": {}, "90 %": {}}}, **changes)
    before = compare(parse(plain, Grid, "grid"))
    monkeypatch.setattr(stages, "fit", lambda *_, **__: pytest.fail("a member is trained again"))
    columns = ["corrupted.accuracy", "corrupted.mean_member", "corrupted.severity_3"]
    raw_grid = grid_of(tmp_path / "grid", axes, **changes) | {"show": {"columns": columns}}
    rows = compare(parse(raw_grid, Grid, "grid"))
    assert [each["accuracy"] for each in rows] == [each["accuracy"] for each in before]
    assert "corrupted.accuracy" not in rows[0]["metrics"]
    assert rows[1]["metrics"]["corrupted.accuracy"] == rows[1]["metrics"]["corrupted.severity_3"]
    assert 0 <= rows[1]["metrics"]["corrupted.mean_member"]["mean"] <= 100
    assert "| corrupted.mean_member |" in (tmp_path / "grid" / "table.md").read_text()


@pytest.mark.usefixtures("tiny")
def test_what_members_start_from_is_chosen_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    select = stages.select

    def counted(model: Any, sparsity: float, *args: Any, **options: Any) -> Any:
        calls.append(sparsity)
        return select(model, sparsity, *args, **options)

    monkeypatch.setattr(stages, "select", counted)
    axes = {"members": {str(m): {"soup.members": m} for m in (2, 3)}}
    changes = {"soup": {"baselines": ["imp", "longer", "swa"]}, "prune": {"sparsity": 0.9}}
    compare(parse(grid_of(tmp_path / "grid", axes, **changes), Grid, "grid"), together=2)
    assert calls == [0.9]


@pytest.mark.usefixtures("tiny")
def test_a_grid_draws_accuracy_by_phase(tmp_path: Path) -> None:
    axes = {"phases": {"1": {"prune.phases": 1}, "2": {"prune.phases": 2}}}
    raw_grid = grid_of(tmp_path / "grid", axes, soup={"baselines": ["imp", "longer"]}) | {"seeds": [0, 1]}
    rows = compare(parse(raw_grid, Grid, "grid"), together=2)
    assert (tmp_path / "grid" / "phases.png").stat().st_size > 5000
    results = [json.loads(line) for line in (tmp_path / "grid" / "members.jsonl").read_text().splitlines()]
    two = [each["phases"] for each in results if each["labels"] == {"phases": "2"}]
    lines = rows[1]["accuracy by phase"]
    assert set(lines) == {"soup", "imp", "longer imp", "mean member", "best member"}
    last = [100 * phases[1]["soup"] for phases in two]
    assert lines["soup"][1] == ("90.0 %", pytest.approx(statistics.fmean(last)), pytest.approx(statistics.stdev(last)))
    assert lines["best member"][0][1] == pytest.approx(100 * statistics.fmean(max(p[0]["members"]) for p in two))
    alone = by_phase([{"phases": two[0]}])
    assert alone["soup"][0][2] is None
    assert alone["mean member"][0][2] == pytest.approx(100 * statistics.stdev(two[0][0]["members"]))


@pytest.mark.usefixtures("tiny")
def test_the_sets_of_a_grid_are_those_that_its_runs_read(tmp_path: Path) -> None:
    corruptions = {"names": ["contrast"], "severities": [2], "images": 30, "folder": str(tmp_path / "sets")}
    axes = {"sparsity": {"80 %": {}, "90 %": {"corruptions": corruptions}}}
    found = list(recipes(grid_of(tmp_path / "grid", axes), "grid"))
    assert [each.corruptions is None for each in found] == [True, False]
    make(found[1], "contrast")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").iterdir()}
    make(found[1], "contrast")
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "sets").iterdir()}
    setting = Setting.of(found[1])
    whole = stages.corrupted(setting.new_model(), setting, found[1].corruptions)
    assert whole["sets"]["contrast"]["2"]["images"] == 30


def test_the_tables_say_what_the_results_say() -> None:
    """Two seeds of which the soup wins one."""

    def result(seed: int, soup: float, imp: float) -> dict[str, Any]:
        rows = [
            {"row": name, "accuracy": value, "loss": 1.0, "calibration_error": 0.1, "worst_class": 0.2, "epochs": 4.0}
            | {"inference": 0.25}
            for name, value in (("soup, uniform", soup), ("imp", imp))
        ]
        phase = {"sparsity": 0.9, "soup": soup, "members": [0.5, 0.6], "imp": imp}
        apart = {"l2_mean": 1.0, "angle_mean": 2.0, "barycentre_mean": 3.0, "lines": {"1 to 2": {"barrier": 0.125}}}
        found = {"labels": {"sparsity": "90 %", "soup": "m = 3"}, "seed": seed, "soup": {"soup": soup, "imp": imp}}
        return {**found, "rows": rows, "phases": [phase, phase], "between": apart}

    text = soup_tables.text([result(0, 0.9, 0.8), result(1, 0.7, 0.73), {"labels": {}, "seed": 0}])
    assert "| 90 %, m = 3 | 2 | - | - | +3.50 (1) |" in text
    assert "| 90 %, m = 3 | 1.00 ± 0.00 | 2.00 ± 0.00 | 3.00 ± 0.00 | 0.1250 |" in text
    assert "| soup, uniform | 80.00 ± 14.14 |" in text
    assert "| 90.0 % | 80.00 ± 14.14 | 55.00 ± 0.00 | 60.00 ± 0.00 | 76.50 ± 4.95 | - |" in text


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_averages_made_beside_trainings_are_those_of_their_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Work of one lane that did not wait for another would show: everything is computed again when all is quiet."""
    made: list[tuple[Any, Any]] = []

    def recorded(asked: Any, states: Any, *rest: Any) -> Any:
        found = averaged(asked, states, *rest)
        made.append((states, found[0]))
        return found

    monkeypatch.setattr(jobs, "averaged", recorded)
    axes = {
        "members": {str(m): {"soup.members": m} for m in (3, 5)},
        "sparsity": {"80 %": {"prune.sparsity": 0.8}, "90 %": {"prune.sparsity": 0.9}},
    }
    train = {**raw(tmp_path)["train"], "epochs": 8}
    soup = {"also": ["greedy", "learned"], "baselines": ["imp", "longer", "swa", "reprune", "dense"], "line": 3}
    corruptions = {"names": ["contrast"], "severities": [3], "images": 50, "folder": str(tmp_path / "sets")}
    images = held_out(device="cuda", train=train, corruptions=corruptions)
    make(asked(tmp_path / "soup", **images), "contrast")
    grid = grid_of(tmp_path / "grid", axes, soup=soup, **images) | {"seeds": [0, 1]}
    rows = compare(parse(grid, Grid, "grid"), together=4)
    assert all(each["accuracy"]["mean"] > 70 for each in rows)
    torch.cuda.synchronize()
    for states, found in made:
        for name, value in found.items():
            if value.is_floating_point() and "running" not in name:
                mean = torch.stack([state[name].double() for state in states]).mean(0)
                torch.testing.assert_close(value.double(), mean, rtol=1e-5, atol=1e-7)
    base: Any = grid["base"]
    store, asked_ = parse(grid, Grid, "grid").store, parse({**base, "out": "x"}, ClassifierRecipe, "test")
    setting = Setting.of(asked_)
    for path in store.folder.glob("trainings/*/model.safetensors"):
        model = setting.new_model()
        model.load_state_dict(load_file(path))
        numbers = json.loads(path.parent.with_suffix(".json").read_text())
        assert stages.measure(model, setting)["top1"] == pytest.approx(jobs.measured_of(numbers)["top1"], abs=0.005)


@pytest.mark.parametrize("name", ["resnet18-grid", "smollm2"])
def test_packed_results_of_the_documentation_make_their_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """From the results alone: neither the recipe's images nor its model are there."""
    root = Path(__file__).parents[2]
    shutil.copytree(root / "docs" / "results" / "soups" / name, tmp_path / "out")
    kept = (tmp_path / "out" / "table.json").read_text()
    (tmp_path / "out" / "table.json").unlink()
    text = (root / "recipes" / "soups" / f"{name}.yaml").read_text()
    monkeypatch.chdir(tmp_path)
    for place in re.findall(r"\./data/[\w./-]+", text):
        Path(place).parent.mkdir(parents=True, exist_ok=True)
        Path(place).touch()
    compare(parse({**yaml.safe_load(text), "out": str(tmp_path / "out")}, Grid, name), workers=0)
    assert (tmp_path / "out" / "table.json").read_text() == kept
