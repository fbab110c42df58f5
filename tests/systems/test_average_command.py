"""`prunus average`: classifiers and language models of one mask, plain, weighted and greedy; and its mistakes."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prunus.machine import write_tensors
from prunus.masks import Masks
from prunus.measure.accuracy import accuracy
from prunus.measure.perplexity import perplexity
from prunus.recipe import ClassifierRecipe, parse
from prunus.run import cli
from prunus.run.evaluate import scorer
from prunus.save import check_whole, save_model
from prunus.vision.setting import Setting
from prunus.vision.train import train_run
from tests.conftest import byte_tokenizer, tiny_llama
from tests.systems.test_average import some_masks

RECIPE = {
    "images": {"source": "digits", "measure_on": "validation"},
    "model": "resnet8",
    "train": {"epochs": 6, "batch_size": 64, "lr": 0.1, "warmup": 0, "augment": {"crop": 1}},
    "prune": {"sparsity": 0.8},
    "device": "cpu",
}


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory):
    """Three networks of one mask: one retrained, and two that lie further and further from it."""
    folder = tmp_path_factory.mktemp("members")
    recipe = parse(
        {**RECIPE, "retrain": {"schedule": "llr", "epochs": 2}, "out": str(folder / "m0")}, ClassifierRecipe, ""
    )
    train_run(recipe)
    masks, state = Masks.load(folder / "m0" / "masks.safetensors"), load_file(folder / "m0" / "model.safetensors")
    for place, noise in ((1, 0.01), (2, 3.0)):
        model = Setting.of(recipe).new_model()
        model.load_state_dict(state)
        generator = torch.Generator().manual_seed(place)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * parameter.std() * torch.randn(parameter.shape, generator=generator))
        masks.apply_(model)
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.mul_(1e4)  # statistics that do not fit: a member is scored with its own counted anew
        (folder / f"m{place}").mkdir()
        write_tensors(folder / f"m{place}" / "model.safetensors", model.state_dict())
        masks.save(folder / f"m{place}" / "masks.safetensors")
    (folder / "score.yaml").write_text(json.dumps(RECIPE))
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def run(*arguments: Any):
        monkeypatch.setattr(sys, "argv", ["prunus", "average", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code, capsys.readouterr()

    return run


def test_the_mean_keeps_its_zeros_and_its_weights(members: Any, call: Any, tmp_path: Path):
    paths = [members / f"m{place}" for place in range(3)]
    status, heard = call(*paths, "--out", tmp_path / "mean", "--weights", "0.5,0.25,0.25")
    assert status == 0
    assert "m2" in heard.out
    states = [load_file(path / "model.safetensors") for path in paths]
    found = load_file(tmp_path / "mean" / "model.safetensors")
    shares = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    expected = torch.tensordot(shares, torch.stack([state["linear.weight"].double() for state in states]), 1)
    assert torch.allclose(found["linear.weight"].double(), expected, atol=1e-6)
    masks = Masks.load(tmp_path / "mean" / "masks.safetensors")
    assert all(bool((found[name][~mask] == 0).all()) for name, mask in masks.items())


def test_a_greedy_soup_of_classifiers_leaves_out_what_harms_and_works_as_it_is_saved(
    members: Any, call: Any, tmp_path: Path
):
    paths = [members / f"m{place}" for place in (2, 0, 1)]
    status, heard = call(*paths, "--out", tmp_path / "soup", "--greedy", members / "score.yaml")
    assert status == 0, heard.err
    taken = [
        member["path"] for member in json.loads((tmp_path / "soup" / "prunus.json").read_text())["average"]["members"]
    ]
    assert str(members / "m0") in taken
    assert str(members / "m2") not in taken
    setting = Setting.of(parse(RECIPE, ClassifierRecipe, ""))
    model = setting.new_model()
    model.load_state_dict(load_file(tmp_path / "soup" / "model.safetensors"))
    alone = scorer(members / "score.yaml").score(members / "m0")
    assert accuracy(model, setting.measured()).top1 >= alone > 0.5  # a soup that is worse would not be taken
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]
    check_whole(tmp_path / "soup")  # its checksums are those of the weights with statistics counted anew


def test_statistics_are_counted_anew_before_scoring_and_in_what_is_written(members: Any, tmp_path: Path):
    by = scorer(members / "score.yaml")
    assert by.score(members / "m1") == pytest.approx(by.score(members / "m0"), abs=0.05)
    shutil.copytree(members / "m1", tmp_path / "settled")
    by.settle_(tmp_path / "settled")
    setting = Setting.of(parse(RECIPE, ClassifierRecipe, ""))
    model = setting.new_model()
    model.load_state_dict(load_file(tmp_path / "settled" / "model.safetensors"))
    assert accuracy(model, setting.measured()).top1 == pytest.approx(by.score(members / "m1"))


def test_a_greedy_soup_of_language_models_goes_by_perplexity(call: Any, tmp_path: Path):
    masks, text = some_masks(tiny_llama()), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 40)
    model = tiny_llama(0)
    for place, scale in enumerate((1.0, 1.001, 30.0)):
        model = tiny_llama(0)
        masks.apply_(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        save_model(model, byte_tokenizer(), tmp_path / f"m{place}", masks=masks, info={})
    tokens = torch.tensor(byte_tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"])
    worst = perplexity(model, tokens, window=16)
    (tmp_path / "score.yaml").write_text(json.dumps({"evaluate": {"data": str(text), "window": 16}, "device": "cpu"}))
    paths = [tmp_path / f"m{place}" for place in range(3)]
    status, heard = call(*paths, "--out", tmp_path / "soup", "--greedy", tmp_path / "score.yaml")
    assert status == 0, heard.err
    taken = json.loads((tmp_path / "soup" / "prunus.json").read_text())["average"]["members"]
    assert worst > 1
    assert str(paths[2]) not in [member["path"] for member in taken]


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--weights", "a,b"], "is not numbers with commas"),
        (["--weights", "0.9,0.9"], "add up to 1"),
        (["--greedy", "nope.yaml"], "no recipe 'nope.yaml'"),
        (["--greedy", "score.yaml", "--weights", "0.5,0.5"], "contradict each other"),
        (["--greedy", "none.yaml"], "evaluate.data has no text to score by"),
    ],
)
def test_mistakes_end_in_one_line(
    members: Any, call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: Any, said: Any
):
    monkeypatch.chdir(members)
    (members / "none.yaml").write_text("evaluate: {data: {}}\n")
    status, heard = call("m0", "m1", "--out", tmp_path / "x", *extra)
    assert status == 2
    assert said in heard.err
    assert heard.err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_a_checkpoint_of_another_network_is_named(members: Any, call: Any, tmp_path: Path):
    (tmp_path / "other.yaml").write_text(json.dumps({**RECIPE, "model": "resnet14"}))
    status, heard = call(members / "m0", members / "m1", "--out", tmp_path / "x", "--greedy", tmp_path / "other.yaml")
    assert status == 2
    assert "is not of the recipe's network" in heard.err
