"""`pretrain` end to end on a toy library of books."""

import json
import random
from pathlib import Path
from typing import Any

import pretrain as module  # pyright: ignore[reportMissingImports] - pytest finds it
import pytest
import torch
from pretrain import HeldOut, ModelSize, PretrainRecipe, main, pretrain, read_recipe  # pyright: ignore[reportMissingImports]
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunus.data import tokenize_documents
from prunus.measure.perplexity import perplexity

NOUNS, VERBS = ["cat", "dog", "warden", "ship", "island", "lady"], ["sees", "finds", "loves", "leaves", "fears"]


def book(seed: int) -> str:
    chooser = random.Random(seed)
    lines = [f"The {chooser.choice(NOUNS)} {chooser.choice(VERBS)} the {chooser.choice(NOUNS)}." for _ in range(400)]
    return "\n\n".join(lines)


@pytest.fixture
def recipe(tmp_path: Path) -> PretrainRecipe:
    rows = [{"title": f"Book {n}", "text": "Zebra " * 800 * (n == 2) + book(n)} for n in range(6)]
    (tmp_path / "books.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    size = ModelSize(vocabulary=300, hidden=16, layers=2, heads=2, ffn=32, context=32)
    held_out = HeldOut(
        train=["Book 2"], validation=["Book 3"], test=["Book 4", "Book 5"],
        train_bytes=900, validation_bytes=400, test_bytes=1000,
    )  # fmt: skip
    return PretrainRecipe(
        data=str(tmp_path / "books.jsonl"), held_out=held_out, model=size, steps=60, batch=8, lr=0.01,
        save_seconds=0, evaluate_every=50, precision="fp32",
    )  # fmt: skip


def test_the_folder_is_an_ordinary_model_that_learnt(tmp_path: Path, recipe: Any):
    folder = tmp_path / "run"
    summary = pretrain(recipe, folder)
    measured = summary["perplexity"]["test"]
    assert measured["model"] < 0.6 * measured["unigram"]
    assert measured["trigram"] < measured["unigram"]
    assert json.loads((folder / "baselines.json").read_text()) == summary
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.float16
    # transformers 5 alone knows the class name that it would have written.
    assert '"PreTrainedTokenizerFast"' in (folder / "tokenizer_config.json").read_text()
    tokens = tokenize_documents([book(4)], tokenizer)
    assert tokenizer.decode(tokens[:-1]) == book(4)
    assert perplexity(model.float(), tokens, window=32) == pytest.approx(measured["model"], rel=0.1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 60]
    assert all("validation_perplexity" in line for line in lines)


def test_excerpts_are_of_the_held_out_books_only(tmp_path: Path, recipe: Any):
    folder = tmp_path / "run"
    pretrain(recipe.model_copy(update={"steps": 2, "leave_out": ["Book 0"]}), folder)
    for split, books, limit in (("train", [2], 900), ("validation", [3], 400), ("test", [4, 5], 1000)):
        text = (folder / "text" / f"{split}.txt").read_text()
        assert 0.8 * limit < len(text.encode()) <= limit
        whole = [line for number in books for line in book(number).split("\n\n")]
        assert set(text.strip().split("\n\n")) <= set(whole)
    assert "ebra" not in (folder / "tokenizer.json").read_text()  # a frequent word of the held-out books alone
    tokens = torch.load(folder / "work" / "tokens.pt")
    alone = tokenize_documents([book(1)], AutoTokenizer.from_pretrained(folder))
    assert torch.equal(tokens.long(), alone)  # Book 0 left out, the others held out


def test_a_killed_run_goes_on_to_the_same_model(tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch):
    pretrain(recipe, tmp_path / "whole")

    def killing(done: int, steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pretrain(recipe, tmp_path / "killed", on_step=killing)  # at step 50, after the checkpoint of the step before
    monkeypatch.setattr(module, "tokenize_documents", _fail_on_long(module.tokenize_documents))
    pretrain(recipe, tmp_path / "killed")
    for name in ("model.safetensors", "tokenizer.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match="another recipe"):
        pretrain(recipe.model_copy(update={"lr": 0.02}), tmp_path / "killed")


def _fail_on_long(tokenise: Any):
    def checked(texts: Any, tokenizer: Any):
        assert len(texts) < 3 or pytest.fail("the training text was tokenised twice")
        return tokenise(texts, tokenizer)

    return checked


def test_minutes_bound_the_steps_of_a_model_with_experts(tmp_path: Path, recipe: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "PROBE_STEPS", 20)
    experts = recipe.model.model_copy(update={"experts": 4})
    summary = pretrain(recipe.model_copy(update={"minutes": 1e-9, "model": experts}), tmp_path / "short")
    assert summary["steps"] == 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short").config.num_local_experts == 4
    assert json.loads((tmp_path / "short" / "work" / "steps.json").read_text())["steps"] == 2


def test_wrong_recipes_are_refused(tmp_path: Path, recipe: Any):
    with pytest.raises(ValueError, match="no book called \\['Book 9'\\]"):
        pretrain(recipe.model_copy(update={"leave_out": ["Book 9"]}), tmp_path / "a")
    with pytest.raises(ValueError, match="none is left"):
        pretrain(recipe.model_copy(update={"leave_out": ["Book 0", "Book 1"]}), tmp_path / "b")
    path = tmp_path / "recipe.yaml"
    path.write_text("data: x.txt\nheld_out: {train: [a], validation: [b], test: [c]}\nstep: 5\n")
    with pytest.raises(ValueError, match=r"recipe.yaml: unknown key 'step'; did you mean 'steps'"):
        read_recipe(path)


def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "nowhere.yaml")])
    assert caught.value.code == 2
    assert "no recipe" in capsys.readouterr().err


def test_the_embedded_recipe_reads():
    recipe = read_recipe(Path(__file__).parents[2] / "recipes" / "embedded" / "pretrain.yaml")
    held_out = recipe.held_out
    assert held_out.train_bytes + held_out.validation_bytes + held_out.test_bytes <= 300_000
