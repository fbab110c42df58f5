"""Classifier recipes: what is refused, one run from end to end, kills and resumes, on handwritten digits."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from corrupt_images import make  # pyright: ignore[reportMissingImports] - a script, on pytest's path
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification

from prunus.data import Images, read_images
from prunus.data.images import plain_batches
from prunus.machine import read_tensors
from prunus.masks import Masks
from prunus.measure import corrupted_sets
from prunus.measure.accuracy import accuracy
from prunus.measure.cost import cost
from prunus.prune import prune
from prunus.recipe import ClassifierRecipe, ClassifierRetrain, merge, parse
from prunus.report import read_metrics
from prunus.run.show import show_run
from prunus.train.batchnorm import recalibrate_
from prunus.vision import setting as settings
from prunus.vision import stages
from prunus.vision import train as running
from prunus.vision.dense import dense_key
from prunus.vision.setting import Setting
from prunus.vision.train import pruning_of, train_run

TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.1, "warmup": 0, "augment": {"crop": 1}}


class Tiny(nn.Sequential):
    """Two convolutions with BatchNorm and a head, 2,378 prunable weights: members of a hundredth of a second."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
        )


@cache
def some_digits(count: int) -> dict[tuple[str, str], Images]:
    """The first digits, train and test, as the settings keep what they have read."""
    first = read_images("digits", None).take(torch.arange(count))
    train, test = first.split(0.2, seed=0)
    return {("digits", "train"): train, ("digits", "test"): test}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes build the tiny network, whatever they name, and train it on few digits, in ten steps an epoch."""
    make_tiny(monkeypatch)


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `tiny`, with so many digits that two epochs teach it some: twenty steps each."""
    make_tiny(monkeypatch, digits=800)


