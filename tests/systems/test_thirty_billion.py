"""The benchmark of 30 billion parameters, tiny: every stage runs, what is saved is pruned, a killed solve goes on."""

from __future__ import annotations

import importlib.util
import json
import sys
import weakref
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM

from prunus.masks import Masks

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "thirty_billion.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("thirty_billion", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def arguments(script: ModuleType, folder: Path, *more: str) -> object:
    few = ["--device", "cpu", "--scale", "0.03", "--samples", "4", "--steps", "3", "--json", str(folder / "rows.json")]
    return script.parse(["--folder", str(folder), *few, *more])


def test_the_shape_is_that_of_opt_30b(script: ModuleType) -> None:
    config = script.shape(1.0)
    assert (config.hidden_size, config.ffn_dim, config.num_hidden_layers) == (7168, 28672, 48)
    assert (config.num_attention_heads, config.vocab_size, config.max_position_embeddings) == (56, 50272, 2048)
    values = sum(parameter.numel() for parameter in script.build_empty(config).parameters())
    assert values == 29_974_540_288


def test_every_stage_runs_and_reports(script: ModuleType, tmp_path: Path) -> None:
    rows = script.run(arguments(script, tmp_path, "--keep"))
    assert [row.name for row in rows] == list(script.STAGES)
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())] == list(script.STAGES)
    assert all(row.seconds > 0 and row.host_bytes > 10**7 for row in rows)
    masks = Masks.load(tmp_path / "pruned" / "masks.safetensors")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    masks.check(saved)
    assert masks.sparsity == 0.5
    assert len(masks) == 6 * saved.config.num_hidden_layers
    name = "model.decoder.layers.0.fc1.weight"
    assert saved.get_parameter(name).dtype == torch.bfloat16
    kept = masks[name]
    assert not torch.equal(saved.get_parameter(name)[kept], dense.get_parameter(name)[kept]), "MaskLoRA was merged"
    again = script.run(arguments(script, tmp_path, "--stages", "sparsegpt"))
    stored = [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())]
    assert sorted(stored) == sorted(script.STAGES), "rows of earlier calls stay, those of the same name do not"
    assert again[0].note.startswith(f"0 blocks solved, {saved.config.num_hidden_layers} found finished")


def test_a_call_without_prune_retrains_under_masks_of_magnitude(script: ModuleType, tmp_path: Path) -> None:
    killed = [tmp_path / "model" / "part-9", tmp_path / ".pruned.0123456789abcdef.partial"]
    for folder in killed:
        folder.mkdir(parents=True)
        (folder / "model.spool").write_bytes(b"left behind")
    killed[1].with_suffix(".lock").touch()
    script.run(arguments(script, tmp_path, "--stages", "make"))
    rows = script.run(arguments(script, tmp_path, "--stages", "load,norms,save", "--keep", "--steps", "5"))
    assert not any(folder.exists() for folder in killed)
    assert [row.name for row in rows] == ["load", "norms", "save"]
    assert "5 steps" in rows[1].note
    assert "more in the first two steps" in rows[1].note
    assert "100 steps would take" in rows[1].note
    assert Masks.load(tmp_path / "pruned" / "masks.safetensors").sparsity == 0.5


def test_the_rate_leaves_the_first_steps_out(script: ModuleType) -> None:
    pace = script.Pace("norms", torch.device("cpu"))
    pace.marks = [(2, 110.0), (4, 114.0), (5, 116.0)]  # begun at 100: 10 s for two steps of 2 s
    assert pace.seconds == 2.0
    assert pace.surplus(100.0) == 6.0


def test_the_model_is_freed_before_sparsegpt(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    seen: list[bool] = []
    load = script.load

    def remembered(*args: object) -> object:
        model = load(*args)
        alive.extend(weakref.ref(each) for each in model.parameters())
        return model

    monkeypatch.setattr(script, "load", remembered)
    monkeypatch.setattr(script, "solve", lambda *_: seen.append(any(each() is not None for each in alive)))
    script.run(arguments(script, tmp_path, "--keep"))
    assert alive
    assert seen == [False]


def test_a_stage_that_fails_leaves_its_row(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(script, "retrain", fail)
    with pytest.raises(MemoryError):
        script.run(arguments(script, tmp_path, "--stages", "make,load,norms"))
    stored = json.loads((tmp_path / "rows.json").read_text())
    assert [row["name"] for row in stored] == ["make", "load", "norms"]
    assert stored[2]["note"] == "failed: MemoryError: no room"
    assert "failed: MemoryError" in capsys.readouterr().out


def test_a_folder_without_room_for_the_checkpoint_is_refused(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 0

    monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: Full)
    with pytest.raises(OSError, match="the checkpoint takes"):
        script.run(arguments(script, tmp_path, "--stages", "make"))


def test_a_disk_without_room_for_two_gives_the_checkpoint_up(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        free = 0

    script.run(arguments(script, tmp_path, "--stages", "make"))
    monkeypatch.setattr(script.shutil, "disk_usage", lambda folder: Full)
    rows = script.run(arguments(script, tmp_path, "--first", "--blocks", "1"))
    assert rows[0].name == "sparsegpt"
    assert rows[0].note.startswith("1 blocks solved")
    assert "checkpoint deleted" in rows[-1].note
    assert not (tmp_path / "model").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").config.num_hidden_layers == 2
