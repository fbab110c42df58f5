"""Soups of language models: members, their average, kills, what they are compared with, grids of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from prunus.jobs.tables import BEST, LONGER, MEAN, SOUP
from prunus.language import soups, stages
from prunus.language.single import compress
from prunus.masks import Masks
from prunus.recipe import LanguageRecipe, Recipe, member_of, parse
from prunus.recipe.names import averages
from prunus.report import read_metrics
from prunus.run.compare import compare
from prunus.run.grid import Grid
from prunus.run.show import show_result
from prunus.save import load_info
from tests.systems import test_compress


def raw(folder: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """Measured on a tenth of the text: soups are measured often."""
    some = {"data": {"text": {"source": str(text), "part": [0.0, 0.1]}}, "window": 32, "batch_size": 128}
    return test_compress.raw(folder, text, out, **{"evaluate": some, **changes})


def recipe(*args: Any, **changes: Any) -> LanguageRecipe:
    return parse(raw(*args, **changes), LanguageRecipe, "test")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_soup_is_the_mean_of_its_members_and_keeps_every_zero(
    tiny_folder: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = recipe(tiny_folder, text_file, tmp_path / "run", soup={"members": 3, "vary": {"lr": [1e-2, 2e-2, 5e-3]}})
    result = compress(asked)
    found = {stage: value["text"] for stage, value in result["perplexity"].items()}
    each = [found[f"member {number}"] for number in (1, 2, 3)]
    assert list(found) == ["dense", "pruned", "member 1", "member 2", "member 3", MEAN, BEST, SOUP, LONGER]
    assert found[MEAN] == pytest.approx(statistics.fmean(each))
    assert found[BEST] == min(each) == found[f"member {result['soup']['best']}"]
    assert len(set(each)) == 3
    assert found[SOUP] < 0.9 * found["pruned"]
    members = [weights(tmp_path / "run" / "members" / str(number)) for number in (1, 2, 3)]
    soup = weights(tmp_path / "run" / "model")
    masks = Masks.load(tmp_path / "run" / "model" / "masks.safetensors")
    for name, tensor in soup.items():
        each_of = torch.stack([member[name].double() for member in members])
        bound = 2**-22 * each_of.abs().amax(0)  # four roundings to float32 of the largest
        assert ((tensor.double() - each_of.mean(0)).abs() <= bound).all(), name
    for name, mask in masks.items():
        for state in (*members, soup):
            assert not state[name][~mask].any()
            assert not state[name][~mask].signbit().any()
        assert not torch.equal(members[0][name], members[1][name])
    assert masks.sparsity == result["pruning"]["sparsity"] == 0.5
    again = stages.load(recipe(tmp_path / "run" / "model", text_file, tmp_path / "x"))
    assert stages.evaluate(again, asked, torch.device("cpu"))["text"] == found[SOUP]
    assert load_info(tmp_path / "run" / "model")["soup"]["weights"] == pytest.approx([1 / 3] * 3)
    assert (tmp_path / "run" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["soup"] == result["soup"]
    assert not list((tmp_path / "run" / "members").glob("*.pt"))
    show_result(result, tmp_path / "run")
    assert LONGER in capsys.readouterr().out


def test_the_first_member_is_the_plain_run_and_the_longer_one_has_all_steps(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    soup = compress(recipe(tiny_folder, text_file, tmp_path / "soup", soup={"members": 2}, save=False))
    assert not (tmp_path / "soup" / "members").exists()
    plain = compress(recipe(tiny_folder, text_file, tmp_path / "plain", save=False))
    assert soup["perplexity"]["member 1"] == plain["perplexity"]["merged"]
    asked = raw(tiny_folder, text_file, tmp_path / "longer", save=False)
    asked["retrain"]["steps"] = soup["soup"]["steps"]
    assert asked["retrain"]["steps"] == 16
    longer = compress(parse(asked, LanguageRecipe, "test"))
    assert soup["perplexity"][LONGER] == longer["perplexity"]["merged"]


@pytest.mark.parametrize("train", [["norms"], ["scale_lora", "norms"]])
def test_any_part_may_be_retrained_and_members_weighted(
    tiny_folder: Path, text_file: Path, tmp_path: Path, train: list[str]
) -> None:
    changes: dict[str, Any] = {"soup": {"members": 2, "average": [0.25, 0.75], "baselines": []}}
    changes["retrain"] = {**raw(tiny_folder, text_file, tmp_path)["retrain"], "train": train, "steps": 4}
    result = compress(recipe(tiny_folder, text_file, tmp_path / "run", **changes))
    assert LONGER not in result["perplexity"]
    one, two = (weights(tmp_path / "run" / "members" / number) for number in ("1", "2"))
    for name, tensor in weights(tmp_path / "run" / "model").items():
        expected = 0.25 * one[name].double() + 0.75 * two[name].double()
        assert torch.allclose(tensor.double(), expected, rtol=1e-6, atol=1e-7)


def test_added_biases_are_averaged_and_saved(text_file: Path, tmp_path: Path) -> None:
    retrain = {"train": ["biases"], "add_biases": True, "data": str(text_file), "steps": 2, "length": 32, "lr": 1e-2}
    from tests.conftest import byte_tokenizer, tiny_llama

    tiny_llama().save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    for streaming in (False, True):
        out = tmp_path / f"run-{streaming}"
        changes: dict[str, Any] = {"retrain": retrain, "soup": {"members": 2, "baselines": []}, "streaming": streaming}
        compress(recipe(tmp_path / "dense", text_file, out, **changes))
        model = AutoModelForCausalLM.from_pretrained(out / "model")
        assert model.model.layers[0].self_attn.q_proj.bias.abs().sum() > 0
    one, other = (weights(tmp_path / f"run-{streaming}" / "model") for streaming in (False, True))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_streamed_soup_never_has_the_average_in_memory(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"soup": {"members": 2, "baselines": []}}
    memory = compress(recipe(tiny_folder, text_file, tmp_path / "memory", **asked))
    original = stages.loaded_model

    def load(checkpoint: Any, empty: Any, **options: Any) -> Any:
        assert checkpoint.path.name != "soup", "the average was loaded whole"
        return original(checkpoint, empty, **options)

    monkeypatch.setattr(stages, "loaded_model", load)
    disk = compress(recipe(tiny_folder, text_file, tmp_path / "disk", streaming=True, **asked))
    assert disk["perplexity"][SOUP]["text"] == pytest.approx(memory["perplexity"][SOUP]["text"], rel=1e-6)
    one, other = (weights(tmp_path / name / "model") for name in ("memory", "disk"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def killing(original: Callable[..., Any], at: int, calls: list[int]) -> Callable[..., Any]:
    """`original`, but the call of that number is killed in the middle of its training."""

    def run(*args: Any, on_step: Any = None, **options: Any) -> Any:
        calls.append(1)

        def step(done: int, loss: float) -> None:
            if len(calls) == at and done >= 6:
                raise KeyboardInterrupt
            on_step(done, loss)

        return original(*args, on_step=step, **options)

    return run


def test_a_killed_soup_goes_on_with_the_finished_members(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, Any] = {"soup": {"members": 3}}
    whole = compress(recipe(tiny_folder, text_file, tmp_path / "whole", **changes))
    asked = recipe(tiny_folder, text_file, tmp_path / "killed", **changes)
    first: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(stages, "retrain", killing(stages.retrain, 2, first))
        with pytest.raises(KeyboardInterrupt):
            compress(asked)
    assert (tmp_path / "killed" / "members" / "1" / "prunus.json").exists()
    assert not (tmp_path / "killed" / "members" / "2").exists()
    before = (tmp_path / "killed" / "members" / "1" / "model.safetensors").stat().st_mtime_ns
    second: list[int] = []
    monkeypatch.setattr(stages, "retrain", killing(stages.retrain, 0, second))
    result = compress(asked)
    assert (len(first), len(second)) == (2, 3)  # members 2 and 3, and the longer run
    assert (tmp_path / "killed" / "members" / "1" / "model.safetensors").stat().st_mtime_ns == before
    assert result["perplexity"] == whole["perplexity"]
    one, other = (weights(tmp_path / name / "model") for name in ("whole", "killed"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_members_of_another_recipe_are_trained_anew(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(soups, "average_folders", kill)
        with pytest.raises(KeyboardInterrupt):
            compress(recipe(tiny_folder, text_file, tmp_path / "run", soup={"members": 2}))
    calls: list[int] = []
    monkeypatch.setattr(stages, "retrain", killing(stages.retrain, 0, calls))
    compress(recipe(tiny_folder, text_file, tmp_path / "run", soup={"members": 2, "vary": {"lr": [1e-2, 2e-2]}}))
    assert len(calls) == 1  # member 1 and the longer run are what they were


def test_a_soup_of_several_phases_goes_on_from_the_average(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """The first phase is the soup of that sparsity; the second prunes within its mask, and counts its steps."""
    retrain = {**raw(tiny_folder, text_file, tmp_path)["retrain"], "steps": 4}
    changes: dict[str, Any] = {"soup": {"members": 2, "baselines": []}, "retrain": retrain}
    once = recipe(tiny_folder, text_file, tmp_path / "once", prune={"sparsity": 0.5}, **changes)
    first = compress(once)
    changes["retrain"] = {**retrain, "steps": 8, "of": "total"}
    changes["prune"] = {"sparsity": 0.75, "phases": 2}
    found = compress(recipe(tiny_folder, text_file, tmp_path / "twice", **changes))
    logged = {
        row["stage"]: row["perplexity"]
        for row in read_metrics(tmp_path / "twice" / "metrics.jsonl")
        if "perplexity" in row
    }
    assert logged["phase 1, soup"] == first["perplexity"][SOUP]
    earlier, later = (Masks.load(tmp_path / name / "model" / "masks.safetensors") for name in ("once", "twice"))
    assert later.sparsity == pytest.approx(0.75, abs=1e-3)
    assert all(not bool((mask & ~earlier[name]).any()) for name, mask in later.items())
    assert found["soup"]["steps"] == 8
    soup = weights(tmp_path / "twice" / "model")
    members = [weights(tmp_path / "twice" / "members" / number) for number in ("1", "2")]
    for name, tensor in soup.items():
        assert torch.allclose(tensor, (members[0][name] + members[1][name]) / 2, rtol=1e-6, atol=1e-7), name
    assert not (tmp_path / "twice" / "work").exists()


@pytest.mark.parametrize("soup", [None, {"members": 2, "baselines": []}])
def test_finished_phases_are_not_repeated(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, soup: Any
) -> None:
    retrain = {**raw(tiny_folder, text_file, tmp_path)["retrain"], "steps": 8}
    changes: dict[str, Any] = {"prune": {"sparsity": 0.75, "phases": 3}, "retrain": retrain, "soup": soup}
    whole = compress(recipe(tiny_folder, text_file, tmp_path / "whole", **changes))
    asked, each = recipe(tiny_folder, text_file, tmp_path / "killed", **changes), 1 if soup is None else 2
    with monkeypatch.context() as patch:
        patch.setattr(stages, "retrain", killing(stages.retrain, 2 * each + 1, []))
        with pytest.raises(KeyboardInterrupt):
            compress(asked)
    again: list[int] = []
    monkeypatch.setattr(stages, "retrain", killing(stages.retrain, 0, again))
    result = compress(asked)
    assert len(again) == each  # those of the last phase
    assert result["perplexity"] == whole["perplexity"]
    one, other = (weights(tmp_path / name / "model") for name in ("whole", "killed"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_members_differ_in_their_seed_unless_it_is_given() -> None:
    def members(**soup: Any) -> list[Any]:
        asked = parse({"retrain": {"seed": 7}, "soup": soup}, LanguageRecipe, "test")
        return [member_of(asked, place).retrain for place in range(3)]

    assert [each.seed for each in members()] == [7, 1007, 2007]
    varied = members(vary={"seed": [1, 1, 2], "steps": [5, 9, 5]})
    assert [(each.seed, each.steps) for each in varied] == [(1, 5), (1, 9), (2, 5)]
    assert [each.lr for each in members(vary={"lr": [1e-3, 1e-2]})] == [1e-3, 1e-2, 1e-3]


WRONG = [
    ({"soup": {}}, "soup: its members are retrained as `retrain` says"),
    ({"retrain": {}, "soup": {"members": 0}}, "soup.members"),
    ({"retrain": {}, "soup": {"vary": {"seed": "same", "lr": [1e-3, 1e-2]}}}, "members 1 and 3 would be the same"),
    ({"retrain": {}, "soup": {"vary": {"weight_decay": [1e-3]}}}, "vary.weight_decay: this goes with soups of class"),
    ({"retrain": {}, "soup": {"baselines": ["swa"]}}, "soup.baselines: this goes with soups of classifiers"),
    ({"retrain": {}, "soup": {"average": "learned"}}, "learned averages are made of classifiers"),
    ({"retrain": {}, "soup": {"also": ["greedy"]}}, "chosen by the first text of evaluate.data: give a second one"),
    ({"retrain": {}, "soup": {"vary": {"rank": [1, 2, 3]}}}, "soup.vary"),
    ({"retrain": {}, "soup": {"vary": {"lr": [1, 2, -3]}}}, "-3"),
    ({"retrain": {}, "soup": {"average": [0.5, 0.5]}}, "average: 2 weights for 3 members"),
    ({"retrain": {}, "soup": {"average": [0.5, 0.2, 0.2]}}, "weights add up to 1; these to 0.9"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_soups_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(change, Recipe, "recipe.yaml")
    assert message in str(caught.value)


def test_members_of_grids_go_through_the_phases_of_a_run(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Each in two phases, one retraining after both or two members averaged in each: the perplexity of `prunus run`."""
    base = raw(tiny_folder, text_file, tmp_path, prune={"sparsity": 0.75, "phases": 2})
    del base["out"]
    base["retrain"]["steps"] = 4
    soup = {"members": 2, "baselines": ["longer"]}
    axes = {"way": {"one": {}, "soup": {"soup": soup}, "once": {"prune.phases": 1}}}
    rows = compare(parse({"base": base, "axes": axes, "out": str(tmp_path / "grid")}, Grid, "grid.yaml"))
    assert not (tmp_path / "grid" / "soups").exists()
    assert len(list((tmp_path / "grid" / "starts").glob("*.json"))) == 2  # what the first of two and the only one prune
    for row, stage in zip(rows, ("merged", SOUP, "merged"), strict=True):
        changes = {"soup": soup if stage == SOUP else None, "retrain": base["retrain"], "save": False}
        changes["prune"] = {"sparsity": 0.75, "phases": 1 if row["way"] == "once" else 2}
        alone = compress(recipe(tiny_folder, text_file, tmp_path / row["way"], **changes))
        assert row["text"]["mean"] == alone["perplexity"][stage]["text"], row["way"]
        if stage == SOUP:
            assert row["beside"]["text"][LONGER]["mean"] == alone["perplexity"][LONGER]["text"]


