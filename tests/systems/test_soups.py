"""Soups of classifiers on handwritten digits: the loop, averages, baselines, kills, ways of running members, grids."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from prunus.frankwolfe import GroupLasso, ProximalSGD
from prunus.jobs.pool import Workers
from prunus.masks import Masks
from prunus.measure.accuracy import accuracy
from prunus.measure.ensemble import ensemble_accuracy
from prunus.prune import prune
from prunus.recipe import ClassifierRecipe, member_of, order_of, parse
from prunus.run.cli import app
from prunus.run.compare import compare
from prunus.run.grid import Grid
from prunus.score.criteria import magnitude, random
from prunus.soup import sms_
from prunus.soup.average import average
from prunus.soup.imp import Phase, imp
from prunus.train.batchnorm import recalibrate_
from prunus.train.lr import allr
from prunus.vision import setting as settings
from prunus.vision import stages
from prunus.vision.dense import read_dense
from prunus.vision.jobs import Training, base_job, pruned_job, trained_job
from prunus.vision.setting import Setting
from prunus.vision.train import planned, train_run
from tests.processes import start_command
from tests.systems.test_vision import Tiny, few, learning, make_tiny, raw, tiny

__all__ = ["few", "learning", "tiny"]

PRUNED: dict[str, Any] = {"prune": {"sparsity": 0.9, "phases": 2}, "retrain": {"schedule": "allr", "epochs": 1}}


def asked(out: Path, soup: dict[str, Any] | None = None, **changes: Any) -> ClassifierRecipe:
    section = {"members": 3, "baselines": [], "line": 0, "plane": 0} | (soup or {})
    return parse(raw(out, **{**PRUNED, "soup": section, **changes}), ClassifierRecipe, "test")


def row(result: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in result["rows"] if each["name"] == name)


def held_out(**changes: Any) -> dict[str, Any]:
    return {"images": {"source": "digits", "measure_on": "both"}} | changes


WHOLE: dict[str, Any] = {"baselines": ["imp", "longer"], "line": 3, "plane": 2}
Made = tuple[ClassifierRecipe, dict[str, Any]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A soup that is finished, one job after another, and its result."""
    with pytest.MonkeyPatch.context() as patched:
        make_tiny(patched)
        recipe = asked(tmp_path_factory.mktemp("whole") / "soup", WHOLE)
        return recipe, train_run(recipe)


@pytest.mark.usefixtures("tiny")
def test_a_soup_leaves_what_it_says(whole: Made) -> None:
    recipe, result = whole
    out = Path(recipe.out)
    names = "accuracy.png lines.png masks.safetensors model.safetensors plane.png prunus.json recipe.yaml result.json"
    assert {path.name for path in out.iterdir()} == {*names.split(), ".prunus-run", "members", "dense"}
    model, setting = Tiny(), Setting.of(recipe)
    model.load_state_dict(load_file(out / "model.safetensors"))
    masks = Masks.load(out / "masks.safetensors")
    masks.check(model)
    assert masks.sparsity == result["sparsity"] == pytest.approx(0.9, abs=1e-3)
    assert accuracy(model, setting.measured()).top1 == result["accuracy"] == row(result, "soup")["accuracy"]
    assert result["phases"][0]["sparsity"] == pytest.approx(1 - 0.1**0.5, abs=1e-3)
    assert [len(phase["members"]) for phase in result["phases"]] == [3, 3]
    assert set(result["between"]["lines"]) == {"1 to 2", "1 to 3", "2 to 3"}
    assert train_run(recipe) == json.loads((out / "result.json").read_text())
    # A mean member costs what the soup's first phase did, and one retraining.
    epochs = {each["name"]: each["epochs"] for each in result["rows"]}
    alone = {"mean_member": 6, "best_member": 8, "ensemble": 8}
    assert epochs == {"dense": 2, "soup": 8, "imp": 4, "longer": 8, **alone}
    assert row(result, "ensemble")["inference"] == pytest.approx(3 * row(result, "soup")["inference"])


@pytest.mark.usefixtures("tiny")
def test_the_recipe_is_the_library_s_loop(whole: Made) -> None:
    """Every phase of `prunus run` against `sms_` with `train` called by hand: the same bits."""
    recipe, result = whole
    out = Path(recipe.out)
    setting, dense = Setting.of(recipe), read_dense(out / "dense")
    assert dense is not None
    assert recipe.prune is not None
    model = Tiny()
    model.load_state_dict(load_file(out / "dense" / "model.safetensors"))

    def retrain(copy: nn.Module, phase: Phase, place: int) -> None:
        own = replace(setting, recipe=member_of(recipe, place))
        if phase.index == 1:  # as every run begins its last phase
            stages.settle(copy, setting)
        steps = own.epoch_steps
        signals = phase.signals(steps, dense.original)
        rates = allr(dense.original, steps, distance=signals.distance, share=signals.share)
        stages.fit(copy, own, rates, steps=steps, part=phase.index + 1, lr=0.1, masks=phase.masks)
        stages.settle(copy, own)

    def select(network: nn.Module, sparsity: float, within: Masks | None) -> Masks:
        return stages.select(network, sparsity, within, recipe.prune, 0, setting=setting)  # pyright: ignore

    masks = sms_(
        model,
        sparsity=0.9,
        phases=2,
        members=3,
        select=select,
        retrain=retrain,
        settle=lambda network: stages.settle(network, setting),
    )
    assert masks == Masks.load(out / "masks.safetensors")
    state = load_file(out / "model.safetensors")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert accuracy(model, setting.measured()).top1 == result["accuracy"]


