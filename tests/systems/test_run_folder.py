"""A run writes and deletes in folders of its own alone, one process at a time, and reads the same when it goes on."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from prunus.jobs import folder as run_folder
from prunus.jobs.folder import held, mark
from prunus.jobs.inputs import check_inputs, inputs_of
from prunus.language import stages
from prunus.language.single import compress
from prunus.recipe import ClassifierRecipe, LanguageRecipe, parse
from prunus.run.cli import app
from prunus.run.compare import compare
from prunus.run.grid import Grid
from prunus.vision import stages as classifier_stages
from prunus.vision.train import train_run
from tests.systems.test_compress import raw, recipe

pytestmark = pytest.mark.pictures

TASKS = {
    "a language model": ("run", "model: embedded\n"),
    "a classifier": ("run", "images: {source: digits}\nmodel: resnet8\n"),
    "a grid": ("grid", "base: {images: digits, model: resnet8}\naxes: {a: {b: {}}}\n"),
    "a demo": ("demo", ""),
}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_a_folder_of_the_user_is_refused_and_left_alone(
    task: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command, text = task
    mine = {Path("recipe.yaml"): f"# mine\n{text}", Path("work/notes.txt"): "years of it"}
    for path, content in mine.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    done = CliRunner().invoke(app, [command, *(["recipe.yaml"] if text else []), "--out", "."])
    assert done.exit_code != 0
    assert isinstance(done.exception, ValueError)
    assert "folder and has other files ('recipe.yaml', ...)" in str(done.exception)
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {
        tmp_path / path: content for path, content in mine.items()
    }


def test_a_run_that_was_killed_while_it_took_its_folder_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "..prunus-run.0123456789abcdef.partial").write_text("A run of Pru")
    with held(tmp_path):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".prunus-run", ".prunus-run.lock"]


def test_a_run_that_takes_its_marker_back_takes_nobody_else_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, unlink, refused = tmp_path / "run", Path.unlink, list[str]()

    def meanwhile(path: Path, missing_ok: bool = False) -> None:
        if path == out / ".prunus-run":
            with pytest.raises(ValueError, match=r"is in use") as told, held(out):  # another run begins now
                pass
            refused.append(str(told.value))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", meanwhile)
    with held(out):
        pass
    assert len(refused) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_leaves_meanwhile_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held(tmp_path):
        (tmp_path / ".prunus-run").unlink()
        monkeypatch.setattr(run_folder, "mark", lambda *_: None)  # it looked before
        with pytest.raises(ValueError, match=r"is in use; wait for it"), held(tmp_path):
            pass


def test_a_folder_is_of_one_kind(tmp_path: Path) -> None:
    mark(tmp_path / "out", "grid")
    mark(tmp_path / "out", "grid")
    with (
        pytest.raises(ValueError, match=r"out is the folder of a grid, not of a run; give another --out"),
        held(tmp_path / "out"),
    ):
        pass


@pytest.mark.parametrize("out", ["", "deep", ".."])
def test_out_is_apart_from_the_model(tiny_folder: Path, text_file: Path, tmp_path: Path, out: str) -> None:
    shutil.copytree(tiny_folder, tmp_path / "a" / "model")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="which is read, lie in each other; give another output folder"):
        compress(recipe(tmp_path / "a" / "model", text_file, tmp_path / "a" / "model" / out))
    assert sorted(tmp_path.rglob("*")) == before


def test_the_second_starter_is_told_who_has_the_folder(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    with held(out):
        for change in ({}, {"retrain": None}):
            with pytest.raises(ValueError, match=r"is in use by process") as told:
                compress(recipe(tiny_folder, text_file, out, **change))
            assert f"run is in use by process {os.getpid()} on {socket.gethostname()}, since 2" in str(told.value)
            assert str(told.value).endswith("; wait for it, or give another folder with --out")
        images: dict[str, Any] = {"images": "digits", "model": "resnet8", "out": str(out)}
        with pytest.raises(ValueError, match=r"is in use by process"):
            train_run(parse(images, ClassifierRecipe, ""))
    assert list(tmp_path.iterdir()) == [], "a run that wrote nothing leaves no folder"


@pytest.fixture
def killed(tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The recipe of a run on a copy of model and text that ended after it had pruned."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(text_file, tmp_path / "text.txt")
    asked = raw(tmp_path / "model", tmp_path / "text.txt", tmp_path / "run", retrain=None)

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "summary", kill)
        with pytest.raises(KeyboardInterrupt):
            compress(parse(asked, LanguageRecipe, ""))
    assert len(list((tmp_path / "run" / "work" / "blocks").glob("*.safetensors"))) == 2
    return asked


def other_weights(model: Path) -> None:
    """Of the same names and shapes."""
    tensors = {name: 2 * tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


CHANGES = {
    "model": lambda folder: other_weights(folder / "model"),
    "text.txt": lambda folder: (folder / "text.txt").write_text("Another text. " * 500),
}


@pytest.mark.parametrize(("name", "change"), CHANGES.items(), ids=CHANGES.keys())
def test_a_run_does_not_go_on_with_other_inputs(killed: dict[str, Any], tmp_path: Path, name: str, change: Any) -> None:
    change(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}' was changed since .*run was begun with it: put the old one back"):
        compress(parse(killed, LanguageRecipe, ""))
    (tmp_path / "run" / "inputs.json").unlink()
    compress(parse(killed, LanguageRecipe, ""))


def test_a_grid_measures_its_dense_model_again_and_keeps_labels_in_names(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    base = raw(tiny_folder, text_file, tmp_path / "none", retrain=None)
    zeros = {"50 %": {"prune.sparsity": 0.5}, "60 %": {"prune.sparsity": 0.6}}
    axes = {"way": {f"../../w/o {n}": {} for n in range(11)}, "zeros": zeros}  # more than go into one picture
    grid = Grid(base=base, axes=axes, out=str(tmp_path / "deep" / "deeper" / "grid"))
    compare(grid)
    dense = Path(grid.out) / "dense.json"
    before = dense.read_text()
    dense.unlink()
    compare(grid)
    assert dense.read_text() == before
    pictures = sorted(tmp_path.rglob("*.png"))
    assert [path.name for path in pictures] == sorted(f"grid-..-..-w-o {n}.png" for n in range(11))
    assert {path.parent for path in pictures} == {Path(grid.out)}


def test_a_grid_does_not_go_on_with_other_weights(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    base = raw(tmp_path / "model", text_file, tmp_path / "none", retrain=None)
    grid = Grid(base=base, axes={"sparsity": {"a": {}, "b": {"prune.sparsity": 0.6}}}, out=str(tmp_path / "grid"))
    compare(grid, minutes=0)
    compare(grid, minutes=0)
    other_weights(tmp_path / "model")
    with pytest.raises(ValueError, match="model' was changed since"):
        compare(grid, minutes=0)


def test_a_teacher_is_read_too(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    asked = raw(tiny_folder, text_file, tmp_path / "teacher" / "run")
    asked["retrain"]["distill"] = {"teacher": str(shutil.copytree(tiny_folder, tmp_path / "teacher"))}
    with pytest.raises(ValueError, match="lie in each other"):
        compress(parse(asked, LanguageRecipe, ""))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_own.py"])
def test_pickled_weights_and_code_are_read_too(tiny_folder: Path, tmp_path: Path, name: str) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    (model / name).write_bytes(b"one")
    asked = parse({"model": str(model)}, LanguageRecipe, "")
    check_inputs(tmp_path, [asked])
    (model / name).write_bytes(b"two")
    with pytest.raises(ValueError, match="model' was changed"):
        check_inputs(tmp_path, [asked])


def test_corrupted_images_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    raw = {"images": "digits", "model": "resnet8", "corruptions": {"folder": str(tmp_path / "c")}}
    assert str(tmp_path / "c") in inputs_of(parse(raw, ClassifierRecipe, ""))


def test_large_files_are_told_apart_by_size_time_and_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunus.jobs.inputs._WHOLE", 10)
    text = tmp_path / "text.txt"
    text.write_text("a" * 20)
    asked = parse({"calibrate": {"data": str(text)}}, LanguageRecipe, "")
    check_inputs(tmp_path, [asked])
    check_inputs(tmp_path, [asked])
    before = text.stat()
    for change in ("a" * 21, "b" * 20):
        text.write_text(change)
        os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(ValueError, match=r"text.txt' was changed"):
            check_inputs(tmp_path, [asked])
    text.write_text("a" * 20)
    os.utime(text, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(ValueError, match=r"text.txt' was changed"):
        check_inputs(tmp_path, [asked])


def test_a_run_that_goes_on_elsewhere_says_so(killed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "device_name", lambda _: "another device")
    monkeypatch.setattr("prunus.language.single.device_name", lambda _: "another device")
    result = compress(parse(killed, LanguageRecipe, ""))
    assert result["device"].startswith("CPU, ")
    assert result["resumed_on"] == ["another device"]


def test_a_member_of_a_grid_that_goes_on_elsewhere_says_so(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of language models its retraining; of classifiers a job that it goes by: both say so in the member's result."""

    def kill(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    classifier = {"images": "digits", "model": "resnet8", "train": {"epochs": 1, "warmup": 0}, "device": "cpu"}
    language = {key: value for key, value in raw(tiny_folder, text_file, tmp_path).items() if key != "out"}
    for name, base, stage in (("language", language, "retrain"), ("images", classifier, "fit")):
        module = stages if name == "language" else classifier_stages
        grid = Grid(base=base, axes={"way": {"one": {}}}, out=str(tmp_path / name))
        with monkeypatch.context() as patch:
            patch.setattr(module, stage, kill)
            with pytest.raises(KeyboardInterrupt):
                compare(grid)
        with monkeypatch.context() as patch:
            for place in ("run.grid", "language.grid", "vision.setting"):
                patch.setattr(f"prunus.{place}.device_name", lambda _: "another device")
            compare(grid)
        (member,) = (tmp_path / name / "members").glob("*.json")
        assert json.loads(member.read_text())["resumed_on"] == ["another device"], name


def test_a_grid_looks_at_its_checkpoint_before_any_job(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights.pop("model.layers.1.mlp.down_proj.weight")
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    base = raw(tmp_path / "model", text_file, tmp_path / "none", retrain=None)
    grid = Grid(base=base, axes={"way": {"one": {}}}, out=str(tmp_path / "grid"))
    with pytest.raises(ValueError, match=r"lacks 1 of the .*'model.layers.1.mlp.down_proj.weight'"):
        compare(grid)
    assert not (tmp_path / "grid" / "members").exists()


def test_a_finished_run_says_so_and_mends_what_is_missing(
    tiny_folder: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    asked = recipe(tiny_folder, text_file, out, retrain=None)
    compress(asked)
    assert "resumed_on" not in json.loads((out / "result.json").read_text())
    names = sorted(path.name for path in out.iterdir())
    (out / "report.png").unlink()
    (out / "work").mkdir()
    compress(asked)
    assert f"{out} is finished: nothing is repeated" in caplog.text
    assert sorted(path.name for path in out.iterdir()) == names
    shutil.rmtree(out / "model")
    with pytest.raises(ValueError, match=r"is finished, but its model is gone; delete .*result.json to make it again"):
        compress(asked)


@pytest.mark.parametrize("found", ["[]", "null", '{"accuracy": 0.5}'])
def test_a_result_that_is_none_of_prunus_is_refused(
    tiny_folder: Path, text_file: Path, tmp_path: Path, found: str
) -> None:
    (tmp_path / ".prunus-run").touch()
    (tmp_path / "result.json").write_text(found)
    with pytest.raises(ValueError, match="holds the result of another recipe; give another folder"):
        compress(recipe(tiny_folder, text_file, tmp_path))
    assert (tmp_path / "result.json").read_text() == found


def test_a_finished_classifier_says_so_and_mends_what_is_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: dict[str, Any] = {"images": "digits", "model": "resnet8", "device": "cpu", "out": str(tmp_path)}
    images["train"] = {"epochs": 1, "batch_size": 512, "warmup": 0}
    asked = parse(images, ClassifierRecipe, "")
    first = train_run(asked)
    names = sorted(path.name for path in tmp_path.iterdir())
    picture = (tmp_path / "report.png").read_bytes()
    (tmp_path / "report.png").unlink()
    (tmp_path / "work").mkdir()
    assert train_run(asked) == json.loads(json.dumps(first))
    assert "is finished: nothing is repeated" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert (tmp_path / "report.png").read_bytes() == picture


def test_a_classifier_that_is_not_saved_is_finished_without_its_network(tmp_path: Path) -> None:
    train = {"epochs": 1, "batch_size": 512, "warmup": 0}
    asked = {"images": "digits", "model": "resnet8", "device": "cpu", "out": str(tmp_path), "save": False}
    recipe = parse({**asked, "train": train}, ClassifierRecipe, "")
    first = train_run(recipe)
    assert not (tmp_path / "model.safetensors").exists()
    assert train_run(recipe) == json.loads(json.dumps(first))


def flip(path: Path) -> None:
    """A bit in the middle of a file's tensors."""
    data = bytearray(path.read_bytes())
    data[3 * len(data) // 4] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("changes", "call", "damaged"),
    [
        ({"streaming": True}, "prunus.language.stages.retrain", "work/pruned/model.safetensors"),
        ({"soup": {"members": 2}}, "prunus.language.single.averaged", "members/2/model.safetensors"),
        (
            {"prune": {"sparsity": 0.5, "phases": 2}},
            "prunus.language.stages.summary",
            "work/phases/*/model.safetensors",
        ),
    ],
    ids=["a streamed run", "a soup", "a phase"],
)
def test_a_flipped_bit_in_a_model_that_a_killed_run_left_is_found(
    changes: dict[str, Any],
    call: str,
    damaged: str,
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is made anew, and the run ends with the bits of one that nothing happened to."""
    whole, asked = (recipe(tiny_folder, text_file, tmp_path / name, **changes) for name in ("whole", "run"))
    compress(whole)

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(call, kill)
        with pytest.raises(KeyboardInterrupt):
            compress(asked)
    (path,) = (tmp_path / "run").glob(damaged)
    flip(path)
    compress(asked)
    assert f"{path.parent} is made anew: {path} is damaged (its checksum is another)" in caplog.text
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_flipped_bit_in_a_finished_block_is_found(
    killed: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The block is made anew, and the model has the bits of a run that nothing happened to."""
    compress(parse({**killed, "out": str(tmp_path / "whole")}, LanguageRecipe, ""))
    flip(tmp_path / "run" / "work" / "blocks" / "model.layers.0.safetensors")
    compress(parse(killed, LanguageRecipe, ""))
    assert "block model.layers.0 is made anew: " in caplog.text
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_grids_do_not_share_a_dense_training_of_other_images(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "1.png").write_bytes(name.encode())
    base = {"images": {"source": str(tmp_path / "images")}, "model": "resnet8"}
    grid = {"base": base, "axes": {"a": {"b": {}}}, "dense": str(tmp_path / "dense")}
    compare(parse({**grid, "out": str(tmp_path / "one")}, Grid, ""), workers=0)
    (tmp_path / "images" / "a" / "1.png").write_bytes(b"another")
    with pytest.raises(ValueError, match=r"images' was changed since .*dense was begun with it"):
        compare(parse({**grid, "out": str(tmp_path / "other")}, Grid, ""), workers=0)