def make_tiny(monkeypatch: pytest.MonkeyPatch, *, digits: int = 400) -> None:
    monkeypatch.setattr(settings, "_read", dict(some_digits(digits)))
    monkeypatch.setattr(settings, "_sets", {})
    monkeypatch.setattr(settings, "_fits", set())
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


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file of 500 of the digits, for what is trained in other processes, which know nothing of the tiny network."""
    digits = read_images("digits", None).take(torch.arange(500))
    path = tmp_path_factory.mktemp("few") / "digits.safetensors"
    save_file({"pixels": digits.pixels, "labels": digits.labels}, path)
    return str(path)


def checked(out: Path, **changes: Any) -> ClassifierRecipe:
    return parse(raw(out, **changes), ClassifierRecipe, "test")


PRUNED = {"prune": {"sparsity": 0.8}, "retrain": {"schedule": "llr", "epochs": 1}}

WRONG = [
    ({"images": "./nowhere"}, "images.source: no file or folder"),
    ({"images": {"source": "digits", "measure_on": "train"}}, "images.measure_on"),
    ({"model": "resnet9"}, "no model 'resnet9'"),
    ({"train": {"schedule": "cosin"}}, "there is no schedule 'cosin'; did you mean 'cosine'?"),
    ({"train": {"schedule": {"multistep": 3}}}, "multistep.milestones: Input should be"),
    ({"train": {"epochs": 2, "warmup": 2}}, "set a smaller warmup"),
    ({"train": {"schedule": {"one_cycle": 0.3}}}, "set warmup: 0"),
    ({"train": {"snapshots": [31]}}, "epoch 31 lies behind the end"),
    ({"train": {"nesterov": True, "momentum": 0}}, "nesterov needs momentum"),
    ({"prune": {"sparsity": 1.0}}, "[0, 1)"),
    ({"prune": {"pattern": "2:4", "phases": 2}}, "leave out phases"),
    ({"prune": {"criterion": "sparsegpt"}}, "no scores for global to compare"),
    (
        {"prune": {"criterion": "sparsegpt", "allocation": "erk", "phases": 2}},
        "cannot stay within the masks of an earlier",
    ),
    ({"prune": {}, "retrain": {"schedule": "alr", "epochs": 1}}, "no retraining schedule 'alr'; did you mean 'allr'?"),
    ({"prune": {}, "during": {"gmp": {"allocation": "ring"}}}, "there is no allocation 'ring'"),
    ({"prune": {}, "during": {"rigl": {"topology": "owl"}}}, "owl looks at what the layers receive"),
    ({"prune": {}, "retrain": {"schedule": "llr"}}, "give one of epochs, share"),
    ({"prune": {}, "retrain": {"steps": 1, "train": ["lora"]}}, "merging 'lora' would fill pruned weights"),
    (
        {"train": {"optimizer": "sfw"}, "prune": {}, "retrain": {"steps": 1, "train": ["norms"]}},
        "sfw is of whole networks",
    ),
    ({"prune": {}, "retrain": {"epochs": 1, "share": 0.1}}, "and steps"),
    ({"prune": {}, "retrain": {"epochs": 1, "rewind": 1}}, "set train.snapshots: [1]"),
    ({"retrain": {"epochs": 1}}, "retrain needs prune.sparsity"),
    ({"during": "gmp"}, "during needs prune.sparsity"),
    ({"prune": {}, "during": "gmpp"}, "did you mean 'gmp'?"),
    ({"prune": {}, "during": {"gmp": {"evry": 1}}}, "did you mean 'every'?"),
    ({"prune": {}, "during": {"rigl": {"alpha": 2.0}}}, "alpha"),
    ({"prune": {"phases": 2}, "during": "gmp"}, "prune.phases: a method that prunes during training"),
    ({"device": "gpu"}, "a device is auto, cpu"),
    ({"epochs": 3}, "unknown key 'epochs'"),
    ({"corruptions": {"folder": "c", "names": ["fogs"]}}, "did you mean 'fog'?"),
    ({"corruptions": {"folder": "c", "severities": [1, 6]}}, "corruptions.severities.1"),
    ({"corruptions": {"folder": "c", "severities": []}}, "corruptions.severities"),
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
        ({"steps": 7}, 2, [7, 7]),
        ({"share": 0.001}, 1, [1]),
    ],
)
def test_budgets_are_exact_in_steps(asked: dict[str, Any], phases: int, expected: list[int]) -> None:
    assert ClassifierRetrain(**asked).budgets(phases, dense_steps=100, epoch_steps=10) == expected


def test_what_decides_the_dense_training_is_in_its_key(tmp_path: Path) -> None:
    plain = dense_key(checked(tmp_path))
    same = [PRUNED, {"recalibrate": 0.5}, {"train": {**TRAIN, "evaluate_every": 1}}, {"capture": "auto"}]
    assert {dense_key(checked(tmp_path, **changes)) for changes in same} == {plain}
    other = [{"seed": 1}, {"train": {**TRAIN, "lr": 0.2}}, {"images": {"source": "digits", "measure_on": "validation"}}]
    assert len({plain, *(dense_key(checked(tmp_path, **changes)) for changes in other)}) == 4


@pytest.mark.usefixtures("learning")
def test_a_run_leaves_what_it_says(tmp_path: Path) -> None:
    recipe = checked(tmp_path, **PRUNED, train={**TRAIN, "evaluate_every": 1})
    result = train_run(recipe)
    assert list(result["stages"]) == ["dense", "pruned", "recalibrated", "retrained", "settled"]
    assert result["accuracy"] == result["stages"]["settled"]["top1"]
    assert result["epochs"] == 3
    assert result["phases"][0]["share"] == 0.5
    names = "dense masks.safetensors metrics.jsonl model.safetensors prunus.json recipe.yaml report.png result.json"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".prunus-run", *names.split()]

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


@pytest.mark.usefixtures("tiny")
def test_the_dense_network_teaches_the_pruned_one(tmp_path: Path) -> None:
    away: dict[str, float] = {}
    for name, distill in {"taught": {"weight": 1.0}, "alone": None}.items():
        recipe = checked(tmp_path / name, **merge(PRUNED, {"retrain.distill": distill, "retrain.epochs": 1}))
        train_run(recipe)
        batch, _ = next(Setting.of(recipe).measured())
        model, dense = Tiny().eval(), Tiny().eval()
        model.load_state_dict(load_file(tmp_path / name / "model.safetensors"))
        dense.load_state_dict(load_file(tmp_path / name / "dense" / "model.safetensors"))
        with torch.no_grad():
            found, wanted = (each(batch).log_softmax(-1) for each in (model, dense))
        away[name] = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert away["taught"] < 0.9 * away["alone"]
    with pytest.raises(ValueError, match=r"retrain\.distill: beside during there is no dense network"):
        checked(tmp_path, during={"gmp": {}}, **merge(PRUNED, {"retrain.distill": {}}))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "prune",
    [
        {"criterion": "wanda", "allocation": "owl", "sparsity": 0.5},
        {"criterion": {"sparsegpt": {"damping": 0.05}}, "allocation": "erk", "sparsity": 0.6},
        {"criterion": "ria", "allocation": "lamp", "sparsity": 0.6, "phases": 2},
        {"criterion": "frank_wolfe", "allocation": "uniform", "sparsity": 0.5},
    ],
    ids=lambda prune: str(prune["criterion"]),
)
def test_classifiers_take_the_criteria_that_need_inputs(tmp_path: Path, prune: dict[str, Any]) -> None:
    asked = checked(tmp_path / "run", prune=prune, retrain={"schedule": "llr", "epochs": 1})
    result = train_run(asked)
    assert result["sparsity"] == pytest.approx(prune["sparsity"], abs=2e-3)
    again = checked(tmp_path / "again", prune=prune, retrain={"schedule": "llr", "epochs": 1})
    train_run(again)
    assert same_bits(tmp_path / "run", tmp_path / "again")


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

        return train(model, until_killed, *args, **{**kwargs, "save_seconds": 0})

    monkeypatch.setattr(stages, "train", dying)
    with pytest.raises(Killed):
        train_run(checked(tmp_path / "killed", **changes))
    assert len(list((tmp_path / "killed" / "work").rglob("checkpoint.pt"))) == 1  # none of what has ended
    begun = calls
    monkeypatch.setattr(
        settings.ImageBatches, "__call__", _counting(steps := Counter(), settings.ImageBatches.__call__)
    )
    place = -1
    resumed = train_run(checked(tmp_path / "killed", **changes))
    assert calls == begun + 3 - ["dense", "the first phase", "the second phase"].index(dies_in)
    assert min(steps) == 7 or dies_in != "the second phase"  # from the checkpoint, not from the beginning
    assert same_bits(tmp_path / "whole", tmp_path / "killed")
    timed = ("seconds", "train_seconds", "images_per_second", "key")
    assert [resumed[k] for k in resumed if k not in (*timed, "stages")] == [
        whole[k] for k in whole if k not in (*timed, "stages")
    ]
    assert resumed["stages"].keys() == whole["stages"].keys()
    assert not (tmp_path / "killed" / "work").exists()


@pytest.mark.usefixtures("learning")
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
            if step == 30:
                raise Killed
            return batches(step)

        return train(model, until_killed, *args, **{**kwargs, "save_seconds": 0})

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", dying)
        with pytest.raises(Killed):
            train_run(checked(tmp_path / "killed", **changes))
    monkeypatch.setattr(
        settings.ImageBatches, "__call__", _counting(steps := Counter(), settings.ImageBatches.__call__)
    )
    assert train_run(checked(tmp_path / "killed", **changes))["stages"] == whole["stages"]
    assert min(steps) == 30
    assert same_bits(tmp_path / "whole", tmp_path / "killed")


def _counting(steps: Counter[int], call: Any) -> Any:
    def counted(self: Any, step: int) -> Any:
        if self.seed < 1_000_003 * settings._SETTLING:  # a batch that is trained on
            steps[step] += 1
        return call(self, step)

    return counted


class Tied(nn.Sequential):
    """Two layers with one weight, and a head."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 10))
        self[3].weight = self[1].weight