@pytest.mark.usefixtures("tiny")
def test_imp_is_the_run_of_prunus_train(tmp_path: Path, whole: Made) -> None:
    result = whole[1]
    alone = train_run(parse(raw(tmp_path / "alone", **PRUNED), _plain(), "alone"))
    assert row(result, "imp")["accuracy"] == alone["accuracy"]
    assert row(result, "imp")["loss"] == alone["loss"]
    assert {**result["stages"]["dense"], "images_per_second": 0} == {**alone["stages"]["dense"], "images_per_second": 0}
    assert row(result, "imp")["epochs"] == alone["epochs"] == 4


def _plain() -> Any:
    return ClassifierRecipe


@pytest.mark.usefixtures("tiny")
def test_baselines_are_what_they_are_called(tmp_path: Path) -> None:
    result = train_run(asked(tmp_path, {"baselines": ["imp", "longer", "reprune", "dense", "swa"]}, **held_out()))
    epochs = {each["name"]: each["epochs"] for each in result["rows"]}
    wanted = {"imp": 4, "longer": 8, "swa": 8, "reprune": 8, "dense_soup": 8, "dense_soup_pruned": 8}
    assert {name: epochs[name] for name in wanted} == wanted
    assert epochs["dense_soup_retrained"] == 9
    sparse = [each for each in result["rows"] if each["name"] not in ("dense", "dense_soup")]
    assert all(each["sparsity"] == pytest.approx(0.9, abs=1e-3) for each in sparse)
    assert row(result, "dense_soup")["inference"] == 1
    assert row(result, "swa")["loss"] != row(result, "longer")["loss"]
    # In the first phase the members of the soup are the runs that are pruned again: 3 + 3 in the second phase,
    # 2 of the longer run, 3 dense ones and their retraining; imp is the first of the runs.
    assert len(list((tmp_path / "members" / "trainings").glob("*.json"))) == 3 + 3 + 3 + 2 + 3 + 1


@pytest.mark.usefixtures("tiny")
def test_the_ensemble_is_scored_against_the_true_labels(tmp_path: Path) -> None:
    recipe = asked(tmp_path, prune={"sparsity": 0.9})
    result = train_run(recipe)
    models = []
    for path in sorted((tmp_path / "members" / "trainings").glob("*/model.safetensors")):
        models.append(Tiny())
        models[-1].load_state_dict(load_file(path))
    assert len(models) == 3
    found = ensemble_accuracy(models, Setting.of(recipe).measured())
    assert row(result, "ensemble")["accuracy"] == found.top1
    assert row(result, "ensemble")["loss"] == pytest.approx(found.loss)
    singles = sorted(accuracy(model, Setting.of(recipe).measured()).top1 for model in models)
    assert sorted(result["phases"][0]["members"]) == singles
    assert row(result, "best_member")["accuracy"] == singles[-1]
    assert row(result, "mean_member")["accuracy"] == pytest.approx(sum(singles) / 3)


@pytest.mark.usefixtures("tiny")
def test_a_greedy_soup_is_the_best_of_those_it_could_have_been(tmp_path: Path) -> None:
    """Against every subset, by its own score: the greedy one is at least as good as each member, and one of them."""
    recipe = asked(tmp_path, {"average": "greedy", "members": 4}, **held_out(prune={"sparsity": 0.95}))
    result = train_run(recipe)
    setting = Setting.of(recipe)
    assert setting.sets.held is not None
    states = {}
    for path in (tmp_path / "members" / "trainings").glob("*/model.safetensors"):
        states[path.parent.stem] = load_file(path)
    model = Tiny()

    def score(keys: tuple[str, ...]) -> tuple[float, float]:
        model.load_state_dict(average([states[key] for key in keys]))
        recalibrate_(model, setting.training(1.0))
        return accuracy(model, setting.held()).top1, accuracy(model, setting.measured()).top1

    every = {keys: score(keys) for size in range(1, 5) for keys in itertools.combinations(sorted(states), size)}
    shares = result["phases"][0]["shares"]
    chosen = [found for keys, found in every.items() if len(keys) == sum(share > 0 for share in shares)]
    assert result["accuracy"] in [test for _, test in chosen]
    best_single = max(held for keys, (held, _) in every.items() if len(keys) == 1)
    mine = [held for held, test in chosen if test == result["accuracy"]]
    assert max(mine) >= best_single
    assert sum(shares) == pytest.approx(1)


