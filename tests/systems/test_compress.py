"""The whole job on a tiny model: result, run folder, resume, what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prunus.checkpoint import read_checkpoint
from prunus.language import stages
from prunus.language.single import compress
from prunus.language.stages import home
from prunus.language.texts import training_windows
from prunus.layers import Layer
from prunus.machine import write_json
from prunus.masks import Masks
from prunus.prune import prune
from prunus.recipe import DenseRates, LanguageRecipe, LanguageRetrain, load_recipe, optimizer_of, parse
from prunus.recipe.names import schedules
from prunus.report import read_metrics
from prunus.run.page import write_report
from prunus.save import load_model
from prunus.score import criteria, criterion
from prunus.soup import distance, finish
from prunus.train import Original, allr, distilled_next_token, ft, llr, next_token, slr
from tests.conftest import byte_tokenizer, tiny_llama

CPU = torch.device("cpu")


def raw(folder: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    return {
        "model": str(folder),
        "device": "cpu",
        "prune": {"criterion": "wanda", "sparsity": 0.5},
        "calibrate": {"data": str(text), "samples": 8, "length": 32, "batch_size": 4},
        "retrain": {
            "data": str(text), "train": ["mask_lora"], "steps": 8, "batch_size": 4, "length": 32, "lr": 1e-2, "rank": 4
        },
        "evaluate": {"data": {"text": str(text)}, "window": 32, "batch_size": 128},
        "out": str(out),
    } | changes  # fmt: skip


def recipe(*args: Any, **changes: Any) -> LanguageRecipe:
    return parse(raw(*args, **changes), LanguageRecipe, "test")


def test_zeros_that_training_would_fill_are_said(
    tiny_folder: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    write_json(model / "prunus.json", {"format": 1, "sparsity": {"pruned": 0.6, "layers": {}}})
    asked = recipe(model, text_file, tmp_path / "run")
    for quiet in (
        asked.model_copy(update={"prune": asked.prune.model_copy(update={"sparsity": 0.6})}),
        asked.model_copy(update={"retrain": None}),
    ):
        stages.fitted(quiet, CPU)
    assert not caplog.messages
    stages.fitted(asked, CPU)
    assert caplog.messages == [
        f"model: '{model}' has 60.00% zeros already, of which training fills those above prune.sparsity: set it to 0.6 "
        "at least, or take the dense model"
    ]


def test_paths_may_begin_at_home(tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    model = f"~/{tiny_folder.name}"
    asked = recipe(Path(model), text_file, Path("~/run"))
    assert asked.out == str(tiny_folder.parent / "run")
    assert stages.load(asked).folder == tiny_folder
    with pytest.raises(ValueError, match="lie in each other"):
        compress(recipe(Path(model), text_file, Path(model, "run")))


def test_the_job_prunes_retrains_merges_and_saves(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = compress(recipe(tiny_folder, text_file, out))
    found = {stage: value["text"] for stage, value in result["perplexity"].items()}
    assert list(found) == ["dense", "pruned", "retrained", "merged"]
    assert found["merged"] < 0.9 * found["pruned"]
    assert found["merged"] == pytest.approx(found["retrained"], rel=1e-5)
    assert result["pruning"]["sparsity"] == 0.5
    assert json.loads((out / "result.json").read_text())["perplexity"] == result["perplexity"]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    assert {json.loads(line)["stage"] for line in (out / "metrics.jsonl").read_text().splitlines()} >= {
        "prune",
        "retrain",
    }
    assert load_recipe(out / "recipe.yaml") == recipe(tiny_folder, text_file, out)
    assert not (out / "work").exists()
    masks = Masks.load(out / "model" / "masks.safetensors")
    saved = AutoModelForCausalLM.from_pretrained(out / "model")
    masks.check(saved)
    asked = recipe(tiny_folder, text_file, out, model=str(out / "model"))
    again = stages.evaluate(stages.load(asked), asked, torch.device("cpu"))
    assert again["text"] == found["merged"]


def test_a_pruned_head_is_retrained_under_its_mask(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = raw(tiny_folder, text_file, tmp_path)
    changes["prune"] = {"criterion": "magnitude", "include": ["*"]}
    changes["retrain"] |= {"train": ["norms", "head"], "steps": 3}
    result = compress(parse(changes, LanguageRecipe, "test"))
    assert result["perplexity"]["merged"]["text"] < result["perplexity"]["pruned"]["text"]
    masks = Masks.load(tmp_path / "model" / "masks.safetensors")
    assert masks["model.embed_tokens.weight"].float().mean() == 0.5
    masks.check(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))


def test_a_finished_run_is_not_repeated_and_another_recipe_is_refused(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(tiny_folder, text_file, tmp_path, retrain=None, save=False)
    result = compress(asked)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("work was repeated")

    monkeypatch.setattr(stages, "load", refuse)
    assert compress(asked) == json.loads(json.dumps(result))
    with pytest.raises(ValueError, match="another recipe"):
        compress(recipe(tiny_folder, text_file, tmp_path, retrain=None, save=True))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_killed_while_it_prunes_or_retrains_ends_with_the_same_bits(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool
) -> None:
    whole = recipe(tiny_folder, text_file, tmp_path / "whole", streaming=streaming)
    compress(whole)
    asked = recipe(tiny_folder, text_file, tmp_path / "killed", streaming=streaming)
    original = stages.evaluate
    for fatal in ("pruned", "retrained"):
        done: list[str] = []

        def evaluate(*args: Any, fatal: str = fatal, done: list[str] = done) -> dict[str, float]:
            if ["dense", "pruned", "retrained"][len(done)] == fatal:
                raise KeyboardInterrupt
            done.append("")
            return original(*args)

        monkeypatch.setattr(stages, "evaluate", evaluate)
        with pytest.raises(KeyboardInterrupt):
            compress(asked)
    monkeypatch.setattr(stages, "evaluate", original)
    compress(asked)
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "killed")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("killed", [False, True])
def test_what_dropout_draws_is_the_recipes(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Run twice, or killed before the first checkpoint of a training, it ends with the same bits."""
    model = shutil.copytree(tiny_folder, tmp_path / "dropping")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    fitted = {"reconstruct": {"steps": 3}, "device": "cpu"}
    weights: list[dict[str, torch.Tensor]] = []
    for name in ("one", "other"):
        torch.manual_seed(len(weights))
        asked = recipe(model, text_file, tmp_path / name, **fitted)
        if killed and weights:
            with monkeypatch.context() as patch:
                patch.setattr(stages, "train", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    compress(asked)
        compress(asked)
        weights.append(AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def during(folder: Path, text: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A recipe in which ELSA prunes to 2:4 while everything is trained, and MaskLoRA is trained afterwards."""
    asked = raw(folder, text, out, prune={"pattern": "2:4"}, during={"elsa": {"interval": 4, "lam": 0.1}})
    keys = ("data", "steps", "batch_size", "length")
    return asked | {"train": {key: asked["retrain"][key] for key in keys} | {"lr": 2e-3}} | changes


def test_a_method_prunes_while_everything_is_trained(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    result = compress(parse(during(tiny_folder, text_file, tmp_path), LanguageRecipe, "test"))
    found = {stage: value["text"] for stage, value in result["perplexity"].items()}
    assert list(found) == ["dense", "pruned", "retrained", "merged"]
    assert found["merged"] < found["pruned"]
    assert result["pruning"]["sparsity"] == 0.5
    assert len(result["pruning"]["by_layer"]) == 14
    masks = Masks.load(tmp_path / "model" / "masks.safetensors")
    assert all(bool((mask.view(-1, 4).sum(1) == 2).all()) for mask in masks.values())
    masks.check(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))


@pytest.mark.parametrize(("train", "compiled"), [("full", 2), ("mask_lora", 1)])
def test_a_teacher_is_compiled_where_it_holds_its_weights_whole(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: str, compiled: int
) -> None:
    models: list[Any] = []

    @contextmanager
    def forward(model: Any) -> Generator[None]:
        models.append(model)
        yield

    monkeypatch.setattr(stages, "compiled_forward", forward)
    asked = raw(tiny_folder, text_file, tmp_path / "run", compile=True)
    asked["retrain"] |= {"train": [train], "distill": {"weight": 0.5}}
    compress(parse(asked, LanguageRecipe, "test"))
    assert len({id(model) for model in models}) == len(models) == compiled


@pytest.mark.parametrize("train", [["lora"], ["norms", "lora"]])
def test_a_method_prunes_what_lora_makes_of_frozen_weights(
    tiny_folder: Path, text_file: Path, tmp_path: Path, train: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"during": {"elsa": {"interval": 2, "bits": 8}}, "dtype": "bfloat16"}
    asked = during(tiny_folder, text_file, tmp_path / "whole", **changes)
    asked["train"] |= {"train": train, "rank": 2, "distill": {"weight": 0.5}, "steps": 6}
    result = compress(parse(asked, LanguageRecipe, "test"))
    found = {stage: value["text"] for stage, value in result["perplexity"].items()}
    assert list(found) == ["dense", "pruned", "retrained", "merged"]
    assert found["merged"] < found["pruned"]
    assert result["pruning"]["sparsity"] == 0.5
    masks = Masks.load(tmp_path / "whole" / "model" / "masks.safetensors")
    assert all(bool((mask.view(-1, 4).sum(1) == 2).all()) for mask in masks.values())
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "model")
    masks.check(whole)

    from prunus.during import ELSA
    from prunus.train.checkpoint import Clock

    step = ELSA.after_step

    def killed(self: ELSA, index: int) -> None:
        step(self, index)
        if index == 4:
            raise KeyboardInterrupt

    again = asked | {"out": str(tmp_path / "again")}
    monkeypatch.setattr(Clock, "is_due", lambda *_: True)
    monkeypatch.setattr(ELSA, "after_step", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(parse(again, LanguageRecipe, "test"))
    assert list((tmp_path / "again").rglob("during*"))  # from which the second goes on
    monkeypatch.setattr(ELSA, "after_step", step)
    compress(parse(again, LanguageRecipe, "test"))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model").state_dict()
    assert all(torch.equal(value, other[name]) for name, value in whole.state_dict().items())


def test_masks_are_learnt_from_those_of_a_criterion_and_weights_stay(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    prune = {"pattern": "2:4", "criterion": "sparsegpt"}
    for trust in (3.0, 1e6):  # so sure of the criterion that nothing else is learnt
        changes = {"during": {"maskllm": {"trust": trust, "keep": 0.0}}, "prune": prune, "retrain": None}
        asked = during(tiny_folder, text_file, tmp_path / str(trust), **changes)
        asked["train"] |= {"lr": 0.3, "steps": 12}
        compress(parse(asked, LanguageRecipe, "test"))
    alone = {"during": None, "train": None, "prune": prune, "retrain": None}
    compress(parse(during(tiny_folder, text_file, tmp_path / "alone", **alone), LanguageRecipe, "test"))
    learned, sure, chosen = (
        Masks.load(tmp_path / x / "model/masks.safetensors") for x in ("3.0", "1000000.0", "alone")
    )
    assert all(torch.equal(mask, chosen[name]) for name, mask in sure.items())
    assert any(not torch.equal(mask, chosen[name]) for name, mask in learned.items())
    dense = AutoModelForCausalLM.from_pretrained(tiny_folder).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "3.0" / "model").state_dict().items():
        assert torch.equal(weight, dense[name] * learned[name] if name in learned else dense[name])


def test_allr_after_a_method_goes_by_what_its_end_took_away(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by what the whole training moved and pruned."""
    ended: list[float] = []

    def noted(*asked: Any) -> Any:
        ended.append(0.0)
        masks, ended[-1] = finish(*asked)
        return masks, ended[-1]

    monkeypatch.setattr("prunus.language.stages.finish", noted)
    asked = during(tiny_folder, text_file, tmp_path)
    asked["retrain"] |= {"schedule": "allr", "dense": {"steps": 8}}
    result = compress(parse(asked, LanguageRecipe, "test"))
    assert [result["distance"]] == ended
    assert 0 < ended[0] < 1


def test_sparsities_rise_gradually_over_phases_or_during_training(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    prune = {"sparsity": 0.8, "phases": 2, "ramp": "cubic"}
    asked = recipe(tiny_folder, text_file, tmp_path, prune=prune)
    assert [asked.phase(index).prune.sparsity for index in range(2)] == [pytest.approx(0.7), 0.8]
    changes = {"during": {"gmp": {"every": 0.2}}, "prune": {"sparsity": 0.8}, "retrain": None}
    result = compress(parse(during(tiny_folder, text_file, tmp_path, **changes), LanguageRecipe, "test"))
    assert result["pruning"]["sparsity"] == pytest.approx(0.8, abs=1e-4)
    shares = result["pruning"]["by_layer"].values()
    assert max(shares) - min(shares) > 0.01  # it compares all layers


def test_phases_go_on_by_a_solver(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    prune = {"criterion": {"refit": {"of": "admm"}}, "sparsity": 0.75, "phases": 2, "ramp": "cubic"}
    result = compress(recipe(tiny_folder, text_file, tmp_path, prune=prune))
    assert result["pruning"]["sparsity"] == 0.75
    assert result["perplexity"]["merged"]["text"] < result["perplexity"]["pruned"]["text"]


def test_a_method_that_was_killed_ends_with_the_same_bits(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress(parse(during(tiny_folder, text_file, tmp_path / "whole"), LanguageRecipe, "test"))
    asked = parse(during(tiny_folder, text_file, tmp_path / "killed"), LanguageRecipe, "test")
    train, done = stages.train, 0

    def killed(model: Any, batches: Any, *args: Any, **more: Any) -> Any:
        def served(step: int) -> Any:
            nonlocal done
            done += 1
            if done == 14:  # the second step of retraining, after twelve of the method's training
                raise KeyboardInterrupt
            return batches(step)

        return train(model, served, *args, save_seconds=0, **more)

    monkeypatch.setattr(stages, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(asked)
    monkeypatch.undo()
    compress(asked)
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "killed")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_what_goes_ill_with_a_method_is_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    for change, message in [
        ({"train": None}, r"give train: {steps: 1000} as well"),
        ({"during": None}, "give during: elsa as well"),
        ({"prune": {"criterion": "magnitude"}}, "prune.criterion: a method that prunes during training chooses itself"),
        ({"reconstruct": {}}, "reconstruct: a method that prunes during training chooses itself"),
        ({"during": "gsm"}, "prune.pattern: gsm prunes single entries; leave it out"),
        ({"during": {"elsa": {"interval": 0}}}, "ELSA needs lam > 0 and interval >= 1"),
        ({"train": {"train": ["norms"]}}, r"leave out train, or set it to \[full\]"),
        ({"train": {"train": ["mask_lora"]}}, r"or set it to \[full\] or \[lora\]"),
        ({"train": {"train": ["lora"], "keep_adapter": True}}, "keep_adapter: what is trained while"),
        ({"train": {"train": ["lora"]}, "during": "maskllm"}, "train.train: maskllm prunes weights that are trained"),
        ({"during": {"elsa": {"lam": 0}}}, "during.elsa.lam: 0 pulls no weight that is trained to zero"),
        ({"during": {"elsa": {"move": 0.2}}}, "during.elsa.move: weights that are trained themselves move anyway"),
        ({"train": {"data": "./nowhere.txt"}}, "train.data: no file or folder './nowhere.txt'"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(during(tiny_folder, text_file, tmp_path) | change, LanguageRecipe, "test")


@pytest.mark.parametrize("retrain", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_streaming_from_disk_gives_the_same_model(
    text_file: Path, tmp_path: Path, retrain: bool, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    config = tiny_llama().config
    config.tie_word_embeddings = tied
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    changes: dict[str, Any] = {} if retrain else {"retrain": None}
    changes["prune"] = {"criterion": "sparsegpt", "sparsity": 0.5, "include": ["*_proj", "lm_head"]}
    memory = compress(recipe(tmp_path / "dense", text_file, tmp_path / "memory", **changes))
    if not retrain:  # then nothing may ever hold the whole model

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the model was loaded into memory")

        monkeypatch.setattr(stages, "loaded_model", refuse)
    disk = compress(recipe(tmp_path / "dense", text_file, tmp_path / "disk", streaming=True, **changes))
    monkeypatch.undo()
    for stage, found in memory["perplexity"].items():
        assert disk["perplexity"][stage]["text"] == pytest.approx(found["text"], rel=1e-6)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("memory", "disk"))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    name = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert float((one.get_parameter(name) == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
    configs = [
        tmp_path / "dense" / "config.json",
        *(tmp_path / n / "model" / "config.json" for n in ("memory", "disk")),
    ]
    assert len({path.read_bytes() for path in configs}) == 1


WRONG = [
    ({"prunes": {}}, "unknown key 'prunes'; did you mean 'prune'"),
    ({"prune": {"sparsty": 0.5}}, "unknown key 'prune.sparsty'; did you mean 'sparsity'"),
    ({"prune": {"sparsity": 1.5}}, "prune"),
    ({"prune": {"pattern": "2:3:4"}}, "Pattern '2:3:4' is not N:M"),
    ({"prune": {"pattern": "2:4", "sparsity": 0.7}}, "0.7"),
    ({"prune": {"criterion": "sparsegpt", "scope": "model"}}, "sparsegpt chooses inside one layer"),
    ({"prune": {"criterion": "frank_wolfe", "scope": "model"}}, "frank_wolfe chooses inside one layer"),
    ({"prune": {"criterion": "wandda"}}, "there is no criterion 'wandda'; did you mean 'wanda'? there are magnitude, "),
    ({"prune": {"criterion": {"wanda": {"swaps": 5}}}}, "wanda has no option 'swaps'; it takes none"),
    (
        {"prune": {"criterion": {"frank_wolfe": {"iteration": 5}}}},
        "did you mean 'iterations'? it takes iterations, swaps",
    ),
    (
        {"prune": {"criterion": {"frank_wolfe": {"concave": [0, 3]}}}},
        "prune.criterion: concave is (first, last), each in",
    ),
    ({"prune": {"criterion": {"sparsegpt": {"damping": "much"}}}}, "sparsegpt.damping: Input should be a valid number"),
    ({"prune": {"allocation": "ring"}}, "no allocation 'ring'; there are erk, evopress, global, lamp, owl, uniform"),
    ({"prune": {"criterion": "sparsegpt", "allocation": "lamp"}}, "no scores for lamp to compare"),
    ({"calibrate": {"data": "./nowhere.txt"}}, "nowhere.txt"),
    ({"retrain": {"train": ["biasses"]}}, "biasses"),
    ({"retrain": {"train": ["full", "mask_lora"]}}, "full"),
    ({"retrain": {"lrs": {"norms": 1e-3}}}, "lrs names 'norms'"),
    ({"evaluate": {"window": 1}}, "evaluate.window"),
    ({"calibrate": {"data": {"source": "embedded", "part": [0.9, 0.1]}}}, "is empty"),
    ({"model": "./no-model"}, "no file or folder"),
    ({"retrain": {"train": ["lora"]}}, "would fill pruned weights"),
    ({"soup": {}, "retrain": {}, "evaluate": {"data": {}}}, "soup: members are compared by the first text"),
    ({"retrain": {"evaluate_every": 2}, "evaluate": {"data": {}}}, "retrain.evaluate_every: evaluate.data has no text"),
    ({"reconstruct": {"train": ["norms", "lora"]}}, "reconstruct.train: merging 'lora' would fill pruned weights"),
    (
        {
            "retrain": {"steps": 4, "evaluate_every": 2, "keep_best": True, "watch": "b"},
            "soup": {"average": "greedy"},
            "evaluate": {"data": {"a": "embedded", "b": {"source": "embedded", "split": "test"}}},
        },
        "soup, retrain.watch: what chooses is not what is reported: give evaluate.data a third text",
    ),
    ({"retrain": {"warmup": 1.0}}, "retrain.warmup"),
    ({"retrain": {"train": ["norms"], "lrs": {"norms": -1}}}, "retrain.lrs.norms"),
    ({"evaluate": {"tasks": {"arc": "./nowhere.jsonl"}}}, "nowhere.jsonl"),
    ({"device": "gpu3"}, "'gpu3'"),
    ({"prune": {"criterion": {"sparsegpt": {"damping": 3}}}}, "prune.criterion: sparsegpt needs 0 <= damping <= 1"),
    ({"retrain": {"distill": {"weight": 2}}}, "retrain.distill.weight"),
    ({"prune": {"phases": True}}, "prune.phases: needs a number, not true or false"),
    ({"retrain": {"distill": {"weight": True}}}, "retrain.distill.weight: needs a number"),
    ({"prune": {"allocation": "evopress", "phases": 2}}, "evopress solves whole layers"),
    ({"prune": {"allocation": "evopress"}, "streaming": True}, "leave out streaming"),
    ({"prune": {"allocation": {"evopress": {"levels": 0}}}}, "evopress needs generations, offspring and levels >= 1"),
    ({"retrain": {"distill": {"teacher": "./nowhere"}}}, "retrain.distill.teacher: no file or folder './nowhere'"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_wrong_recipes_are_refused_with_key_and_mend(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        parse(change, LanguageRecipe, "recipe.yaml")
    assert "recipe.yaml" in str(caught.value)
    assert message in str(caught.value)


def test_an_nm_pattern_says_its_sparsity() -> None:
    assert parse({"prune": {"pattern": "1:4"}}, LanguageRecipe, "").prune.sparsity == 0.75


def test_retraining_asked_anew_does_not_take_the_old_checkpoint(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate", lambda loaded, *_: {"text": 1.0})
        patch.setattr("prunus.language.single.save_model", kill)
        with pytest.raises(KeyboardInterrupt):
            compress(recipe(tiny_folder, text_file, tmp_path / "run"))
    other = raw(tiny_folder, text_file, tmp_path / "run")
    other["retrain"]["seed"] = 7
    fresh = {**other, "out": str(tmp_path / "fresh")}
    found, expected = (compress(parse(asked, LanguageRecipe, "test"))["perplexity"] for asked in (other, fresh))
    assert found["merged"] == expected["merged"]


def test_an_empty_subset_is_refused_before_any_work(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(*_: Any, **__: Any) -> None:
        raise AssertionError("work was done")

    monkeypatch.setattr(stages, "evaluate", work)
    asked = raw(tiny_folder, text_file, tmp_path)
    asked["retrain"]["train"] = ["biases"]
    with pytest.raises(ValueError, match="biases"):
        compress(parse(asked, LanguageRecipe, "test"))


def test_random_pruning_of_the_whole_model_is_exact_and_resumes(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    prune = {"criterion": "random", "sparsity": 0.37, "scope": "model"}
    results = [
        compress(recipe(tiny_folder, text_file, tmp_path / name, prune=prune, retrain=None)) for name in ("a", "b")
    ]
    blocks = results[0]["pruning"]["blocks"]
    kept, total = (sum(sum(block[key].values()) for block in blocks) for key in ("kept", "total"))
    assert kept == total - round(0.37 * total)
    one, other = (Masks.load(tmp_path / name / "model" / "masks.safetensors") for name in ("a", "b"))
    assert one == other


@pytest.mark.parametrize(("streaming", "packed"), [(False, False), (True, "zstd")])
def test_a_float16_checkpoint_is_computed_in_float32_on_a_cpu_and_saved_in_float16(
    text_file: Path, tmp_path: Path, streaming: bool, packed: Any
) -> None:
    tiny_llama().half().save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    save = {"packed": packed}
    asked = recipe(tmp_path / "dense", text_file, tmp_path / "run", retrain=None, streaming=streaming, save=save)
    size = compress(asked)["size"]
    dense = read_checkpoint(tmp_path / "dense")
    least, most = (0.5, 0.9) if packed else (1.0, 1.1)
    header = 1 << 15 if packed or streaming else 0
    assert least < (size["weight_bytes"] - header) / size["dense_bytes"] < most
    assert size["dense_bytes"] == sum(2 * each.numel for each in dense.tensors.values())
    assert load_model(tmp_path / "run" / "model").dtype == torch.float16
    assert (tmp_path / "run" / "model" / "config.json").read_bytes() == (
        tmp_path / "dense" / "config.json"
    ).read_bytes()


def test_checkpointing_and_chunked_logits_change_nothing_but_memory(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = raw(tiny_folder, text_file, tmp_path)
    plain = compress(recipe(tiny_folder, text_file, tmp_path / "plain", save=False))
    monkeypatch.setattr(next_token, "_ENTRIES", 2000)  # of 33,280 logits a step
    retrain = base["retrain"] | {"checkpointing": True}
    lean = compress(recipe(tiny_folder, text_file, tmp_path / "lean", save=False, retrain=retrain))
    assert lean["perplexity"]["merged"]["text"] == pytest.approx(plain["perplexity"]["merged"]["text"], rel=1e-4)


def test_weights_stay_on_a_gpu_that_has_room_for_them_and_the_work(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, gpu, cpu = recipe(tiny_folder, text_file, tmp_path), torch.device("cuda:0"), torch.device("cpu")
    size = (tiny_folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * size, 3 * size))
    gpt = recipe(tiny_folder, text_file, tmp_path, prune={"criterion": "sparsegpt"})
    places = [
        home(asked, gpu),
        home(gpt, gpu),
        home(asked, cpu),
        home(asked.model_copy(update={"streaming": True}), gpu),
    ]
    assert places == [gpu, cpu, cpu, cpu]
    assert home(asked.model_copy(update={"dtype": "float32"}), gpu) == cpu
    meta = stages.load(asked, torch.device("meta")).model
    assert all(parameter.is_meta for parameter in meta.parameters()), "read to the home that was asked for"


SCHEDULED: list[tuple[Any, dict[str, int] | None]] = [
    (ft, {"steps": 40}),
    (slr, {"steps": 40, "warmup": 5}),
    (llr, None),
    (allr, {"steps": 40}),
]


@pytest.mark.parametrize(("schedule", "dense"), SCHEDULED, ids=[each.__name__ for each, _ in SCHEDULED])
def test_retraining_takes_the_schedules_of_classifiers(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: Any, dense: Any
) -> None:
    rates: list[Any] = []
    train = stages.train
    monkeypatch.setattr(stages, "train", lambda *args, **more: (rates.append(args[3]), train(*args, **more))[1])
    asked = raw(tiny_folder, text_file, tmp_path / "run")
    asked["retrain"] |= {"schedule": schedule.__name__, "dense": dense, "steps": 4, "warmup": 0.25}
    result = compress(parse(asked, LanguageRecipe, "test"))
    original = Original.of([1.0]) if dense is None else DenseRates(**dense).original(1.0)
    own: dict[str, Any] = {} if schedule is ft else {"warmup": 0.25}
    if schedule is allr:
        before = AutoModelForCausalLM.from_pretrained(tiny_folder)
        masks = Masks.load(tmp_path / "run" / "model" / "masks.safetensors")
        own |= {"distance": distance(dict(before.named_parameters()), masks), "share": 0.1}
        assert 0.1 < result["distance"] == own["distance"] < 1
    expected = schedule(original, 4, **own)
    assert [rates[0](step) for step in range(4)] == pytest.approx([expected(step) for step in range(4)])


def test_retraining_learns_from_the_dense_model_or_another(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces: list[Any] = []
    train = stages.train
    monkeypatch.setattr(stages, "train", lambda *args, **more: (traces.append(train(*args, **more)), traces[-1])[1])
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    asked = raw(tiny_folder, text_file, tmp_path / "run")
    asked["retrain"] |= {"steps": 2}
    cases = {"dense": {"weight": 1.0}, "other": {"weight": 1.0, "teacher": str(tmp_path / "other")}, "text": None}
    cases["half"] = {"weight": 1.0, "dtype": "bfloat16"}
    for name, distill in cases.items():
        changed = asked | {"retrain": asked["retrain"] | {"distill": distill}, "out": str(tmp_path / f"by-{name}")}
        compress(parse(changed, LanguageRecipe, "test"))
    dense, other, text, half = (trace.losses[0] for trace in traces)
    teacher, student = (AutoModelForCausalLM.from_pretrained(tiny_folder) for _ in range(2))
    Masks.load(tmp_path / "by-dense" / "model" / "masks.safetensors").apply_(student)
    checked = parse(asked, LanguageRecipe, "test").retrain
    assert checked is not None
    ids = training_windows(checked, byte_tokenizer()).batch(0, batch=4, seed=0)
    for found, dtype, near in ((dense, torch.float32, 1e-5), (half, torch.bfloat16, 1e-3)):
        with torch.no_grad():
            expected = float(distilled_next_token(teacher.to(dtype), 1.0)(student, ids))
        assert found == pytest.approx(expected, rel=near)
    assert half != dense
    assert dense < other < text


def test_a_schedule_that_goes_by_the_dense_training_needs_it(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = raw(tiny_folder, text_file, tmp_path)
    for change, message in [
        ({"schedule": "slr"}, "schedule slr goes by the dense training: give dense: {steps: 100000}"),
        ({"schedule": "slrr"}, "did you mean 'slr'"),
        ({"schedule": "slr", "dense": {"steps": 5, "warmup": 5}}, "set fewer"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            parse(asked | {"retrain": asked["retrain"] | change}, LanguageRecipe, "test")


def test_a_language_model_is_pruned_in_phases(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    """Each phase prunes within the one before and retrains; the result has exactly the sparsity asked for."""
    asked = raw(tiny_folder, text_file, tmp_path / "run", prune={"sparsity": 0.75, "phases": 2})
    result = compress(parse(asked, LanguageRecipe, "test"))
    assert result["pruning"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    masks = Masks.load(tmp_path / "run" / "model" / "masks.safetensors")
    first = raw(tiny_folder, text_file, tmp_path / "first", prune={"sparsity": 0.5})
    compress(parse(first, LanguageRecipe, "test"))
    before = Masks.load(tmp_path / "first" / "model" / "masks.safetensors")
    assert all(not bool((mask & ~before[name]).any()) for name, mask in masks.items())
    stages_seen = [row["stage"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "perplexity" in row]
    assert stages_seen == ["dense", "phase 1", "pruned", "retrained", "merged"]
    once = raw(tiny_folder, text_file, tmp_path / "once", prune={"sparsity": 0.75})
    assert compress(parse(once, LanguageRecipe, "test"))["perplexity"]["merged"] != result["perplexity"]["merged"]


@criterion()
def largest(layer: Layer) -> torch.Tensor:
    """Scores that zeros win."""
    return -layer.weight.abs().float()


@pytest.mark.parametrize("schedule", ["linear", "allr"])
def test_no_phase_of_a_language_model_gives_weights_back(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    """Not even by a criterion that zeros score best by; distances are of what the phase took away."""
    monkeypatch.setattr(criteria, "largest", largest, raising=False)
    monkeypatch.setattr(criteria, "__all__", [*criteria.__all__, "largest"])
    pruned: list[tuple[dict[str, torch.Tensor], Masks]] = []
    prune = stages.prune

    def seen(loaded: stages.Loaded, *args: Any, **more: Any) -> Any:
        before = {name: value.detach().clone() for name, value in loaded.model.named_parameters()}
        streamed = prune(loaded, *args, **more)
        pruned.append((before, streamed.masks))
        return streamed

    monkeypatch.setattr(stages, "prune", seen)
    asked = raw(
        tiny_folder, text_file, tmp_path, prune={"criterion": "largest", "sparsity": 0.75, "phases": 3}, save=False
    )
    asked["retrain"] |= {"schedule": schedule, "steps": 4} | ({"dense": {"steps": 40}} if schedule == "allr" else {})
    result = compress(parse(asked, LanguageRecipe, "test"))
    masks = [each for _, each in pruned]
    assert len(masks) == 3
    for earlier, later in pairwise(masks):
        assert not any(bool((mask & ~earlier[name]).any()) for name, mask in later.items())
    assert result["pruning"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    if schedule == "allr":
        assert result["distance"] == distance(pruned[-1][0], masks[-1], masks[-2])


def test_phases_of_a_language_model_are_refused_where_they_cannot_be(
    tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    asked = raw(tiny_folder, text_file, tmp_path, prune={"sparsity": 0.75, "phases": 2})
    for change, message in [
        ({"retrain": None}, "give a section retrain"),
        ({"reconstruct": {}}, "leave out reconstruct"),
        ({"prune": {"pattern": "2:4", "phases": 2}}, "leave out phases"),
        ({"prune": {"criterion": "sparsegpt", "phases": 2}}, "sparsegpt cannot stay within .*: leave out phases"),
        ({"prune": {"criterion": "frank_wolfe", "phases": 2}}, "frank_wolfe cannot stay within .*: leave out phases"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse(asked | change, LanguageRecipe, "test")


def test_a_run_is_watched_keeps_the_best_and_ends_early(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = raw(tiny_folder, text_file, tmp_path)
    texts = {"choosing": {"source": str(text_file), "part": [0.5, 1.0]}, "text": str(text_file)}
    how = {"schedule": {"wsd": 0.5}, "weight_decay": 0.1, "evaluate_every": 2, "keep_best": True, "patience": 2}
    how["steps"] = 12
    asked = recipe(
        tiny_folder, text_file, tmp_path, retrain=base["retrain"] | how, evaluate=base["evaluate"] | {"data": texts}
    )
    measured, perplexity = list[float](), stages.evaluate

    def worse(loaded: Any, own: LanguageRecipe, device: torch.device) -> dict[str, float]:
        """The truth, but for the fourth and later measurements meanwhile."""
        found = perplexity(loaded, own, device)
        if list(own.evaluate.data) == ["choosing"]:
            measured.append(found["choosing"])
            found["choosing"] += 1e6 * (len(measured) > 3)
        return found

    monkeypatch.setattr(stages, "evaluate", worse)
    result = compress(asked)
    watched = result["retraining"]["watched"]
    assert [step for step, _ in watched] == [0, 2, 4, 6, 8]  # of 12
    assert result["perplexity"]["retrained"]["choosing"] == min(measured[:3])
    assert result["retraining"]["tokens"] == 8 * 4 * 32
    row = next(row for row in read_metrics(tmp_path / "metrics.jsonl") if row["stage"] == "retrain")
    assert (len(row["losses"]), row["watched"]) == (8, [list(each) for each in watched])
    write_report(tmp_path)
    assert (tmp_path / "loss.png").exists()


def test_weight_decay_is_of_matrices(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    base = raw(tiny_folder, text_file, tmp_path)
    asked = recipe(
        tiny_folder,
        text_file,
        tmp_path,
        prune={"criterion": "magnitude"},
        retrain=base["retrain"] | {"train": ["norms", "mask_lora"], "steps": 1, "weight_decay": 0.5},
    )
    seen: list[dict[str, Any]] = []

    def groups(_: Any, batches: Any, optimizer: torch.optim.Optimizer, *args: Any, **how: Any) -> Any:
        seen.extend(optimizer.param_groups)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "train", groups)
        loaded = stages.load(asked)
        with pytest.raises(KeyboardInterrupt):
            stages.retrain(loaded, stages.prune(loaded, asked, CPU).masks, asked, CPU)
    assert [(each["subset"], each["weight_decay"]) for each in seen] == [("norms", 0.0), ("mask_lora", 0.5)]
    assert all(parameter.ndim > 1 for parameter in seen[1]["params"])


@pytest.mark.parametrize(
    ("retrain", "message"),
    [
        ({"distill": {"teachr": 1}}, r"unknown key 'retrain\.distill\.teachr'; did you mean 'teacher'\?"),
        ({"distill": {"weight": "half"}}, r"retrain\.distill\.weight: Input should be a valid number"),
        ({"keep_best": True}, r"keep_best: nothing is measured meanwhile: set evaluate_every: 50"),
        ({"patience": 2, "evaluate_every": 5}, r"give evaluate\.data a second text"),
        ({"watch": "wiki", "evaluate_every": 5}, r"evaluate\.data has no text 'wiki', only text"),
        ({"schedule": {"wsd": {"decay": 2}}}, r"decay is the share of the steps.*got 2"),
        ({"schedule": "cosin"}, r"no retraining schedule 'cosin'.*those of training.*cosine"),
        ({"weight_decay": -1}, "weight_decay"),
    ],
)
def test_what_a_watched_retraining_refuses(
    tiny_folder: Path, text_file: Path, tmp_path: Path, retrain: dict[str, Any], message: str
) -> None:
    base = raw(tiny_folder, text_file, tmp_path)
    with pytest.raises(ValueError, match=message):
        parse(base | {"retrain": base["retrain"] | retrain}, LanguageRecipe, "test")


def test_moments_of_eight_bits_do_what_those_of_32_do_and_keep_zeros() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(64, 128, generator=generator) for _ in range(2))
    layers = [nn.Linear(128, 64, bias=False) for _ in range(2)]
    for layer, name in zip(layers, ("adamw", "adamw_8bit"), strict=True):
        layer.weight.data.copy_(weight)
        optimizer = optimizer_of(name)(layer.parameters(), lr=0.01, weight_decay=0.1)
        masks = prune(layer, sparsity=0.5)
        masks.hold(layer, optimizer)
        for _ in range(5):
            optimizer.zero_grad()
            layer(inputs).square().mean().backward()
            optimizer.step()
        masks.check(layer)
    assert optimizer.state[layer.weight]["state1"].dtype == torch.uint8
    moved = [layer.weight.detach() - weight * (layer.weight != 0) for layer in layers]
    assert (moved[1] - moved[0]).abs().mean() < 0.05 * moved[0].abs().mean()


def test_an_optimizer_that_is_not_installed_is_refused_with_the_mend(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    base = raw(tiny_folder, text_file, tmp_path)
    with pytest.raises(ImportError, match=r"adamw_8bit.*pip install 'prunus\[eightbit\]'"):
        compress(parse(base | {"retrain": base["retrain"] | {"optimizer": "adamw_8bit"}}, LanguageRecipe, "test"))
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "wsd", {"cosine": 0.1}, {"multistep": [3]}])
def test_schedules_of_training_are_those_of_retraining(schedule: Any) -> None:
    rates = LanguageRetrain(schedule=schedule, steps=20, warmup=0.1).rates()
    wanted = schedules.make(schedule, 20, warmup=2)
    assert [rates(step) for step in range(20)] == [wanted(step) for step in range(20)]