@pytest.mark.usefixtures("tiny")
def test_the_cost_of_a_run_is_what_cost_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for network in (Tiny, Tied):
        monkeypatch.setattr(settings, "build_model", lambda name, *, classes, channels, of=network: of())
        monkeypatch.setattr(stages, "_operations", {})
        setting = Setting.of(checked(tmp_path, prune={"sparsity": 0.5}))
        model = network()
        masks = prune(model, sparsity=0.5)
        assert stages.cost_of(model, masks, setting) == asdict(cost(model, setting.example(), masks))


@pytest.mark.usefixtures("tiny")
def test_the_training_of_a_method_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(running, "plot_run", lambda losses, stages, path, **more: drawn.update(losses=losses, **more))
    train_run(checked(tmp_path, during={"gmp": {"every": 0.25}}, prune={"sparsity": 0.8}))
    assert len(drawn["losses"]) == TRAIN["epochs"]
    assert 0 < drawn["losses"][1] < drawn["losses"][0]
    assert max(drawn["rates"]) == TRAIN["lr"]


@pytest.mark.usefixtures("tiny")
def test_a_method_during_training_is_retrained_under_its_masks(tmp_path: Path) -> None:
    recipe = checked(tmp_path, during={"gmp": {"every": 0.25}}, **PRUNED)
    result = train_run(recipe)
    assert list(result["stages"]) == ["pruned", "recalibrated", "retrained", "settled"]
    assert result["sparsity"] == pytest.approx(0.8, abs=1e-3)
    assert result["epochs"] == 3
    with pytest.raises(ValueError, match="its network was pruned while it was trained"):
        pruning_of(tmp_path, {"prune.sparsity": 0.5})