@pytest.mark.usefixtures("tiny")
def test_averages_weigh_as_they_are_told(tmp_path: Path) -> None:
    several = ["ties", {"ties": {"density": 0.5}}]
    also = ["uniform", "learned", *several]
    one = train_run(asked(tmp_path, {"average": [0.0, 1.0, 0.0], "also": also}, **held_out()))
    assert one["phases"][0]["shares"] == [0, 1, 0]
    learned = row(one, "learned")["shares"]
    assert sum(learned) == pytest.approx(1)
    assert len(set(learned)) == 3
    assert len({row(one, name)["loss"] for name in ("uniform", "soup", "ties", "ties (density=0.5)")}) == 4
    assert len(one["soup"]) == len(one["rows"])  # of one name none hides another


@pytest.mark.usefixtures("tiny")
def test_what_varies_varies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    fit = stages.fit

    def watched(model: Any, setting: Setting, *args: Any, **kwargs: Any) -> Any:
        if kwargs["part"]:
            train = setting.recipe.train
            order = setting.batches(1)(0)[1][:8].tolist()
            seen.append((train.weight_decay, train.augment.crop, kwargs["lr"], kwargs["steps"], order))
        return fit(model, setting, *args, **kwargs)

    monkeypatch.setattr(stages, "fit", watched)
    vary = {
        "seed": "same",
        "weight_decay": [1e-4, 1e-3],
        "augment": [{"crop": 0}, {"crop": 1}, {"crop": 2}],
        "lr": [0.1, 0.05, 0.02],
        "epochs": [1, 2, 1],
    }
    result = train_run(asked(tmp_path, {"vary": vary}, prune={"sparsity": 0.8}))
    steps = Setting.of(asked(tmp_path)).epoch_steps
    assert [each[:4] for each in seen] == [(1e-4, 0, 0.1, steps), (1e-3, 1, 0.05, 2 * steps), (1e-4, 2, 0.02, steps)]
    assert len({tuple(each[4]) for each in seen}) == 1
    assert row(result, "soup")["epochs"] == 2 + 4


def test_order_alone_leaves_every_image_its_augmentation(tmp_path: Path) -> None:
    recipe = asked(tmp_path, {"vary": {"seed": "order"}}, train={**raw(tmp_path)["train"], "augment": {"crop": 2}})
    setting = Setting.of(recipe)
    views: list[dict[bytes, int]] = []
    for place in range(2):
        own = replace(setting, recipe=member_of(recipe, place), order=order_of(recipe, place))
        batches = own.batches(1)
        views.append(Counter(x.numpy().tobytes() for step in range(own.epoch_steps) for x in batches(step)[0]))
    first = [replace(setting, order=order_of(recipe, place)).batches(1)(0)[1].tolist() for place in range(2)]
    assert first[0] != first[1]
    left_out = len(setting.sets.train) % recipe.train.batch_size
    assert sum((views[0] & views[1]).values()) >= len(setting.sets.train) - 2 * left_out  # type: ignore[operator]


@pytest.mark.usefixtures("tiny")
def test_soups_of_three_and_five_share_their_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[int] = []
    fit = stages.fit
    monkeypatch.setattr(
        stages, "fit", lambda *args, **more: (more["part"] and trained.append(1), fit(*args, **more))[1]
    )
    base = {key: value for key, value in asked(tmp_path).model_dump(mode="json").items() if key != "out"}
    base |= {"prune": {"sparsity": 0.9}}
    base["soup"] |= {"line": 0, "baselines": ["imp", "reprune"]}
    grid = {
        "base": base,
        "axes": {
            "members": {str(m): {"soup.members": m} for m in (1, 3, 5)},
            "sparsity": {"80 %": {"prune.sparsity": 0.8}, "90 %": {}},
        },
        "seeds": [0, 1],
        "show": {
            "columns": ["imp", "mean_member", "best_member", "ensemble", "reprune", "epochs"],
            "across": "sparsity",
        },
        "out": str(tmp_path / "grid"),
    }
    rows = compare(parse(grid, Grid, "grid"), together=3)
    assert len(rows) == 6
    assert len(trained) == 2 * 2 * 5
    found = {(each["members"], each["sparsity"]): each["metrics"] for each in rows}
    assert found["3", "90 %"]["epochs"]["mean"] == 5
    assert found["1", "90 %"]["mean_member"] == found["5", "90 %"]["imp"] == found["3", "90 %"]["imp"]
    assert len([each for each in (tmp_path / "grid" / "dense").iterdir() if each.is_dir()]) == 2
    assert "| members | sparsity | accuracy | imp | mean_member |" in (tmp_path / "grid" / "table.md").read_text()
    alone = train_run(asked(tmp_path / "alone", {"members": 5}, prune={"sparsity": 0.9}, seed=1))
    lines = [json.loads(line) for line in (tmp_path / "grid" / "members.jsonl").read_text().splitlines()]
    one = next(x for x in lines if x["labels"] == {"members": "5", "sparsity": "90 %"} and x["seed"] == 1)
    assert one["accuracy"] == alone["accuracy"]


