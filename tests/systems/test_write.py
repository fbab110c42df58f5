"""Text that a model writes itself: what is drawn, what becomes a text, the folder after kills, what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MambaConfig, MambaForCausalLM

from prunus.data import read_texts
from prunus.language import prolonged, write
from prunus.recipe import Writing
from tests.conftest import VOCABULARY, byte_tokenizer, tiny_llama

writing: Any = sys.modules[write.__module__]  # behind the function of its name


def of(folder: Path, text: Any, **changes: Any) -> Writing:
    """Six rows in three parts."""
    asked = {"model": str(folder), "device": "cpu", "data": str(text), "tokens": 96, "length": 16, "prompt": 4}
    return Writing.model_validate(asked | {"batch_size": 2} | changes)


def parts(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if path.suffix in (".jsonl", ".json")}


def test_nearly_without_temperature_the_likeliest_words_are_written() -> None:
    """As by whole forward passes, without a cache and without dropout; each word depends on all before it."""
    config = tiny_llama().config
    config.update({"tie_word_embeddings": False, "initializer_range": 0.5, "attention_dropout": 0.5})
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).train()
    rows = torch.randint(VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(0))
    found = prolonged(model, rows, 20, temperature=1e-4, generator=torch.Generator().manual_seed(1))
    assert model.training
    with torch.no_grad():
        for _ in range(15):
            rows = torch.cat([rows, model.eval()(rows, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, rows)
    assert min(len(set(row)) for row in rows[:, 5:].tolist()) > 5


class Fixed(nn.Module):
    """A model that says the same of every place."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, **_: object) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1), past_key_values=())


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_words_are_as_frequent_as_the_model_says(temperature: float) -> None:
    logits, drawn = torch.tensor([0.0, 1.0, -1.0, 0.5, 2.0]), 500 * 20
    generator = torch.Generator().manual_seed(0)
    found = prolonged(
        Fixed(logits), torch.zeros(500, 1, dtype=torch.long), 21, temperature=temperature, generator=generator
    )
    expected = drawn * (logits / temperature).softmax(-1)
    counts = torch.bincount(found[:, 1:].flatten(), minlength=5)
    assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # of 4 degrees of freedom, once in a thousand


def test_models_that_cannot_write_are_refused() -> None:
    sizes = {"hidden_size": 8, "state_size": 4, "num_hidden_layers": 1, "time_step_rank": 2}
    mamba, begun = MambaForCausalLM(MambaConfig(vocab_size=8, **sizes)), torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(ValueError, match="MambaForCausalLM keeps no keys and values; writing needs"):
        prolonged(mamba, begun, 4)
    with pytest.raises(FloatingPointError, match="not finite; give --dtype bfloat16 or float32"):
        prolonged(Fixed(torch.tensor([0.0, float("inf")])), begun, 4)
    assert not prolonged(Fixed(torch.tensor([0.0, -float("inf")])), begun, 4).any()  # a word that is never said


def test_rows_are_cut_where_texts_end() -> None:
    """At every special token: one that learnt chats last may end its texts otherwise than its tokenizer says."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<|endoftext|>"})
    said = ["one</s>two  .</s></s>", "</s> \n</s>", "three<|endoftext|>für", "four"]
    rows = [tokenizer(text)["input_ids"] for text in said]
    rows[2] = rows[2][:-1]
    rows[3] = tokenizer("ü")["input_ids"][1:] + rows[3]
    found = [list(writing._texts(torch.tensor([row]), tokenizer)) for row in rows]
    assert found == [["one", "two  ."], [], ["three", "fü"], ["four"]]


def test_a_folder_is_a_text_of_recipes(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    found = write(of(tiny_folder, text_file), tmp_path / "out")
    assert found.pop("tokens/s") > 0
    assert found == {"folder": str(tmp_path / "out"), "rows": 6, "tokens": 96}
    texts = read_texts(tmp_path / "out")
    begun = "\n".join(text_file.read_text().splitlines())
    assert sum(text[:4] in begun for text in texts) >= 6
    kept = json.loads((tmp_path / "out" / "written.json").read_text())
    assert (kept["rows"], kept["tokens"], kept["asked"]["length"]) == (6, 96, 16)
    assert kept["device"].startswith("CPU, ")
    assert "resumed_on" not in kept


@pytest.fixture
def killed(tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What is left of a call that was killed in its second part."""
    own, calls = writing.prolonged, list[int]()

    def until(*arguments: Any, **how: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(*arguments, **how)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "prolonged", until)
        with pytest.raises(KeyboardInterrupt):
            write(of(tiny_folder, text_file), tmp_path / "killed")
    return tmp_path / "killed"