@pytest.mark.usefixtures("learning")
@pytest.mark.parametrize("row", ["dense", "retrained", "during"])
def test_every_row_ends_with_the_statistics_of_augmented_batches(tmp_path: Path, row: str) -> None:
    """Batches of the training's size: on plain images, in batches of another size, the numbers are others."""
    during: dict[str, Any] = {"during": {"gmp": {"every": 0.25}}, "prune": {"sparsity": 0.8}}
    recipe = checked(tmp_path, **{"dense": {}, "retrained": PRUNED, "during": during}[row], recalibrate=0.5)
    result, setting, model = train_run(recipe), Setting.of(recipe), Tiny()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    left = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batches = setting.batches(settings._SETTLING)
    seen = recalibrate_(model, [batches(step) for step in range(setting.steps(0.5))])
    assert seen == 10 * TRAIN["batch_size"]
    assert all(torch.equal(left[name], buffer) for name, buffer in model.named_buffers())
    assert accuracy(model, setting.measured()).top1 == result["accuracy"]
    mean, std = setting.sets.mean, setting.sets.std
    recalibrate_(model, plain_batches(setting.sets.train, batch_size=1000, mean=mean, std=std))
    assert not torch.allclose(left["1.running_var"], dict(model.named_buffers())["1.running_var"], rtol=1e-3)


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_is_pruned_again_without_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_run(checked(tmp_path / "run"))
    both = train_run(checked(tmp_path / "both", prune={"sparsity": 0.7}, retrain={"schedule": "slr", "epochs": 1}))
    calls: list[int] = []
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *args, **kwargs: (calls.append(kwargs["part"]), fit(*args, **kwargs))[1])
    asked = {"prune.sparsity": 0.7, "retrain.schedule": "slr", "retrain.epochs": 1}
    recipe = pruning_of(tmp_path / "run", asked)
    assert train_run(recipe, dense=tmp_path / "run" / "dense")["accuracy"] == both["accuracy"]
    assert calls == [1]
    assert same_bits(tmp_path / "run" / "pruned", tmp_path / "both")
    for changes, message in [({"train.lr": 1.0}, "only prune, retrain"), ({}, "give --sparsity")]:
        with pytest.raises(ValueError, match=message):
            pruning_of(tmp_path / "run", {**({"prune.sparsity": 0.5} if changes else {}), **changes})
    with pytest.raises(FileNotFoundError, match="run its recipe first"):
        pruning_of(tmp_path / "nowhere", {})


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_is_pruned_as_a_recipe_with_these_flags_would_be(tmp_path: Path) -> None:
    """The sparsity and the allocation that its own kind, pattern or scope implied are not asked for."""
    train_run(checked(tmp_path / "run"))
    rest, path = {"exclude": ["0"]}, tmp_path / "run" / "recipe.yaml"
    for first, then in (
        ({}, {"kind": "filters"}),
        ({}, {"pattern": "2:4"}),
        ({}, {"scope": "row"}),
        ({"kind": "filters"}, {"kind": "zeros"}),
        ({"pattern": "2:4"}, {"pattern": "unstructured"}),
        ({"sparsity": 0.5}, {"kind": "filters"}),
        ({"allocation": "erk"}, {"sparsity": 0.5}),
    ):
        path.write_text(yaml.safe_dump(checked(tmp_path / "run", prune={**rest, **first}).model_dump(mode="json")))
        found = pruning_of(tmp_path / "run", {f"prune.{key}": value for key, value in then.items()})
        assert found.prune == checked(tmp_path, prune={**rest, **first, **then}).prune, (first, then)