@pytest.mark.usefixtures("tiny")
def test_a_member_that_dies_is_tried_again_and_no_other_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[int] = Counter()
    fit, recipe = stages.fit, asked(tmp_path, prune={"sparsity": 0.9})
    seeds = [member_of(recipe, place).seed for place in range(3)]

    def dying(model: Any, setting: Setting, *args: Any, **more: Any) -> Any:
        seed = setting.recipe.seed
        calls[seed] += more["part"] == 1
        if more["part"] == 1 and seed == seeds[1] and calls[seed] <= deaths:
            raise RuntimeError("CUDA out of memory")
        return fit(model, setting, *args, **more)

    monkeypatch.setattr(stages, "fit", dying)
    deaths = 2
    with pytest.raises(RuntimeError, match="1 job failed, 1 for want of them; the first: RuntimeError: CUDA out of"):
        train_run(recipe)
    assert sorted(calls.values()) == [1, 1, 2]
    deaths = 3  # one more death, then all is well; the others are not repeated
    result = train_run(recipe, workers=Workers(threads=2))
    assert sorted(calls.values()) == [1, 1, 4]
    deaths = 0
    assert result["accuracy"] == train_run(asked(tmp_path / "whole", prune={"sparsity": 0.9}))["accuracy"]


@pytest.mark.usefixtures("tiny")
def test_threads_and_one_after_another_give_the_same(tmp_path: Path, whole: Made) -> None:
    one = whole[1]
    beside = train_run(asked(tmp_path / "beside", WHOLE), workers=Workers(threads=3))
    same = [[each[key] for key in ("name", "accuracy", "loss", "epochs")] for each in one["rows"]]
    assert same == [[each[key] for key in ("name", "accuracy", "loss", "epochs")] for each in beside["rows"]]
    assert one["between"] == beside["between"]


WRONG = [
    ({"retrain": None}, "give a section retrain"),
    ({"prune": None, "retrain": None}, "soup needs prune.sparsity"),
    ({"soup": {"members": 0}}, "soup.members"),
    ({"soup": {"average": "best"}}, "soup.average: there is no average 'best'; there are dare, dare_ties, greedy"),
    ({"soup": {"average": [0.5, 0.5]}}, "2 weights for 3 members"),
    ({"soup": {"average": [0.5, 0.5, 0.5]}}, "weights add up to 1"),
    ({"soup": {"average": "greedy"}}, "set images.measure_on: both"),
    ({"soup": {"also": ["learned"]}}, "learned averages are chosen by held-out images"),
    ({"soup": {"vary": {"sed": "all"}}}, "unknown key 'soup.vary.sed'; did you mean 'seed'?"),
    ({"soup": {"vary": {"seed": "same"}}}, "members 1 and 2 would be the same"),
    ({"soup": {"vary": {"seed": "same", "weight_decay": [0, 1e-4]}}}, "members 1 and 3 would be the same"),
    ({"soup": {"vary": {"schedule": ["lllr"]}}}, "soup.vary.schedule"),
    ({"soup": {"baselines": ["ipm"]}}, "soup.baselines"),
    ({"soup": {"line": 1}}, "at least 2 points"),
    (
        {"retrain": {"epochs": 1, "rewind": 1}, "train": {"epochs": 2, "warmup": 0, "snapshots": [1]}},
        "throw the average",
    ),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_soups_end_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    made = raw(tmp_path / "out", **PRUNED, soup={}) | changes
    with pytest.raises(ValueError) as caught:
        parse(made, ClassifierRecipe, "test")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("tiny")
def test_the_command_shows_a_table_or_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # paths are not broken
    made = asked(tmp_path / "out").model_dump(mode="json")
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump(made))
    done = CliRunner().invoke(app, ["run", str(tmp_path / "soup.yaml"), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert all(word in done.output for word in ("mean member", "ensemble", "inference", "result.json"))
    shown = CliRunner().invoke(app, ["show", str(tmp_path / "soup.yaml")])
    assert yaml.safe_load(shown.output)["soup"]["members"] == 3
    other = CliRunner().invoke(app, ["run", str(tmp_path / "soup.yaml"), "--set", "soup.members=2"])
    assert "holds the result of another recipe" in str(other.exception)
    none = CliRunner().invoke(app, ["run", str(tmp_path / "soup.yaml"), "--workers", "0"])
    assert "workers and together are at least 1" in str(none.exception)
    del made["soup"]
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(made))
    plain = CliRunner().invoke(app, ["run", str(tmp_path / "plain.yaml"), "--workers", "2"])
    assert "this recipe has none" in str(plain.exception)


def killable(out: Path, images: str) -> dict[str, Any]:
    return asked(out, {"baselines": ["imp"]}, images={"source": images}).model_dump(mode="json")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, few: str) -> dict[str, Any]:
    """The soup that is killed below, run to its end at once."""
    return train_run(parse(killable(tmp_path_factory.mktemp("unbroken") / "out", few), ClassifierRecipe, "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--together", "2"), ("--workers", "2")], ids=" ".join)