def test_a_member_that_went_astray_is_not_the_best() -> None:
    assert soups._best([{"text": float("nan")}, {"text": 3.0}, {"text": 2.0}]) == 2


def test_a_greedy_soup_is_chosen_by_the_first_text(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """It leaves out the member that is bad; with its weights given it is the same, and so is a grid's."""
    texts = {
        name: {"source": str(text_file), "part": part} for name, part in (("chosen", [0, 0.1]), ("told", [0.1, 0.2]))
    }
    changes: dict[str, Any] = {"evaluate": {"data": texts, "window": 32, "batch_size": 128}}
    vary = {"lr": [1e-2, 2e-2, 0.3]}
    changes["soup"] = {"members": 3, "vary": vary, "average": "greedy", "also": ["uniform"], "baselines": []}
    found = compress(recipe(tiny_folder, text_file, tmp_path / "run", **changes))
    weights = found["soup"]["weights"]
    assert 0 < sum(weight > 0 for weight in weights) < 3  # one of the members is bad
    assert found["perplexity"][SOUP]["chosen"] <= found["perplexity"][BEST]["chosen"]
    changes["soup"] |= {"average": weights, "also": []}
    told = compress(recipe(tiny_folder, text_file, tmp_path / "told", **changes, save=False))
    assert told["perplexity"][SOUP] == found["perplexity"][SOUP]
    changes["soup"] |= {"average": "uniform"}
    uniform = compress(recipe(tiny_folder, text_file, tmp_path / "uniform", **changes, save=False))
    assert uniform["perplexity"][SOUP] == found["perplexity"][f"{SOUP}, uniform"]
    base = {key: value for key, value in raw(tiny_folder, text_file, tmp_path, **changes).items() if key != "out"}
    base["soup"] |= {"average": "greedy", "also": ["uniform"]}
    (row,) = compare(parse({"base": base, "axes": {"a": {"b": {}}}, "out": str(tmp_path / "grid")}, Grid, "grid.yaml"))
    assert row["told"]["mean"] == found["perplexity"][SOUP]["told"]
    assert row["beside"]["told"][f"{SOUP}, uniform"]["mean"] == uniform["perplexity"][SOUP]["told"]
    assert not list((tmp_path / "grid").rglob("*trial*"))


def test_a_grid_of_soups(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    base = raw(tiny_folder, text_file, tmp_path)
    del base["out"]
    base["retrain"]["steps"] = 4
    base["soup"] = {"members": 2}
    axes = {
        "pattern": {"50 %": {}, "60 %": {"prune.sparsity": 0.6}},
        "soup": {"one run": {"soup": None}, "m = 3": {"soup.members": 3}},
    }
    asked = parse({"base": base, "axes": axes, "out": str(tmp_path / "grid"), "seeds": [0, 1]}, Grid, "grid.yaml")
    rows = compare(asked)
    assert len(rows) == 4
    cells = {(row["pattern"], row["soup"]): row for row in rows}
    assert not list((tmp_path / "grid").glob("members/*.work"))
    assert not (tmp_path / "grid" / "soups").exists()
    alone = compress(recipe(tiny_folder, text_file, tmp_path / "one", save=False, retrain=base["retrain"], soup={}))
    member = next(
        json.loads(line)
        for line in (tmp_path / "grid" / "members.jsonl").read_text().splitlines()
        if json.loads(line)["labels"] == {"pattern": "50 %", "soup": "m = 3"} and json.loads(line)["seed"] == 0
    )
    assert member["perplexity"]["text"] == pytest.approx(alone["perplexity"][SOUP]["text"], rel=1e-6)
    assert member["soup"]["perplexity"][LONGER]["text"] == pytest.approx(alone["perplexity"][LONGER]["text"], rel=1e-6)
    assert cells["60 %", "m = 3"]["beside"]["text"][MEAN]["std"] is not None
    table = (tmp_path / "grid" / "table.md").read_text()
    assert f"| pattern | soup | the soup | {MEAN} | {BEST} | {LONGER} |" in table
    assert (tmp_path / "grid" / "grid.png").stat().st_size > 1000


def test_soups_take_averages_of_task_vectors(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """By the recipe's average and beside it; what is written is what the members and their base make in memory."""
    soup = {"members": 2, "average": {"ties": {"density": 0.5}}, "also": ["slerp"], "baselines": []}
    result = compress(recipe(tiny_folder, text_file, tmp_path / "run", soup=soup))
    assert f"{SOUP}, slerp" in result["perplexity"]
    assert result["perplexity"][SOUP] != result["perplexity"][f"{SOUP}, slerp"]
    first, second, found = (weights(tmp_path / "run" / where) for where in ("members/1", "members/2", "model"))
    base = compress(recipe(tiny_folder, text_file, tmp_path / "pruned", retrain=None))
    start = weights(tmp_path / "pruned" / "model")
    assert base["pruning"]["sparsity"] == 0.5
    wanted, _ = averages.make(soup["average"], [first, second], base=start)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in found.items())
    Masks.load(tmp_path / "run" / "model" / "masks.safetensors").check(
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    )
    assert not (tmp_path / "run" / "work").exists()