def test_a_run_is_measured_on_corrupted_images(tiny: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"names": ["fog", "contrast"], "severities": [1, 5], "folder": str(tmp_path / "sets")}
    plain = train_run(checked(tmp_path / "plain", **PRUNED))
    recipe = checked(tmp_path / "run", **PRUNED, corruptions=asked)
    with pytest.raises(ValueError, match=r"no .*fog\.npy, .* name another folder"):
        train_run(recipe)
    assert not (tmp_path / "run").exists()
    for name in asked["names"]:
        make(recipe, name)
    found = train_run(recipe)
    assert found["stages"]["retrained"] == plain["stages"]["retrained"]
    assert "corrupted" not in plain
    corrupted = found["corrupted"]
    each = [row[severity]["top1"] for row in corrupted["sets"].values() for severity in ("1", "5")]
    assert corrupted["mean"]["top1"] == pytest.approx(sum(each) / 4)
    assert corrupted["by_severity"]["5"]["top1"] < corrupted["by_severity"]["1"]["top1"] <= found["accuracy"] + 0.05
    setting = Setting.of(checked(tmp_path / "run"))
    model = Tiny()
    model.load_state_dict(load_file(tmp_path / "run" / "model.safetensors"))
    ((_, _, images),) = corrupted_sets(setting.sets.measured, tmp_path / "sets", ["fog"], [5])
    alone = accuracy(model, plain_batches(images, batch_size=359, mean=setting.sets.mean, std=setting.sets.std))
    assert corrupted["sets"]["fog"]["5"]["top1"] == alone.top1
    assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-2]["stage"] == "corrupted"
    show_run(found, tmp_path / "run")
    assert "severity 5" in capsys.readouterr().out