def test_a_soup_killed_for_good_keeps_its_members(
    tmp_path: Path, flags: tuple[str, ...], few: str, unbroken: dict[str, Any]
) -> None:
    made = killable(tmp_path / "killed", few)
    (tmp_path / "soup.yaml").write_text(yaml.safe_dump(made))
    process = start_command("run", tmp_path / "soup.yaml", *flags)
    deadline = time.monotonic() + 240
    while not (done := list((tmp_path / "killed" / "members" / "trainings").glob("*.json"))):
        assert process.exitcode is None, "the soup ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    times = {path: path.stat().st_mtime_ns for path in done}
    resumed = train_run(parse(made, ClassifierRecipe, "killed"))
    assert [each["loss"] for each in resumed["rows"]] == [each["loss"] for each in unbroken["rows"]]
    assert {path: path.stat().st_mtime_ns for path in done} == times


def test_one_member_is_imp(tmp_path: Path) -> None:
    from prunus.prune import prune
    from prunus.train.train import Trace

    torch.manual_seed(0)
    first, second = nn.Linear(8, 4), nn.Linear(8, 4)
    second.load_state_dict(first.state_dict())

    def nudge(network: nn.Module, phase: Phase) -> None:
        with torch.no_grad():
            network.weight.mul_(1.5 + phase.index)  # pyright: ignore
            phase.masks.apply_(network)

    def select(network: nn.Module, sparsity: float, within: Masks | None) -> Masks:
        return prune(network, sparsity=sparsity, within=within)

    def retrained(phase: Phase) -> Trace:
        nudge(first, phase)
        return Trace()

    one = imp(first, sparsity=0.75, phases=3, select=select, retrain=retrained)
    other = sms_(
        second,
        sparsity=0.75,
        phases=3,
        members=1,
        select=select,
        retrain=lambda copy, phase, place: nudge(copy, phase),
        folder=tmp_path,
    )
    assert one == other
    assert torch.equal(first.weight, second.weight)


def test_the_library_s_loop_goes_on_with_finished_members(tmp_path: Path) -> None:
    from prunus.prune import prune

    def run(folder: Path | None, stop: int | None) -> tuple[nn.Module, list[tuple[int, int]]]:
        torch.manual_seed(1)
        model, done = nn.Linear(16, 8), list[tuple[int, int]]()

        def retrain(copy: nn.Module, phase: Phase, place: int) -> None:
            if stop is not None and len(done) == stop:
                raise KeyboardInterrupt
            with torch.no_grad():
                copy.weight.add_(torch.randn(8, 16))  # pyright: ignore
                phase.masks.apply_(copy)
            done.append((phase.index, place))

        select = lambda network, s, within: prune(network, sparsity=s, within=within)  # noqa: E731
        sms_(model, sparsity=0.5, phases=2, members=3, select=select, retrain=retrain, folder=folder)
        return model, done

    whole, every = run(None, None)
    assert every == [(phase, place) for phase in range(2) for place in range(3)]
    before = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 4)
    resumed, rest = run(tmp_path, None)
    assert rest == every[4:]
    assert torch.equal(whole.weight, resumed.weight)  # pyright: ignore
    assert len(before) == len(torch.get_rng_state())


def test_members_of_another_soup_are_not_taken(tmp_path: Path) -> None:
    from prunus.prune import prune

    def go(**changed: Any) -> None:
        how = {"sparsity": 0.5, "phases": 1, "members": 2, "folder": tmp_path} | changed
        select = lambda network, s, within: prune(network, sparsity=s, within=within)  # noqa: E731
        sms_(nn.Linear(16, 8), select=select, retrain=lambda copy, phase, place: phase.masks.apply_(copy), **how)

    go()
    for changed in ({"seed": 1}, {"sparsity": 0.25}, {"phases": 2}, {"members": 3}):
        with pytest.raises(ValueError, match=r"phase-1-member-1\.safetensors is a member of another soup"):
            go(**changed)


