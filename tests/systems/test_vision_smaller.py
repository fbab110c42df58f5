"""Classifiers that become smaller: filters removed and layers decomposed by recipes, retrained, in grids and sweeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from prunus.data.models import build_model
from prunus.measure.accuracy import accuracy
from prunus.recipe import ClassifierPrune, ClassifierRecipe, parse
from prunus.run.compare import compare
from prunus.run.grid import Grid
from prunus.shrink.filters import resized
from prunus.shrink.lowrank import decompose
from prunus.vision import stages
from prunus.vision.setting import Setting
from prunus.vision.smaller import smaller
from prunus.vision.sweeps import sweep, sweep_of
from prunus.vision.train import pruning_of, train_run
from tests.laws.test_shrink import masked_filters
from tests.systems.test_vision import TRAIN, Killed, Tiny, checked, learning, raw, same_bits, tiny

__all__ = ["learning", "tiny"]

WRONG = [
    ({"kind": "filter"}, "prune.kind"),
    ({"ranking": "taylor", "sparsity": 0.5}, "leave out prune.ranking, or set prune.kind: filters"),
    ({"kind": "filters", "ranking": "taylor", "criterion": "random"}, "leave out prune.criterion"),
    ({"kind": "filters", "phases": 2}, "makes the network smaller at once: leave out phases"),
    ({"kind": "filters", "pattern": "2:4", "sparsity": 0.5}, "leave out pattern"),
    ({"kind": "low_rank", "criterion": "random"}, "leave out criterion"),
    ({"kind": "low_rank", "allocation": "erk"}, "knows the allocations uniform and global; got 'erk'"),
]


@pytest.mark.parametrize(("prune", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_kinds_are_refused(prune: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse({"images": "digits", "prune": prune}, ClassifierRecipe, "test")
    assert message in str(caught.value)


def test_kinds_exclude_what_they_cannot_do() -> None:
    base = {"images": "digits", "train": {"snapshots": [1]}, "prune": {"kind": "filters"}}
    with pytest.raises(ValueError, match="has no earlier weights"):
        parse({**base, "retrain": {"epochs": 1, "rewind": 1}}, ClassifierRecipe, "test")
    with pytest.raises(ValueError, match=r"prune\.kind: a method that prunes during training"):
        parse({**base, "during": "gmp"}, ClassifierRecipe, "test")
    assert ClassifierPrune(kind="low_rank").allocation == ClassifierPrune(kind="filters").allocation == "uniform"
    assert ClassifierPrune().allocation == "global"


def by_loss(model: nn.Module, setting: Setting) -> dict[str, torch.Tensor]:
    """Half of the filters of each layer: those by whose weights the loss, were it linear, would change least."""
    found = {name: torch.zeros(width) for name, width in (("0", 8), ("3", 16))}
    for x, y in stages.calibration(setting):
        model.zero_grad()
        nn.functional.cross_entropy(model.eval()(x), y).backward()
        for name, total in found.items():
            own = [(p.detach() * p.grad).reshape(len(p), -1) for p in model.get_submodule(name).parameters()]
            total += torch.cat(own, 1).sum(1).abs()
    return {name: total.argsort()[: len(total) // 2] for name, total in found.items()}


@pytest.mark.usefixtures("tiny")
def test_filters_that_go_are_those_that_weigh_least(tmp_path: Path) -> None:
    recipe = checked(tmp_path, prune={"kind": "filters", "sparsity": 0.5}, retrain={"schedule": "allr", "epochs": 1})
    result = train_run(recipe)
    assert list(result["stages"]) == ["dense", "pruned", "recalibrated", "retrained", "settled"]
    dense, small = Tiny(), load_file(tmp_path / "model.safetensors")
    dense.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    setting = Setting.of(recipe)
    made = smaller(dense, setting, recipe.prune or ClassifierPrune(), 0)
    gone = {
        name: dense.get_submodule(name).get_parameter("weight").flatten(1).norm(dim=1).argsort()[: width // 2]
        for name, width in (("0", 8), ("3", 16))
    }
    ranked = smaller(dense, setting, ClassifierPrune(kind="filters", sparsity=0.5, ranking="taylor"), 0).model
    for going, behind in zip(by_loss(dense, setting).values(), ("1", "4"), strict=True):  # of each filter one number
        left = [place for place in range(2 * len(going)) if place not in going.tolist()]
        means = [each.get_submodule(behind).get_buffer("running_mean") for each in (ranked, dense)]
        assert torch.equal(means[0], means[1][left])
    masked = masked_filters(dense, torch.zeros(1, 1, 8, 8), gone)
    found = accuracy(made.model, setting.measured())
    assert found.top1 == accuracy(masked, setting.measured()).top1 == result["stages"]["pruned"]["top1"]
    parameters = 4 * 9 + 8 + 8 * 4 * 9 + 16 + 32 * 10 + 10
    assert result["parameters"] == result["nonzero"] == parameters == sum(p.numel() for p in made.model.parameters())
    assert result["sparsity"] == pytest.approx(1 - parameters / sum(p.numel() for p in dense.parameters()))
    assert result["left_alone"] == {"8": "its outputs are the network's"}
    assert result["by_layer"]["3"] == 0.75
    assert result["speedup"] > 2
    weights = [dense.get_submodule(name).get_parameter("weight").detach().double() for name in ("0", "3", "8")]
    left = [made.model.get_submodule(name).get_parameter("weight").detach().double() for name in ("0", "3", "8")]
    energies = [float(sum(w.square().sum() for w in each)) for each in (weights, left)]
    counts = [sum(w.numel() for w in each) for each in (weights, left)]
    share = 1 - counts[1] / counts[0]
    distance = ((energies[0] - energies[1]) / energies[0] / share) ** 0.5
    assert result["phases"][0]["distance"] == pytest.approx(distance)
    assert result["phases"][0]["initial_lr"] == pytest.approx(0.1 * max(0.5, min(1.0, distance)))
    again = resized(Tiny(), small)
    assert accuracy(again, setting.measured()).top1 == result["accuracy"]


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_low_rank_is_the_nearest_of_that_rank(tmp_path: Path, allocation: str) -> None:
    recipe = checked(tmp_path, prune={"kind": "low_rank", "sparsity": 0.6, "allocation": allocation})
    result = train_run(recipe)
    dense, setting = Tiny(), Setting.of(recipe)
    dense.load_state_dict(load_file(tmp_path / "dense" / "model.safetensors"))
    assert result["left_alone"]["8"] == "its outputs are the network's"
    if allocation == "uniform":
        thin, report = decompose(dense, {"0": 3, "3": 6})
        assert accuracy(thin, setting.measured()).top1 == result["stages"]["pruned"]["top1"]
        lost = sum(
            (each.error * float(dense.get_submodule(each.name).get_parameter("weight").detach().norm())) ** 2
            for each in report
        )
        whole = sum(float(p.detach().square().sum()) for p in dense.parameters() if p.ndim > 1)
        share = sum(each.before - each.after for each in report) / 1864
        assert result["phases"][0]["distance"] == pytest.approx((lost / whole / share) ** 0.5, rel=1e-5)
    else:  # at most 40 % of the weights of the two convolutions, and nearly that
        left = result["parameters"] - 8 * 2 - 16 * 2 - 650
        assert 0.25 * 1224 < left <= 0.4 * 1224
    loaded = resized(Tiny(), load_file(tmp_path / "model.safetensors"))
    assert accuracy(loaded, setting.measured()).top1 == result["accuracy"]


@pytest.mark.usefixtures("learning")
def test_a_killed_retraining_of_a_smaller_network_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {
        "train": {**TRAIN, "optimizer": {"sfw": {"set": "group_k_support"}}},
        "prune": {"kind": "filters", "sparsity": 0.5},
        "retrain": {"epochs": 1},
    }
    whole = train_run(checked(tmp_path / "whole", **changes))
    train = stages.train
    optimizers: list[type] = []

    def dying(model: Any, batches: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        optimizers.append(type(optimizer))

        def until_killed(step: int) -> Any:
            if len(optimizers) == 2 and step == 17:
                raise Killed
            return batches(step)

        return train(model, until_killed, optimizer, *args, **{**kwargs, "save_seconds": 0})

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", dying)
        with pytest.raises(Killed):
            train_run(checked(tmp_path / "killed", **changes))
    assert optimizers[1] is torch.optim.SGD
    again = train_run(checked(tmp_path / "killed", **changes))
    assert again["stages"]["retrained"] == whole["stages"]["retrained"]
    assert same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.usefixtures("tiny")
def test_a_finished_run_is_made_smaller(tmp_path: Path) -> None:
    train_run(checked(tmp_path / "run"))
    recipe = pruning_of(tmp_path / "run", {"prune.kind": "filters", "prune.sparsity": 0.25, "prune.exclude": ["0"]})
    result = train_run(recipe, dense=tmp_path / "run" / "dense")
    assert result["left_alone"]["0"] == "it is excluded"
    assert result["by_layer"]["0"] == 0


@pytest.mark.usefixtures("tiny")
def test_kinds_and_optimizers_are_axes_of_one_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *args, **kwargs: (trained.append(1), fit(*args, **kwargs))[1])
    base = raw(tmp_path)
    del base["out"]
    sfw = {"sfw": {"set": "group_k_support", "k": 0.5}}
    asked = {
        "base": {**base, "train": {**TRAIN, "epochs": 1}},
        "axes": {
            "optimizer": {"SGD": {}, "SFW": {"train.optimizer": sfw}},
            "kind": {name: {"prune.kind": name} for name in ("zeros", "filters", "low_rank")},
            "rate": {"30 %": {"prune.sparsity": 0.3}, "60 %": {"prune.sparsity": 0.6}},
        },
        "seeds": [0, 1],
        "show": {"columns": ["parameters", "speedup", "recalibrated"]},
        "out": str(tmp_path / "grid"),
    }
    rows = compare(parse(asked, Grid, "grid"), together=2)
    assert len(rows) == 12
    assert len(trained) == 4
    parameters = {(row["kind"], row["rate"]): row["metrics"]["parameters"]["mean"] for row in rows}
    assert parameters["zeros", "60 %"] > parameters["filters", "30 %"] > parameters["filters", "60 %"]
    assert all(row["metrics"]["parameters"]["std"] == 0 for row in rows)


@pytest.mark.usefixtures("tiny")
def test_a_sweep_has_every_kind(tmp_path: Path) -> None:
    train_run(checked(tmp_path / "run"))
    result = sweep(sweep_of(tmp_path / "run", rates=[0.0, 0.6], timed=8))
    assert [(point["kind"], point["rate"]) for point in result["points"]] == [
        (kind, rate) for kind in ("zeros", "filters", "low_rank") for rate in (0.0, 0.6)
    ]
    whole = result["dense"]
    for none, much in zip(result["points"][::2], result["points"][1::2], strict=True):
        assert none["accuracy"] == pytest.approx(result["points"][0]["accuracy"], abs=0.01)
        assert (none["parameters"], none["sparse_flops"]) == (whole["parameters"], whole["sparse_flops"])
        assert much["nonzero"] < 0.7 * none["nonzero"]
        assert much["sparse_flops"] < 0.7 * none["sparse_flops"]


def test_what_would_be_empty_keeps_its_best_and_is_listed(tmp_path: Path) -> None:
    setting = Setting.of(checked(tmp_path))
    model = build_model("resnet8", classes=10, channels=1)
    made = smaller(model, setting, ClassifierPrune(kind="filters", sparsity=0.98), 0)
    assert made.left_alone["stage1_1.conv1"] == "its best filter stays"
    assert made.model.get_submodule("stage1_1.conv1").get_parameter("weight").shape[0] == 1
    assert "stage3_1.conv1" not in made.left_alone
    assert made.left_alone["stem"].startswith("its channels meet those of")
    draws = [
        smaller(model, setting, ClassifierPrune(kind="filters", criterion="random"), seed).model for seed in (0, 0, 1)
    ]
    weights = [draw.get_submodule("stage1_1.conv1").get_parameter("weight") for draw in draws]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


class Bare(nn.Module):
    """A network whose outputs are not those of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 12, 8), nn.Conv2d(12, 10, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)).flatten(1)


def test_without_a_layer_of_outputs_every_layer_is_decomposed(tmp_path: Path) -> None:
    made = smaller(Bare(), Setting.of(checked(tmp_path)), ClassifierPrune(kind="low_rank", sparsity=0.6), 0)
    assert made.left_alone == {}
    assert all(isinstance(module, nn.Sequential) for module in made.model.children())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["filters", "low_rank"])
def test_on_a_gpu_the_smaller_network_is_trained_on(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"prune": {"kind": kind, "sparsity": 0.5}, "retrain": {"epochs": 1}, "device": "cuda"}
    assert train_run(checked(tmp_path, **changes))["accuracy"] > 0.8