@pytest.mark.usefixtures("tiny")
def test_a_subset_is_retrained_by_distillation_and_the_rest_stays(tmp_path: Path) -> None:
    run = {"prune": {"sparsity": 0.7}, "recalibrate": 0.0}
    how = {"rank": 2, "steps": 8, "schedule": "llr", "lr": 1e-2, "distill": {}}
    train_run(checked(tmp_path / "pruned", **run), dense=tmp_path / "dense")
    before, _ = read_tensors(tmp_path / "pruned" / "model.safetensors")
    weights = {name for name, each in before.items() if each.ndim > 1}
    for train in (["norms", "biases"], ["mask_lora"]):
        out = tmp_path / train[0]
        train_run(checked(out, **run, retrain=how | {"train": train}), dense=tmp_path / "dense")
        after, _ = read_tensors(out / "model.safetensors")
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved & weights == (weights if train == ["mask_lora"] else set())
        assert moved - weights  # BatchNorm counts on
        assert all(bool((after[name][before[name] == 0] == 0).all()) for name in weights)


@pytest.mark.usefixtures("tiny")
def test_a_running_mean_of_a_subset_does_not_look_for_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    retrain = {"rank": 2, "steps": 2, "schedule": "llr", "lr": 1e-2, "train": ["norms", "mask_lora"]}
    train_run(checked(tmp_path, train=TRAIN | {"ema": 0.9}, prune={"sparsity": 0.7}, retrain=retrain))
    assert "stay dense" not in caplog.text


@pytest.mark.usefixtures("tiny")
def test_a_network_begins_alike_whatever_other_threads_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(name: str, *, classes: int, channels: int) -> nn.Module:
        first = nn.Linear(2, 2)
        other = threading.Thread(target=torch.rand, args=(3,))
        other.start()
        other.join()
        return nn.Sequential(first, nn.Linear(2, 2))

    setting = Setting.of(checked(tmp_path, seed=3))
    monkeypatch.setattr(settings, "build_model", build)
    torch.manual_seed(setting.recipe.seed)
    expected, after = [nn.Linear(2, 2).weight for _ in range(2)], torch.get_rng_state()
    assert all(torch.equal(x.weight, y) for x, y in zip(setting.new_model().children(), expected, strict=True))
    assert not torch.equal(torch.get_rng_state(), after)  # what the other thread drew is drawn


def test_images_that_were_changed_are_read_again_by_the_next_call(tmp_path: Path, few: str) -> None:
    state, path = load_file(few), tmp_path / "images.safetensors"
    seen: list[float] = []
    for pixels in (state["pixels"], 255 - state["pixels"]):
        save_file({"pixels": pixels, "labels": state["labels"]}, path)
        setting = Setting.anew(checked(tmp_path / "run", images=str(path)))
        assert Setting.of(setting.recipe).sets is setting.sets
        seen.append(float(setting.sets.mean))
    assert seen[1] == pytest.approx(1 - seen[0])


def test_operations_are_those_of_the_networks_arguments(tmp_path: Path, few: str) -> None:
    small = {"image_size": 8, "patch_size": 4, "num_attention_heads": 2, "num_hidden_layers": 1}
    for width in (8, 16):
        asked = checked(tmp_path, images=few, model="transformers:vit", arguments=small | {"hidden_size": width})
        assert stages.operations(Setting.of(asked))["classifier"] == 2 * width * 10


def test_a_vision_transformer_is_trained_by_adamw_and_saved_as_transformers_reads_it(tmp_path: Path, few: str) -> None:
    small = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    train = {"epochs": 1, "batch_size": 64, "lr": 1e-3, "warmup": 0, "optimizer": "adamw", "augment": {"cutmix": 1.0}}
    changes = {
        "images": few,
        "model": "transformers:vit",
        "arguments": small | {"num_hidden_layers": 1},
        "train": train,
    }
    changes |= {"prune": {"criterion": "wanda", "sparsity": 0.5, "allocation": "uniform", "exclude": ["classifier"]}}
    result = train_run(checked(tmp_path / "run", **changes))
    assert result["sparsity"] == pytest.approx(0.5, abs=0.01)
    back = AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    state, _ = read_tensors(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(each, state[name]) for name, each in back.state_dict().items())
    again = checked(tmp_path / "again", images=few, model=str(tmp_path / "run"), train=train | {"epochs": 1})
    assert isinstance(Setting.of(again).new_model(), type(back))