@pytest.mark.parametrize("other", ["weights", "criterion"])
def test_members_of_other_weights_and_masks_are_not_taken(tmp_path: Path, other: str) -> None:
    from prunus.prune import prune

    def go(value: float, criterion: Any) -> None:
        layer = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            layer.weight.copy_(torch.arange(8.0).view(2, 4) + value)
        select = lambda network, s, within: prune(network, criterion, sparsity=s, within=within)  # noqa: E731
        how: Any = {"sparsity": 0.5, "phases": 1, "members": 1, "folder": tmp_path, "select": select}
        sms_(layer, retrain=lambda copy, phase, place: None, **how)

    go(1.0, magnitude)
    go(1.0, magnitude)
    with pytest.raises(
        ValueError, match=r"member-1\.safetensors is a member of another soup, .* build that one anew, and"
    ):
        go(2.0, magnitude) if other == "weights" else go(1.0, random(0))


def test_no_two_members_of_any_seeds_draw_alike() -> None:
    from prunus.prune import prune

    drawn: list[float] = []
    for seed in range(3):
        sms_(
            nn.Linear(4, 2),
            sparsity=0.5,
            phases=2,
            members=2,
            select=lambda network, s, within: prune(network, sparsity=s, within=within),
            retrain=lambda copy, phase, place: drawn.append(float(torch.rand(1))),
            seed=seed,
        )
    assert len(set(drawn)) == len(drawn) == 12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_finished_members_are_averaged_where_the_model_is(tmp_path: Path) -> None:
    from prunus.prune import prune

    def go() -> list[str]:
        torch.manual_seed(0)
        where: list[str] = []
        sms_(
            nn.Linear(4, 2).cuda(),
            sparsity=0.5,
            phases=1,
            members=2,
            select=lambda network, s, within: prune(network, sparsity=s, within=within),
            retrain=lambda copy, phase, place: None,
            mix=lambda states, masks: where.extend(each["weight"].device.type for each in states) or dict(states[0]),
            folder=tmp_path,
        )
        return where

    assert go() == go() == ["cuda", "cuda"]


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_is_souped_as_the_plain_one(tmp_path: Path, wrap: Any) -> None:
    models = []
    for place, around in enumerate((lambda model: model, wrap)):
        models.append(nn.Linear(8, 4, bias=False))
        how: dict[str, Any] = {"sparsity": 0.5, "phases": 2, "members": 2, "folder": tmp_path / str(place)}
        for _ in range(2):  # the second time by finished members
            with torch.no_grad():
                models[-1].weight.copy_(torch.arange(32.0).view(4, 8))
            sms_(
                around(models[-1]),
                select=lambda model, sparsity, within: prune(model, sparsity=sparsity, within=within),
                retrain=lambda copy, phase, member: [p.data.mul_(1 + member) for p in copy.parameters()],
                **how,
            )
    assert torch.equal(models[0].weight, models[1].weight)


def test_a_member_that_moved_pruned_weights_is_refused() -> None:
    from prunus.prune import prune

    def retrain(copy: nn.Module, phase: Phase, place: int) -> None:
        if place == 1:
            with torch.no_grad():
                copy.weight.add_(1.0)  # pyright: ignore

    select = lambda network, s, within: prune(network, sparsity=s, within=within)  # noqa: E731
    with pytest.raises(ValueError, match="weight"):
        sms_(nn.Linear(8, 4), sparsity=0.5, phases=1, members=2, select=select, retrain=retrain)
    with pytest.raises(ValueError, match="at least one member"):
        sms_(nn.Linear(8, 4), sparsity=0.5, phases=1, members=0, select=select, retrain=retrain)


def test_what_decides_a_training_decides_its_key(tmp_path: Path) -> None:
    """And nothing else does."""
    recipe = asked(tmp_path)
    base = base_job(recipe)
    start = pruned_job(recipe, base, 0, None)

    def key(
        recipe: ClassifierRecipe = recipe, place: int | None = 0, phase: int = 0, start: Any = start, **more: Any
    ) -> str:
        return trained_job(Training(recipe, place, phase, **more), start, base).key

    same = [asked(tmp_path / "x"), asked(tmp_path, {"members": 2}), asked(tmp_path, prune={"sparsity": 0.5})]
    assert {key(each) for each in same} == {key(), key(place=None)}
    decayed = asked(tmp_path, train={**raw(tmp_path)["train"], "weight_decay": 0.0})
    ordered = asked(tmp_path, {"vary": {"seed": "order"}})
    scheduled = asked(tmp_path, retrain={"schedule": "clr", "epochs": 1})
    other = [key(place=1), key(phase=1), key(slower=2), key(swa=0.5), key(whole=True), key(start=base), key(decayed)]
    other += [key(ordered), key(asked(tmp_path, seed=1)), key(scheduled)]
    assert len({*other, key()}) == 1 + len(other)
    assert pruned_job(recipe, base, 1, start).key != pruned_job(recipe, base, 0, None).key
    assert pruned_job(same[1], base, 0, None).key == start.key


