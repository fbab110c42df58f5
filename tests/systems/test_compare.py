"""A grid: tuning, seeds, resume without repetition, failing members, several workers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from prunus.language import grid as language
from prunus.recipe import Recipe, digest, merge, parse, said
from prunus.run.compare import compare
from prunus.run.grid import Grid, final_members, load_grid, tuning_members
from tests.systems.test_compress import raw


def grid(folder: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    base = raw(folder, text, out)
    del base["out"]
    base["retrain"]["steps"] = 3
    base["evaluate"]["data"] = {"validation": str(text), "test": {"source": str(text), "part": [0.1, 1.0]}}
    retrain = base.pop("retrain")
    return {
        "base": base,
        "axes": {
            "criterion": {"magnitude": {"prune.criterion": "magnitude"}, "wanda": {"prune.criterion": "wanda"}},
            "pattern": {"50 %": {"prune.sparsity": 0.5}, "2:4": {"prune.pattern": "2:4", "prune.sparsity": 0.5}},
            "method": {
                "pruned": {},
                "norms": {"retrain": {**retrain, "train": ["norms"]}},
                "fit": {"reconstruct": {"steps": 2, "lr": 1e-3}},
            },
        },
        "tune": {
            "text": "validation",
            "axis": "method",
            "cells": {"norms": {"key": "retrain.lr", "values": [1e-9, 1e-2], "at": {"criterion": "wanda"}}},
        },
        "more_seeds": {"seeds": [1], "where": {"pattern": ["2:4"]}},
        "out": str(out),
    } | changes


def checked(*args: Any, **changes: Any) -> Grid:
    return parse(grid(*args, **changes), Grid, "grid.yaml")


def test_members_are_the_cells_times_seeds_and_tuned_where_asked(tiny_folder: Path, text_file: Path) -> None:
    asked = checked(tiny_folder, text_file, Path("out"))
    tuning = tuning_members(asked)
    assert [(m.labels["criterion"], m.tuned["retrain.lr"]) for m in tuning] == [
        ("wanda", 1e-9), ("wanda", 1e-2), ("wanda", 1e-9), ("wanda", 1e-2),
    ]  # fmt: skip
    results = {m.key: {"perplexity": {"validation": 10 - m.tuned["retrain.lr"]}} for m in tuning}
    members = final_members(asked, results)
    # 12 cells; the 8 that train have a second seed on 2:4 only.
    assert len(members) == 12 + 4
    assert {m.tuned.get("retrain.lr") for m in members if m.labels["method"] == "norms"} == {1e-2}
    assert {m.key for m in members} & set(results)


def test_a_value_with_which_training_went_astray_is_not_chosen(tiny_folder: Path, text_file: Path) -> None:
    asked = checked(tiny_folder, text_file, Path("out"))
    found = {1e-9: float("nan"), 1e-2: 10.0}  # the first that is tried
    results = {m.key: {"perplexity": {"validation": found[m.tuned["retrain.lr"]]}} for m in tuning_members(asked)}
    chosen = {m.tuned.get("retrain.lr") for m in final_members(asked, results) if m.labels["method"] == "norms"}
    assert chosen == {1e-2}


def test_a_grid_runs_and_a_second_call_repeats_nothing(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = checked(tiny_folder, text_file, tmp_path)
    rows = compare(asked)
    assert len(rows) == 12
    by_labels = {(r["criterion"], r["pattern"], r["method"]): r for r in rows}
    assert by_labels["wanda", "2:4", "norms"]["seeds"] == [0, 1]
    assert by_labels["wanda", "2:4", "norms"]["test"]["std"] is not None
    assert by_labels["magnitude", "50 %", "norms"]["tuned"] == {"retrain.lr": 1e-2}
    for pattern in ("50 %", "2:4"):
        cell = by_labels["magnitude", pattern, "pruned"]["test"]["mean"]
        assert by_labels["magnitude", pattern, "norms"]["test"]["mean"] < cell
    for name in ("table.json", "table.md", "grid.png"):
        assert (tmp_path / name).stat().st_size > 100
    dense = json.loads((tmp_path / "dense.json").read_text())
    assert dense["test"] != by_labels["wanda", "50 %", "pruned"]["test"]["mean"]

    def refuse(*_: object) -> None:
        raise AssertionError("a finished member was repeated")

    monkeypatch.setattr(language._Language, "run", refuse)
    assert compare(asked) == json.loads(json.dumps(rows))


def test_a_member_alone_gives_what_it_gives_in_the_grid(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from prunus.language.single import compress

    asked = checked(tiny_folder, text_file, tmp_path / "grid", tune=None, more_seeds=None)
    rows = compare(asked)
    row = next(r for r in rows if (r["criterion"], r["pattern"], r["method"]) == ("wanda", "2:4", "norms"))
    member = asked.recipe(
        {"criterion": "wanda", "pattern": "2:4", "method": "norms"}, 0, {"out": str(tmp_path / "one")}
    )
    assert compress(member)["perplexity"]["merged"]["test"] == pytest.approx(row["test"]["mean"], rel=1e-6)


def test_members_share_what_a_method_pruned(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    from prunus.language.single import compress

    raw = grid(tiny_folder, text_file, tmp_path / "grid", tune=None, more_seeds=None)
    raw["axes"] = {"method": {key: raw["axes"]["method"][key] for key in ("pruned", "norms")}}
    trained = {"data": str(text_file), "steps": 3, "batch_size": 4, "length": 32, "lr": 1e-3}
    raw["base"] |= {"prune": {"sparsity": 0.5}, "during": {"elsa": {"interval": 2}}, "train": trained}
    del raw["base"]["calibrate"]  # whose default is longer than the model takes
    asked = parse(raw, Grid, "grid.yaml")
    rows = {row["method"]: row["test"]["mean"] for row in compare(asked)}
    assert rows["norms"] < rows["pruned"]
    assert not list((tmp_path / "grid" / "starts").glob("*/*.safetensors"))  # of no use to other settings
    alone = compress(asked.recipe({"method": "norms"}, 0, {"out": str(tmp_path / "one")}))
    assert alone["perplexity"]["merged"]["test"] == pytest.approx(rows["norms"], rel=1e-6)
    for path in (tmp_path / "grid" / "members").glob(
        "*.json"
    ):  # what was asked, so that packed results find their cells
        recipe = parse(json.loads(path.read_text())["recipe"], Recipe, path.name)
        assert digest(said(recipe, but={"out", "save"}))[:24] == path.stem


def test_members_that_shrink_share_the_smaller_model(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each smaller model is made once; every member is what a run of its own would be, also after a kill."""
    from prunus.language.single import compress

    raw = grid(tiny_folder, text_file, tmp_path / "grid", tune=None, more_seeds=None)
    del raw["base"]["calibrate"]["length"]  # whose default is longer than the model takes
    norms = raw["axes"]["method"]["norms"]
    raw["axes"] = {
        "smaller": {"dense": {}, "25% of neurons": {"shrink.neurons": 0.25}, "1 block": {"shrink.blocks": 1}},
        "method": {"as it is": {"prune.sparsity": 0.0}, "pruned": {}, "norms": norms},
    }
    asked, made = parse(raw, Grid, "grid.yaml"), list[str]()
    make, run = language._make_smaller, language._Language.run
    monkeypatch.setattr(language, "_make_smaller", lambda r, *args: made.append(str(r.shrink)) or make(r, *args))

    def killed(self: Any, recipe: Any, *args: Any) -> Any:
        if recipe.shrink is not None and recipe.retrain is not None:
            raise KeyboardInterrupt
        return run(self, recipe, *args)

    with monkeypatch.context() as patch:
        patch.setattr(language._Language, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            compare(asked)
    rows = {(row["smaller"], row["method"]): row for row in compare(asked)}
    assert (len(rows), len(made), len(set(made))) == (9, 2, 2)
    for labels in [("25% of neurons", "norms"), ("1 block", "pruned")]:
        alone = compress(
            asked.recipe(dict(zip(asked.axes, labels, strict=True)), 0, {"out": str(tmp_path / labels[1])})
        )
        assert list(alone["perplexity"].values())[-1]["test"] == pytest.approx(rows[labels]["test"]["mean"], rel=1e-6)
        assert alone["shrink"]["parameters"] == rows[labels]["shrink"]["parameters"]
    assert rows["dense", "as it is"]["test"]["mean"] == pytest.approx(
        json.loads((tmp_path / "grid" / "dense.json").read_text())["test"], rel=1e-6
    )
    assert "shrink" not in rows["dense", "pruned"]
    assert not (tmp_path / "grid" / "smaller").exists()  # nobody needs them any more
    assert "### Parameters, millions" in (tmp_path / "grid" / "table.md").read_text()


def test_a_failing_member_takes_no_other_with_it(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    axes = grid(tiny_folder, text_file, tmp_path)["axes"]
    axes["method"] = {"wild": {**axes["method"]["norms"], "retrain.lr": 1e38}, "pruned": {}}
    asked = checked(tiny_folder, text_file, tmp_path, axes=axes, tune=None, more_seeds=None)
    with pytest.raises(RuntimeError, match="4 jobs failed"):
        compare(asked)
    assert len(json.loads((tmp_path / "table.json").read_text())) == 4


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ({"retrain.train": ["biases"]}, "retrain.train: Subset 'biases' is empty in LlamaForCausalLM"),
        ({"retrain.rank": 33, "retrain.train": ["mask_lora"]}, "retrain.rank: 33 is above"),
        ({"prune.exclude": ["layers.7.*"]}, "'layers.7.*' matches none"),
    ],
)
def test_a_cell_that_the_model_cannot_be_ends_a_grid_before_its_work(
    cell: dict[str, Any], said: str, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    axes = grid(tiny_folder, text_file, tmp_path)["axes"]
    axes["method"] = {"pruned": {}, "other": axes["method"]["norms"] | cell}
    with pytest.raises(ValueError, match=said):
        compare(checked(tiny_folder, text_file, tmp_path, axes=axes, tune=None, more_seeds=None))
    assert not (tmp_path / "starts").exists()


@pytest.mark.slow
def test_a_call_that_ends_early_keeps_no_model_for_the_next_one(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        assert language._read
        raise KeyboardInterrupt

    monkeypatch.setattr(language.stages, "evaluate", stop)
    with pytest.raises(KeyboardInterrupt):
        compare(checked(tiny_folder, text_file, tmp_path))
    assert not language._read


def test_two_workers_share_a_grid(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    axes = grid(tiny_folder, text_file, tmp_path)["axes"]
    small = {"criterion": axes["criterion"], "method": {"norms": axes["method"]["norms"]}}
    one, two = (
        compare(checked(tiny_folder, text_file, tmp_path / str(n), axes=small, tune=None, more_seeds=None), workers=n)
        for n in (1, 2)
    )
    assert [row["test"] for row in one] == [row["test"] for row in two]


def test_percents_name_labels_quoted_or_not(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    axes = {"rate": {"50%": {}, "99.9%": {"prune.sparsity": 0.999}}, "method": {"pruned": {}, "again": {}}}
    raw = grid(tiny_folder, text_file, tmp_path, axes=axes, tune=None)
    del raw["more_seeds"]
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(raw) + "skip: [{rate: [99.9%], method: [again]}]\n")
    cells = {(each["rate"], each["method"]) for each in load_grid(path).cells()}
    assert cells == {("50%", "pruned"), ("50%", "again"), ("99.9%", "pruned")}


def test_numbers_name_labels_however_they_are_written(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    axes = {"lr": {"0.0005": {}, "1e-3": {"prune.sparsity": 0.3}, "3": {"prune.sparsity": 0.2}}, "n": {"[a": {}}}
    raw = grid(tiny_folder, text_file, tmp_path, axes=axes, tune=None)
    del raw["more_seeds"]
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(raw) + "skip: [{lr: [5e-4, 3]}]\n")
    assert [each["lr"] for each in load_grid(path).cells()] == ["0.001"]
    path.write_text(yaml.safe_dump(raw) + "skip: [{lr: [0.002]}]\n")
    with pytest.raises(ValueError, match=r"'0.002' is not a label of lr; there are 0.0005, 0.001, 3"):
        load_grid(path)


def test_what_labels_share_by_an_alias_is_changed_in_one_alone(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    shared = {"train": ["norms"], "steps": 3}  # what YAML makes of &name and *name
    found = grid(tiny_folder, text_file, tmp_path, tune=None, more_seeds=None)
    found["axes"] = {"method": {"short": {"retrain": shared}, "long": {"retrain": shared, "retrain.steps": 9}}}
    asked = parse(found, Grid, "grid.yaml")
    steps = {}
    for method in ("long", "short"):
        recipe = asked.recipe({"method": method}, 0, {"out": str(tmp_path)})
        assert recipe.retrain is not None
        steps[method] = recipe.retrain.steps
    assert steps == {"long": 9, "short": 3}


def test_seeds_that_no_cell_draws_by_are_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    axes = grid(tiny_folder, text_file, tmp_path)["axes"]
    axes["method"] = {"pruned": axes["method"]["pruned"]}
    for seeds in ({"seeds": [0, 1, 2], "more_seeds": None}, {}):
        with pytest.raises(ValueError, match=r"seeds: no cell trains or reconstructs.*calibrate\.seed"):
            checked(tiny_folder, text_file, tmp_path, axes=axes, tune=None, **seeds)
    checked(tiny_folder, text_file, tmp_path, axes=axes, tune=None, more_seeds=None)


def test_wrong_grids_are_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'colour' is not an axis"):
        checked(tiny_folder, text_file, tmp_path, more_seeds={"seeds": [1], "where": {"colour": ["red"]}})
    axes = grid(tiny_folder, text_file, tmp_path)["axes"]
    axes["pattern"]["5:4"] = {"prune.pattern": "5:4"}
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(grid(tiny_folder, text_file, tmp_path, axes=axes)))
    with pytest.raises(ValueError, match="5:4"):
        load_grid(path)
    with pytest.raises(FileNotFoundError, match="no recipe"):
        load_grid(tmp_path / "other.yaml")
    for key in ("retrain.keep_adapter", "evaluate.speed", "streaming"):
        raw = grid(tiny_folder, text_file, tmp_path)
        path.write_text(yaml.safe_dump(raw | {"base": merge(raw["base"], {key: True})}))
        with pytest.raises(ValueError, match=f"{key} is for single runs, and a grid would not do it"):
            load_grid(path)


def test_a_grid_compares_with_a_dense_model_that_all_its_cells_have(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    base = raw(tiny_folder, text_file, tmp_path, retrain=None)
    other = str(shutil.copytree(tiny_folder, tmp_path / "other"))
    axes = {"model": {"a": {"model": other}, "b": {}}, "zeros": {"50 %": {"prune.sparsity": 0.5}}}
    asked = Grid(base=base, axes=axes, out=str(tmp_path / "grid"))
    compare(asked)
    member = next((tmp_path / "grid" / "members").glob("*.json"))
    member.unlink()  # as if the call had been killed
    (tmp_path / "grid" / "members.jsonl").unlink()
    compare(asked)
    assert not (tmp_path / "grid" / "dense.json").exists()
    assert "(dense" not in (tmp_path / "grid" / "table.md").read_text()


def test_a_grid_lies_in_nothing_that_is_read_and_names_a_damaged_line(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    base, axes = raw(tiny_folder, text_file, tmp_path, retrain=None), {"zeros": {"50 %": {}}}
    texts = tmp_path / "texts"
    texts.mkdir()
    shutil.copy(text_file, texts)
    inside = Grid(base=merge(base, {"calibrate.data": str(texts)}), axes=axes, out=str(texts / "grid"))
    with pytest.raises(ValueError, match="lie in each other"):
        compare(inside)
    assert not Path(inside.out).exists()
    (tmp_path / "members.jsonl").write_text('{"key": "a"}\n{"key": "b", "perp')
    (tmp_path / ".prunus-run").touch()
    with pytest.raises(ValueError, match=r"members\.jsonl, line 2 is not JSON"):
        compare(Grid(base=base, axes=axes, out=str(tmp_path)), workers=0)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("evaluate.data", {}, "evaluate.data: a grid compares perplexities: give it a text"),
        ("evaluate.data", {"new": "embedded"}, "evaluate.data: cells are compared on the same texts"),
    ],
)
def test_grids_that_cannot_be_compared_are_refused(
    tiny_folder: Path, text_file: Path, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    base = raw(tiny_folder, text_file, tmp_path, retrain=None)
    with pytest.raises(ValueError, match=message):
        Grid(base=base, axes={"zeros": {"50 %": {key: value}, "60 %": {"prune.sparsity": 0.6}}}, out="x")


def test_tables_are_made_of_what_is_finished_and_from_the_packed_results_alone(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = checked(tiny_folder, text_file, tmp_path / "one")
    rows = compare(asked)
    packed = (tmp_path / "one" / "members.jsonl").read_text().splitlines()
    half = tmp_path / "half"
    half.mkdir()
    kept = [line for line in packed if json.loads(line)["labels"]["method"] != "norms"]
    (half / "members.jsonl").write_text("".join(line + "\n" for line in kept))
    partial = compare(checked(tiny_folder, text_file, half), workers=0)
    assert [row["test"] for row in rows if row["method"] != "norms"] == [row["test"] for row in partial]
    assert "| criterion | method | 50 % | 2:4 |" in (half / "table.md").read_text()
    assert [row["test"] for row in compare(checked(tiny_folder, text_file, half))] == [row["test"] for row in rows]
    assert len(list((half / "members").glob("*.json"))) == len(packed) - len(kept)
