"""Measured speed: of a model, of saved ones by the command, and in a run's result and page."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prunus.language.single import compress
from prunus.measure import speed
from prunus.run.cli import app
from prunus.run.page import compare_runs, write_report
from prunus.run.show import show_result
from prunus.save import save_model
from tests.conftest import tiny_llama
from tests.systems.test_compress import recipe

ASKED = {"prompt": 8, "tokens": 3, "seconds": 0.01}


def test_speed_counts_the_tokens_of_each_phase(monkeypatch: pytest.MonkeyPatch):
    """Of a clock by which a pass over n tokens takes n seconds, and a decoded one 10."""
    model, seen = tiny_llama().train(), []
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        assert not self.training
        seen.append(tuple(kwargs["input_ids"].shape))
        return forward(self, *args, **kwargs)

    class Clock:
        def __init__(self, what, setup, timer, globals):
            self.what, self.setup, self.names = what, setup, globals
            assert timer() <= timer()

        def timeit(self, _):
            exec(self.setup, self.names)
            seen.clear()
            exec(self.what, self.names)
            return sum(length if length > 1 else 10 for _, length in seen)

    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr(sys.modules[speed.__module__], "Timer", Clock)
    found = speed(model, batch_size=2, **ASKED)
    assert (found.prefill, found.decode, found.spread) == (2 * 8 / 8, 2 * 3 / 30, 0)
    assert model.training
    assert found.weights >= sum(each.nbytes for each in model.parameters())


def test_every_run_decodes_behind_the_prompt_alone(monkeypatch: pytest.MonkeyPatch):
    model, held = tiny_llama(), []
    forward = type(model).forward

    def watched(self, *args, past_key_values=None, **kwargs):
        held.append(0 if past_key_values is None else past_key_values.get_seq_length())
        return forward(self, *args, past_key_values=past_key_values, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    speed(model, prompt=60, tokens=4, seconds=0.01)  # all that the model takes
    assert set(held) == {0, 60, 61, 62, 63}


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="tokens is 0"):
        speed(tiny_llama(), tokens=0)
    with pytest.raises(ValueError, match="more than the model's 64"):
        speed(tiny_llama(), prompt=60, tokens=5)


def test_the_command_measures_models_beside_one_another(tiny_folder: Path, tmp_path: Path):
    save_model(tiny_llama(), None, tmp_path / "packed", masks=None, info={}, packed="zstd", source=tiny_folder)
    flags = [f"--{name}={value}" for name, value in ASKED.items()]
    models, out = [str(tiny_folder), str(tmp_path / "packed")], tmp_path / "found.json"
    result = CliRunner().invoke(app, ["measure", *models, *flags, "--set", "device=cpu", "--out", str(out)])
    assert "decode" in result.output, result.exception
    dense, packed = json.loads(out.read_text())
    assert dense["parameters"] == packed["parameters"]
    assert dense["decode"] > 0 < packed["prefill"]
    assert dense["file"] == (tiny_folder / "model.safetensors").stat().st_size
    assert packed["file"] == (tmp_path / "packed" / "packed.safetensors").stat().st_size


def test_a_run_measures_before_and_after(tiny_folder: Path, text_file: Path, tmp_path: Path):
    evaluate = {"data": {"text": str(text_file)}, "window": 32, "batch_size": 128, "speed": ASKED}
    result = compress(recipe(tiny_folder, text_file, tmp_path / "run", retrain=None, evaluate=evaluate))
    assert set(result["speed"]) == {"dense", "now"}
    assert "Measured speed" in write_report(tmp_path / "run").read_text()


def test_a_streamed_model_is_measured_when_it_is_in_memory(tiny_folder: Path, text_file: Path, tmp_path: Path):
    evaluate = {"data": {"text": str(text_file)}, "window": 32, "batch_size": 128, "speed": ASKED}
    result = compress(recipe(tiny_folder, text_file, tmp_path / "run", streaming=True, evaluate=evaluate))
    assert set(result["speed"]) == {"now"}
    show_result(result, tmp_path / "run")
    compare_runs([tmp_path / "run", tmp_path / "run"], tmp_path / "both.html")


def test_speed_needs_the_model_in_memory(tiny_folder: Path, text_file: Path, tmp_path: Path):
    evaluate = {"data": {"text": str(text_file)}, "speed": True}
    with pytest.raises(ValueError, match=r"evaluate\.speed: the whole model must be in memory"):
        recipe(tiny_folder, text_file, tmp_path, retrain=None, streaming=True, evaluate=evaluate)