@pytest.mark.usefixtures("learning")
@pytest.mark.parametrize("during", [{"gmp": {"stop": 0.5, "every": 0.1}}, {"dpf": {"stop": 0.5, "refresh": 4}}])
def test_members_fork_when_a_method_s_mask_is_final(tmp_path: Path, during: dict[str, Any]) -> None:
    recipe = asked(tmp_path, {"baselines": ["imp", "longer", "reprune", "dense", "swa"]}, **DURING, during=during)
    result = train_run(recipe, workers=Workers(threads=2))
    names = ["soup", "mean_member", "best_member", "ensemble", "imp", "longer", "swa"]
    assert [each["name"] for each in result["rows"]] == names
    assert row(result, "imp")["row"] == next(iter(during))
    epochs = {each["name"]: each["epochs"] for each in result["rows"]}
    assert epochs["imp"] == epochs["mean_member"] == 4  # forked after 2 of 4 epochs
    assert epochs["soup"] == epochs["longer"] == 2 + 3 * 2
    assert all(each["sparsity"] == pytest.approx(0.9, abs=1e-3) for each in result["rows"])
    assert list(result["stages"]) == ["pruned", "retrained"]
    assert result["accuracy"] > 0.4


# Clipped, because DPF's dense weights outgrow all others behind a filter that is wholly masked.
DURING: dict[str, Any] = {
    "train": {"epochs": 4, "batch_size": 32, "lr": 0.1, "warmup": 0, "augment": {"crop": 1}, "clip": 1.0},
    "prune": {"sparsity": 0.9},
    "retrain": None,
}


@pytest.mark.usefixtures("tiny")
def test_one_forked_member_of_the_recipe_s_seed_keeps_the_rates_of_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[list[float]] = []
    fit = stages.fit

    def watched(*args: Any, **kwargs: Any) -> Any:
        trace = fit(*args, **kwargs)
        rates.append(trace.lrs)
        return trace

    monkeypatch.setattr(stages, "fit", watched)
    train_run(asked(tmp_path, {"members": 2, "baselines": ["longer"]}, **DURING, during={"gmp": {"stop": 0.5}}))
    trunk, first, second, longer = rates
    setting = Setting.of(asked(tmp_path, **DURING, during="gmp"))
    whole = [0.1 * stages.schedule(setting)[0](step) for step in range(setting.steps(4))]
    assert trunk + first == trunk + second == whole
    assert longer[::2] == longer[1::2] == first


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("pull", [{"penalty": {"groups": 1e-4}}, {"optimizer": {"prox": {"groups": 1e-4}}}])
@pytest.mark.parametrize("retrain", [None, {"schedule": "llr", "epochs": 1}])
def test_forked_members_keep_the_pulls_of_the_training_and_retrainings_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pull: dict[str, Any], retrain: dict[str, Any] | None
) -> None:
    pulled: list[bool] = []
    train = stages.train

    def watched(model: Any, batches: Any, optimizer: Any, *rest: Any, during: Any, **options: Any) -> Any:
        pulled.append(any(isinstance(each, GroupLasso | ProximalSGD) for each in (optimizer, *during)))
        return train(model, batches, optimizer, *rest, during=during, **options)

    monkeypatch.setattr(stages, "train", watched)
    changes = DURING | {"train": DURING["train"] | {"epochs": 2} | pull, "retrain": retrain}
    train_run(asked(tmp_path, {"members": 2}, **changes, during={"gmp": {"stop": 0.5, "every": 0.5}}))
    assert pulled == [True, *2 * [retrain is None]]


@pytest.mark.usefixtures("tiny")
def test_members_may_be_retrainings_of_what_a_method_left(tmp_path: Path) -> None:
    changes = {**DURING, "during": "gmp", "retrain": {"schedule": "llr", "epochs": 1}}
    result = train_run(asked(tmp_path / "soup", {"baselines": ["imp"]}, **changes))
    alone = train_run(parse(raw(tmp_path / "alone", **changes), _plain(), "alone"))
    assert row(result, "imp")["loss"] == alone["loss"]
    assert result["stages"]["pruned"] == alone["stages"]["pruned"]
    assert row(result, "soup")["epochs"] == 4 + 3


@pytest.mark.usefixtures("tiny")
def test_a_mask_that_is_final_only_at_the_end_leaves_nothing_to_members(tmp_path: Path) -> None:
    for refuse in (planned, train_run):
        with pytest.raises(ValueError, match=r"set during\.gmp\.stop below 1"):
            refuse(asked(tmp_path, **DURING, during={"gmp": {"stop": 1.0}}))
    assert not (tmp_path / "work").exists()  # the mended recipe finds no other one there
    with pytest.raises(ValueError, match="give a section retrain"):
        asked(tmp_path, **DURING, during="rigl")
    with pytest.raises(ValueError, match="leave out lr, schedule, warmup, steps and epochs"):
        asked(tmp_path, {"vary": {"lr": [0.1, 0.2, 0.3]}}, **DURING, during="gmp")


