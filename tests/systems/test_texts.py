"""The texts of a recipe: what each use makes of them, and that what cannot be used is refused before any work."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from prunus.language.single import compress
from prunus.language.texts import calibration_windows, training_windows
from prunus.recipe import Data, LanguageRecipe, given, parse
from prunus.run.evaluate import evaluate_model
from tests.conftest import byte_tokenizer, tiny_llama


def recipe(model: Path, text: Any, out: Path, **changes: Any) -> LanguageRecipe:
    raw = {
        "model": str(model),
        "device": "cpu",
        "calibrate": {"data": text, "samples": 4, "length": 16},
        "retrain": {"data": text, "train": ["norms"], "steps": 4, "batch_size": 4, "length": 16, "lr": 1e-2},
        "evaluate": {"data": {"text": text}, "window": 16},
        "out": str(out),
    }
    return parse(raw | changes, LanguageRecipe, "test")


def of(text: Any, tmp_path: Path, **retrain: Any) -> LanguageRecipe:
    raw: dict[str, Any] = {"steps": 4, "batch_size": 3, "length": 8, "data": text, **retrain}
    return parse({"retrain": raw, "out": str(tmp_path)}, LanguageRecipe, "test")


def lines(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def seen(asked: LanguageRecipe) -> str:
    """What is trained on, as text."""
    tokenizer = byte_tokenizer()
    packed = training_windows(given(asked.retrain), tokenizer)
    rows = [packed.at(step, batch=1, seed=0)[0] for step in range(len(packed))]
    return "|".join(sorted(str(tokenizer.decode(row)) for row in rows))


def test_retraining_separates_documents_by_the_end_token(tmp_path: Path):
    source = lines(tmp_path / "a.jsonl", {"text": "first"}, {"text": ""}, {"text": "second one"})
    assert seen(of(source, tmp_path)) == "cond one|first</s>se"
    joined = of({"source": source, "end": False, "join": "--"}, tmp_path)
    assert seen(joined) == "-second |first---"


def test_sources_are_mixed_by_their_weights(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a" * 500)
    (tmp_path / "b.txt").write_text("b" * 8)
    mix = [{"source": str(tmp_path / "a.txt"), "weight": 3}, {"source": str(tmp_path / "b.txt"), "weight": 1}]
    assert Counter(seen(of(mix, tmp_path))) == {"a": 72, "b": 24, "|": 11}  # 4 steps of 3 windows of 8
    asked = parse({"calibrate": {"data": mix, "samples": 4, "length": 8}}, LanguageRecipe, "test").calibrate
    assert Counter(byte_tokenizer().decode(calibration_windows(asked, byte_tokenizer()).flatten())) == {"a": 24, "b": 8}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "give a source"),
        ([{"weight": 1}], "mix.0: give a source"),
        ([{"source": "embedded", "weight": 0}], "greater than 0"),
        ([[{"source": "embedded"}]], "not of mixtures"),
        ({"mix": ["embedded"], "column": "body"}, "column: of each text of a mixture: say it in the list"),
        ({"mix": ["embedded"], "messages": "m"}, "messages: of each text of a mixture: say it in the list"),
        ([{"source": "embedded", "head": False}, "embedded"], "head: of a whole mixture: say it beside mix"),
        ({"source": "embedded", "messages": "m", "column": "body"}, "column: not of chats: leave it out"),
        ({"source": "embedded", "prompt": "p", "answer": "a", "end": False}, "end: not of chats: leave it out"),
        ({"source": "embedded", "prompt": "q"}, "prompt and answer"),
        ({"source": "embedded", "prompt": "q", "answer": "a", "messages": "m"}, "prompt and answer"),
        ("absent.csv", "no file or folder 'absent.csv'"),
    ],
)
def test_texts_that_make_no_sense_are_refused(tmp_path: Path, data: Any, message: str):
    with pytest.raises(ValueError, match=message):
        of(data, tmp_path)


def test_one_text_is_not_validation_and_test(tmp_path: Path, text_file: Path):
    text = str(text_file)
    with pytest.raises(ValueError, match="'validation' and 'test' are one text"):
        recipe(Path("embedded"), text, tmp_path, evaluate={"data": {"validation": text, "test": text}})
    halves = {name: {"source": text, "part": part} for name, part in (("a", [0, 0.5]), ("b", [0.5, 1]))}
    recipe(Path("embedded"), text, tmp_path, evaluate={"data": halves})


@pytest.mark.parametrize(("form", "name"), [
    ("{text}", "text"), ({"source": "{text}", "part": [0, 0.5]}, "text"), (["{text}", "embedded"], "mixture"),
    ({"source": "{text}", "target": {"source": "{text}", "part": [0, 0.5]}}, "source target"),
])  # fmt: skip
def test_one_text_is_measured_in_any_form_that_a_text_has(text_file: Path, tmp_path: Path, form: Any, name: str):
    data = json.loads(json.dumps(form).replace("{text}", str(text_file)))
    found = recipe(Path("embedded"), str(text_file), tmp_path, evaluate={"data": data}).evaluate.data
    assert list(found) == name.split()
    assert len(set(found.values())) == len(found)


def test_a_misspelt_key_of_one_text_is_named(text_file: Path, tmp_path: Path):
    data = {"source": str(text_file), "splt": "test"}
    with pytest.raises(ValueError, match=r"unknown key 'evaluate\.data\.text\.splt'; did you mean 'split'"):
        recipe(Path("embedded"), str(text_file), tmp_path, evaluate={"data": data})


@pytest.mark.parametrize("section", ["calibrate", "retrain", "evaluate"])
def test_a_text_that_is_too_short_is_refused_before_the_model_runs(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str
):
    (tmp_path / "short.txt").write_text("plum")
    data: Any = str(tmp_path / "short.txt")
    asked = recipe(tiny_folder, str(text_file), tmp_path / "out").model_dump(mode="json")
    asked[section]["data"] = {"short": data} if section == "evaluate" else data
    monkeypatch.setattr(LlamaForCausalLM, "forward", lambda *_, **__: pytest.fail("the model ran"))
    key = "evaluate.data.short" if section == "evaluate" else f"{section}.data"
    with pytest.raises(ValueError, match=rf"^{key}: .*4"):
        compress(parse(asked, LanguageRecipe, "test"))


def test_a_text_that_is_trained_on_is_said_to_be(
    tiny_folder: Path, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    with caplog.at_level(logging.WARNING):
        compress(recipe(tiny_folder, str(text_file), tmp_path / "out", save=False))
    assert "evaluate.data.text is the text that is trained on" in caplog.text


@pytest.mark.parametrize(
    ("trained", "measured", "shared"),
    [
        ("embedded", {"source": "embedded", "split": "test"}, True),  # all splits
        ({"source": "embedded", "split": "train"}, {"source": "embedded", "split": "test"}, False),
        (["{folder}/a.jsonl", "embedded"], "{folder}/./a.jsonl", True),
        ("{folder}", "{folder}/a.jsonl", True),
        ({"source": "{folder}/a.jsonl", "part": [0, 0.6]}, {"source": "{folder}/a.jsonl", "part": [0.5, 1]}, True),
        ({"source": "{folder}/a.jsonl", "part": [0, 0.5]}, {"source": "{folder}/a.jsonl", "part": [0.5, 1]}, False),
        ("{folder}/a.jsonl", {"source": "{folder}/a.jsonl", "column": "body"}, False),
    ],
)
def test_texts_that_share_what_is_trained_on_are_found(tmp_path: Path, trained: Any, measured: Any, shared: bool):
    (tmp_path / "a.jsonl").touch()
    one, other = (json.loads(json.dumps(each).replace("{folder}", str(tmp_path))) for each in (trained, measured))
    one, other = Data.model_validate(one), Data.model_validate(other)
    assert one.meets(other) == other.meets(one) == shared


def test_answers_alone_are_learnt(tiny_folder: Path, tmp_path: Path):
    rows = [{"q": f"How many are {i % 7}? ", "a": "Plums!"} for i in range(60)]
    pairs = {"source": lines(tmp_path / "p.jsonl", *rows), "prompt": "q", "answer": "a"}
    retrain = {"data": pairs, "train": ["full"], "steps": 12, "batch_size": 4, "length": 32, "lr": 1e-2}
    found = compress(recipe(tiny_folder, pairs, tmp_path / "out", retrain=retrain, save=False))["perplexity"]
    assert found["merged"]["text"] < 0.2 * found["pruned"]["text"]


def test_the_start_token_is_at_the_head_of_each_window(tmp_path: Path, text_file: Path):
    tokenizer = byte_tokenizer()
    end = 256
    assert tokenizer.eos_token_id == end
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", end)]
    )
    tiny_llama().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = torch.tensor(tokenizer(text_file.read_text(), add_special_tokens=False)["input_ids"])
    rows = torch.cat([torch.full((len(ids) // 15, 1), end), ids[: len(ids) // 15 * 15].view(-1, 15)], 1)
    with torch.no_grad():
        by_hand = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in rows]).mean().exp()
    asked = {"evaluate.window": 16, "evaluate.data": {"t": str(text_file)}}
    found = evaluate_model(str(tmp_path / "m"), asked)
    assert found["head"] == "</s>"
    assert found["perplexity"]["t"] == pytest.approx(by_hand.item(), rel=1e-4)
    plain = evaluate_model(
        str(tmp_path / "m"), asked | {"evaluate.data": {"t": {"source": str(text_file), "head": False}}}
    )
    assert plain["head"] == ""
    assert not math.isclose(plain["perplexity"]["t"], found["perplexity"]["t"], rel_tol=1e-5)