def test_a_killed_call_goes_on_with_the_same_bits(
    killed: Path, tiny_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    first, file = parts(killed), (killed / "part-00000.jsonl").stat().st_ino
    assert list(first) == ["inputs.json", "part-00000.jsonl", "written.json"]
    assert "tokens" not in json.loads(first["written.json"])
    write(of(tiny_folder, text_file), killed)
    write(of(tiny_folder, text_file), tmp_path / "whole")
    assert parts(killed) == parts(tmp_path / "whole")
    assert (killed / "part-00000.jsonl").stat().st_ino == file
    assert len(set(parts(killed).values())) == 5


def test_a_finished_folder_says_so_and_is_left_alone(
    tiny_folder: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out, asked = tmp_path / "out", of(tiny_folder, text_file)
    write(asked, out)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(writing, "load", None)
        patch.setattr(writing, "fitted", None)
        assert write(asked, out) == {"folder": str(out), "rows": 6, "tokens": 96}  # no speed of nothing
    assert f"{out} is finished: nothing is repeated" in caplog.text
    assert {path: path.read_bytes() for path in out.iterdir()} == before
    (out / "part-00001.jsonl").unlink()
    assert write(asked, out)["tokens"] == 96
    assert parts(out) == {path.name: found for path, found in before.items() if path.suffix in (".jsonl", ".json")}


def test_an_unfinished_folder_is_no_text(killed: Path, tiny_folder: Path, text_file: Path) -> None:
    """Neither by itself nor in a folder of several; somebody else's written.json says nothing about it."""
    for folder in (killed, killed.parent):
        with pytest.raises(ValueError, match=r"killed is not all written yet; give its `prunus write` again first"):
            read_texts(folder)
    with pytest.raises(ValueError, match=r"data: .*killed is not all written yet"):
        write(of(tiny_folder, killed), killed.parent / "other")
    write(of(tiny_folder, text_file), killed)
    assert read_texts(killed)
    (killed / "written.json").write_text('["by", "hand"]')
    assert read_texts(killed)


def test_a_folder_says_on_which_devices_it_was_written(
    killed: Path, tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "device_name", lambda _: "another")
    for _ in range(2):
        write(of(tiny_folder, text_file), killed)
        kept = json.loads((killed / "written.json").read_text())
        assert (kept["device"][:5], kept["resumed_on"]) == ("CPU, ", ["another"])
        (killed / "part-00001.jsonl").unlink()


def test_a_temperature_that_float32_does_not_divide_by_is_refused(tiny_folder: Path, text_file: Path) -> None:
    with pytest.raises(ValueError, match="temperature"):
        of(tiny_folder, text_file, temperature=1e-45)


def test_a_length_beyond_the_model_is_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^length: 4096 tokens, but '.*' was made for at most \d+; set length to \d+"):
        write(of(tiny_folder, text_file, tokens=8192, length=4096), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"length": 8}, {"temperature": 2.0}, {"batch_size": 3}])
def test_a_folder_that_was_begun_otherwise_is_refused(
    killed: Path, tiny_folder: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    before = parts(killed)
    monkeypatch.setattr(writing, "load", None)
    with pytest.raises(ValueError, match="killed was begun with another model, text or setting; give another folder"):
        write(of(tiny_folder, text_file, **change), killed)
    assert parts(killed) == before


def test_a_call_does_not_go_on_with_another_text(killed: Path, tiny_folder: Path, text_file: Path) -> None:
    before = text_file.read_bytes()
    text_file.write_text("Other plums.\n" * 90)
    try:
        with pytest.raises(ValueError, match=r"text.txt' was changed since .*killed was begun with it"):
            write(of(tiny_folder, text_file), killed)
    finally:
        text_file.write_bytes(before)


def test_folders_of_others_are_refused(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("years of it")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".prunus-run").write_text("A run of Prunus; ...")
    shutil.copy(text_file, tmp_path / "mine" / "text.txt")
    for out, message in (
        ("mine", r"is no text folder and has other files \('notes.txt', ...\)"),
        ("run", "run is the folder of a run, not of a text"),
    ):
        with pytest.raises(ValueError, match=message):
            write(of(tiny_folder, text_file), tmp_path / out)
    with pytest.raises(ValueError, match="which is read, lie in each other"):
        write(of(tiny_folder, tmp_path / "mine"), tmp_path / "mine" / "deep")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["notes.txt", "text.txt"]


@pytest.mark.parametrize("seed", [-1, 2**63 - 1])
def test_any_seed_is_taken(tiny_folder: Path, text_file: Path, tmp_path: Path, seed: int) -> None:
    write(of(tiny_folder, text_file, seed=seed), tmp_path / "out")
    assert len(set(parts(tmp_path / "out").values())) == 5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_writes_words_of_the_model_and_the_same_ones_again(dtype: torch.dtype) -> None:
    model, begun = tiny_llama().to("cuda", dtype), torch.randint(VOCABULARY, (64, 4), device="cuda")
    found = [prolonged(model, begun, 32, generator=torch.Generator("cuda").manual_seed(seed)) for seed in (0, 0, 1)]
    assert found[0].shape == (64, 32)
    assert found[0].device == begun.device
    assert torch.equal(found[0][:, :4], begun)
    assert 0 <= int(found[0].min()) <= int(found[0].max()) < VOCABULARY
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
