"""Classifier recipes that train by Frank-Wolfe, proximal SGD or under a penalty: refused, run, killed, retrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prunus.frankwolfe.constrained import KeptGradients
from prunus.frankwolfe.proximal import GroupLasso, NuclearNorm, ProximalSGD
from prunus.frankwolfe.sets import KSupport
from prunus.frankwolfe.sfw import SFW
from prunus.recipe import ClassifierRecipe, OptimizerChoice, parse
from prunus.recipe.optimizers import Given
from prunus.run.compare import compare
from prunus.run.grid import Grid
from prunus.vision import stages
from prunus.vision.dense import dense_key
from prunus.vision.setting import Setting
from prunus.vision.train import train_run
from tests.systems.test_vision import TRAIN, Killed, Tiny, checked, learning, raw, same_bits, tiny

__all__ = ["learning", "tiny"]

SMALL: dict[str, Any] = {"sfw": {"size": {"initial": 3.0}, "k": 0.2}}
PULLED: dict[str, Any] = {"prox": {"groups": 3.0, "exclude": ["8"]}}
MILD: dict[str, Any] = {"prox": {"groups": 0.1, "exclude": ["8"]}}
NUCLEAR: dict[str, Any] = {"prox": {"nuclear": 0.1, "every": 4, "exclude": ["8"]}}


def trained_by(optimizer: Any, **changes: Any) -> dict[str, Any]:
    return {**TRAIN, "optimizer": optimizer, **changes}


WRONG = [
    ({"optimizer": "sgdd"}, "did you mean 'sgd'?"),
    ({"optimizer": {"sfw": {"kk": 3}}}, "unknown key 'train.optimizer.sfw.kk'"),
    ({"optimizer": {"sfw": {}, "prox": {"groups": 1}}}, "give exactly one of adamw, prox, sfw, sgd; got prox, sfw"),
    ({"optimizer": {"sfw": {"size": {"radius": 1, "initial": 2}}}}, "exactly one of radius, diameter, initial"),
    ({"optimizer": {"sfw": {"size": {"radius": 0}}}}, "greater than 0 (got 0)"),
    ({"optimizer": {"sfw": {"set": "ksupport"}}}, "'k_support'"),
    ({"optimizer": {"sfw": {"k": 1.5}}}, "K is a count (an int of at least 1) or a share"),
    (
        {"optimizer": {"sfw": {"set": "nuclear", "k": 3}}},
        "the set nuclear takes no k; leave it out, or use group_k_support",
    ),
    ({"optimizer": {"sfw": {"p": 2}}}, "the set k_support takes no p; leave it out, or use lp"),
    ({"optimizer": {"sfw": {"rescale": "slow"}}}, "'fast_gradient'"),
    ({"optimizer": {"prox": {}}}, "give either groups or nuclear"),
    ({"penalty": {"groups": 1, "nuclear": 1}}, "give either groups or nuclear"),
    ({"penalty": {"groups": 1, "every": 2}}, "every goes with nuclear"),
    ({"penalty": {"groups": -1}}, "greater than 0 (got -1)"),
    ({"optimizer": "sfw", "nesterov": True}, "leave out nesterov or optimizer"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_optimizers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse({"images": "digits", "train": changes}, ClassifierRecipe, "test")
    assert message in str(caught.value)


def test_a_written_recipe_is_read_as_the_same(tmp_path: Path) -> None:
    """Counts stay counts and shares stay shares, infinity too."""
    for optimizer in ({"sfw": {"k": 1}}, {"sfw": {"k": 1.0}}, {"sfw": {"set": "lp", "p": float("inf")}}, "sgd", PULLED):
        recipe = checked(tmp_path, train=trained_by(optimizer))
        again = parse(json.loads(json.dumps(recipe.model_dump(mode="json"))), ClassifierRecipe, "test")
        assert again == recipe
        assert dense_key(again) == dense_key(recipe)
    keys = {dense_key(checked(tmp_path, train=trained_by({"sfw": {"k": k}}))) for k in (1, 1.0, 0.3)}
    assert len({*keys, dense_key(checked(tmp_path))}) == 4


def made(optimizer: Any, model: Tiny, **changes: Any) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-3} | changes
    return OptimizerChoice.model_validate(optimizer).one.made(model, Given(reference=Tiny, **options))


def test_which_parameters_are_constrained_and_what_the_others_get() -> None:
    model = Tiny()
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def inside(optimizer: torch.optim.Optimizer) -> list[list[str]]:
        return [[names[id(each)] for each in group["params"]] for group in optimizer.param_groups]

    everything = made("sfw", model)
    assert inside(everything) == [[*names.values()]]
    assert everything.param_groups[0]["constraint"][0].gauge == KSupport(0.1)
    filters = made({"sfw": {"set": "group_k_support", "rest": "free"}}, model)
    assert inside(filters)[0] == ["0.weight", "3.weight"]  # not the one Linear layer
    assert [group["weight_decay"] for group in filters.param_groups] == [0.0, 1e-3]
    assert filters.param_groups[1]["constraint"] is None
    chosen = made({"sfw": {"exclude": ["8"]}}, model)
    assert inside(chosen)[0] == ["0.weight", "3.weight"]
    assert chosen.param_groups[1]["constraint"][0].radius == pytest.approx(3 * 8**0.5)  # a BatchNorm's weight
    pulled = made(PULLED, model)
    assert inside(pulled)[0] == ["0.weight", "3.weight"]
    assert [group["strength"] for group in pulled.param_groups] == [3.0, 0.0]
    decayed = made({"sgd": {"decoupled_decay": 0.1}}, model)
    assert isinstance(decayed, SFW)
    assert [group["decoupled_decay"] for group in decayed.param_groups] == [0.1]
    assert type(made("sgd", model, nesterov=True)) is torch.optim.SGD
    with pytest.raises(ValueError, match="'conv' matches none"):
        made({"sfw": {"include": ["conv"]}}, model)


def test_measured_norms_are_those_before_training() -> None:
    torch.manual_seed(0)
    fresh, model = Tiny(), Tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(7)
    choice = OptimizerChoice.model_validate({"sfw": {"norms": "measured", "size": {"initial": 2.0}}})
    optimizer = choice.one.made(model, Given(0.1, 0.9, False, 0.0, lambda: fresh))
    radii = [ball.radius for ball in optimizer.param_groups[0]["constraint"]]
    norms = [float(parameter.detach().norm()) for parameter in fresh.parameters()]
    assert radii == pytest.approx([2 * norm if norm else 2.0 for norm in norms], rel=1e-5)


def feasible(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    pairs = zip(optimizer.param_groups[0]["params"], optimizer.param_groups[0]["constraint"], strict=True)
    return all(float(ball.norm(parameter.detach())) <= ball.radius * (1 + 1e-4) for parameter, ball in pairs)


@pytest.mark.usefixtures("learning")
def test_frank_wolfe_trains_prunes_and_retrains_inside_its_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.optim.Optimizer, list[str]]] = []
    train = stages.train

    def spying(model: Any, batches: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        found = train(model, batches, optimizer, *args, **kwargs)
        assert feasible(model, optimizer)
        seen.append((optimizer, [type(each).__name__ for each in kwargs["during"]]))
        return found

    monkeypatch.setattr(stages, "train", spying)
    changes = {"prune": {"sparsity": 0.7}, "retrain": {"schedule": "allr", "epochs": 1}}
    result = train_run(checked(tmp_path, train=trained_by(SMALL, epochs=3), **changes))
    assert [type(optimizer) for optimizer, _ in seen] == [SFW, SFW]
    assert seen[1][1] == [KeptGradients.__name__]
    assert result["stages"]["dense"]["top1"] > 0.6
    assert result["stages"]["retrained"]["top1"] > 0.6
    assert result["phases"][0]["initial_lr"] == pytest.approx(0.1 * max(1 / 3, result["phases"][0]["distance"]))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "optimizer",
    [
        SMALL,
        {"sfw": {"set": "spectral_k_support", "rest": "free"}},
        PULLED,
        NUCLEAR,
        {"sgd": {"decoupled_decay": 0.01}},
    ],
    ids=["entries", "spectral", "proximal", "nuclear", "decay"],
)
def test_a_killed_training_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: Any
) -> None:
    changes = {"train": trained_by(optimizer)}
    train_run(checked(tmp_path / "whole", **changes))
    train = stages.train

    def dying(model: Any, batches: Any, *args: Any, **kwargs: Any) -> Any:
        def until_killed(step: int) -> Any:
            if step == 17:
                raise Killed
            return batches(step)

        return train(model, until_killed, *args, **{**kwargs, "save_seconds": 0})

    with monkeypatch.context() as patch:
        patch.setattr(stages, "train", dying)
        with pytest.raises(Killed):
            train_run(checked(tmp_path / "killed", **changes))
    train_run(checked(tmp_path / "killed", **changes))
    assert same_bits(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.usefixtures("tiny")
def test_proximal_steps_and_penalties_end_with_the_first_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[type, list[type]]] = []
    train = stages.train

    def spying(model: Any, batches: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((type(optimizer), [type(each) for each in kwargs["during"]]))
        return train(model, batches, optimizer, *args, **kwargs)

    monkeypatch.setattr(stages, "train", spying)
    changes: dict[str, Any] = {"prune": {"sparsity": 0.5}, "retrain": {"epochs": 1}}
    train_run(checked(tmp_path / "prox", train=trained_by(PULLED, epochs=1), **changes))
    assert [optimizer for optimizer, _ in seen] == [ProximalSGD, torch.optim.SGD]
    weights = load_file(tmp_path / "prox" / "dense" / "model.safetensors")
    assert int((weights["3.weight"].flatten(1).norm(dim=1) == 0).sum()) > 0  # filters that the steps zeroed
    seen.clear()
    for kind, penalty in (("groups", GroupLasso), ("nuclear", NuclearNorm)):
        asked = {**TRAIN, "epochs": 1, "penalty": {kind: 1e-3, "exclude": ["8"]}}
        train_run(checked(tmp_path / kind, train=asked, **changes))
        assert [penalty in methods for _, methods in seen[-2:]] == [True, False]


@pytest.mark.usefixtures("tiny")
def test_optimizers_are_an_axis_whose_trainings_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    fit = stages.fit
    monkeypatch.setattr(stages, "fit", lambda *args, **kwargs: (trained.append(1), fit(*args, **kwargs))[1])
    base = raw(tmp_path)
    del base["out"]
    asked = {
        "base": {**base, "train": {**TRAIN, "epochs": 1}},
        "axes": {
            "optimizer": {"SGD": {}, "SFW": {"train.optimizer": SMALL}, "SFW 50": {"train.optimizer.sfw.k": 50}},
            "sparsity": {f"{s} %": {"prune.sparsity": s / 100} for s in (0, 50, 90)},
        },
        "seeds": [0, 1],
        "out": str(tmp_path / "grid"),
    }
    rows = compare(parse(asked, Grid, "grid"))
    assert len(rows) == 9
    assert len(trained) == 6  # three optimizers, two seeds
    assert (
        Setting.of(parse(asked, Grid, "grid").recipe({"optimizer": "SFW", "sparsity": "0 %"}, 0, {})).capture is False
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": SMALL},
        {"optimizer": {"sfw": {"set": "spectral_k_support"}}},
        {"optimizer": MILD},
        {"optimizer": NUCLEAR},
        {"penalty": {"nuclear": 1e-3, "every": 4}},
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_captured_training_is_that_step_by_step(tmp_path: Path, changes: Any, precision: str) -> None:
    """By accuracy, of trainings in which last bits of the first weights leave it within 0.1 % (fp32) or 2.5 % (bf16).

    Strong pulls are no such: with PULLED they move a network, most of whose filters are zero by then, by 20 %.
    """
    found = [
        train_run(
            checked(tmp_path / str(way), train={**TRAIN, **changes}, device="cuda", precision=precision, capture=way)
        )
        for way in (True, False)
    ]
    assert abs(found[0]["accuracy"] - found[1]["accuracy"]) < (0.03 if precision == "fp32" else 0.06)