@pytest.mark.usefixtures("tiny")
def test_bimp_is_a_soup_of_phases_in_one_budget(tmp_path: Path) -> None:
    result = train_run(asked(tmp_path, retrain={"schedule": "llr", "epochs": 2, "of": "total"}))
    assert [phase["epochs"] for phase in result["phases"]] == [1, 1]
    assert row(result, "soup")["epochs"] == 2 + 2 * 3


def test_a_part_of_a_training_prunes_when_the_whole_does() -> None:
    from prunus.during import GMP
    from prunus.during.part import Part
    from prunus.train import During
    from prunus.train.lr import linear
    from prunus.train.train import classification_loss, train

    def run(method: During, steps: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model, seen = nn.Linear(16, 10), list[torch.Tensor]()

        class Watch(During):
            def after_step(self, step: int) -> None:
                seen.append(model.weight.detach().clone())

        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        batch = (torch.randn(8, 16, generator=generator), torch.arange(8))
        loss = classification_loss()
        train(model, lambda step: batch, optimizer, linear(20), steps=steps, loss=loss, during=[method, Watch()])
        method.finish()
        return seen

    whole, part = run(GMP(0.75, stop=0.5), 20), run(Part(GMP(0.75, stop=0.5), 20), 10)
    assert all(torch.equal(a, b) for a, b in zip(whole, part, strict=False))
    assert int((part[-1] == 0).sum()) == 120
    with pytest.raises(ValueError, match="longer than the whole"):
        run(Part(GMP(0.75), 10), 20)


@pytest.mark.slow
def test_a_ray_run_on_local_workers_is_the_sequential_one(tmp_path: Path) -> None:
    """The network is resnet8: Ray's workers are other processes, which know nothing of the tiny one."""
    pytest.importorskip("ray")
    done = {}
    for name, flags in (("one", ()), ("ray", ("--ray", "local"))):
        made = asked(tmp_path / name, {"baselines": ["longer", "swa"], "line": 3}).model_dump(mode="json")
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(made))
        process = start_command("run", tmp_path / f"{name}.yaml", *flags)
        process.join(timeout=280)
        assert process.exitcode == 0
        done[name] = json.loads((tmp_path / name / "result.json").read_text())
    assert [each["loss"] for each in done["ray"]["rows"]] == [each["loss"] for each in done["one"]["rows"]]
    assert done["ray"]["between"] == done["one"]["between"]


def test_dropout_draws_the_same_whatever_was_drawn_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dropping(Tiny):
        def __init__(self) -> None:
            super().__init__()
            self.insert(8, nn.Dropout(0.2))

    monkeypatch.setattr(settings, "_fits", set())
    monkeypatch.setattr(settings, "build_model", lambda name, *, classes, channels: Dropping())
    monkeypatch.setattr(stages, "_operations", {})
    losses = []
    for name in ("one", "other"):
        torch.manual_seed(len(name))
        before = torch.get_rng_state()
        folder = tmp_path / name
        if name == "other":  # the dense training is another's to repeat
            shutil.copytree(tmp_path / "one" / "dense", folder / "dense")
            shutil.copy(tmp_path / "one" / ".prunus-run", folder)
        losses.append(train_run(asked(folder, prune={"sparsity": 0.8}))["loss"])
        assert name == "one" or torch.equal(before, torch.get_rng_state())
    assert losses[0] == losses[1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_soups_on_a_gpu_are_alike_one_by_one_and_in_threads(tmp_path: Path) -> None:
    """Captured steps, bf16; kernels that add in another order make a difference of an image or two."""
    found = {}
    for name, together in (("one", 1), ("threads", 3)):
        section = {"baselines": ["imp", "longer", "swa", "reprune", "dense"]}
        train = {**raw(tmp_path)["train"], "epochs": 8}
        recipe = asked(tmp_path / name, section, device="cuda", train=train, prune={"sparsity": 0.8, "phases": 2})
        found[name] = train_run(recipe, workers=Workers(threads=together))
    for one, other in zip(found["one"]["rows"], found["threads"]["rows"], strict=True):
        if one["name"] != "dense_soup_pruned":  # pruned and not retrained: a few weights decide much
            assert other["accuracy"] == pytest.approx(one["accuracy"], abs=0.05), one["row"]
    assert found["one"]["accuracy"] > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_worker_processes_train_on_the_gpu(tmp_path: Path) -> None:
    recipe = asked(tmp_path, device="cuda", prune={"sparsity": 0.8})
    assert train_run(recipe, workers=Workers(2, 2))["accuracy"] > 0.5
