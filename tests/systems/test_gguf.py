"""A GGUF file is dequantised into an ordinary folder, and every path reads that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers as tf
from safetensors import SafetensorError

from prunus.checkpoint import plain, read_checkpoint
from prunus.language import stages
from prunus.language.single import compress
from prunus.recipe import LanguageRecipe
from prunus.run.inspect import inspect_model
from prunus.run.show import show_inspection
from tests.conftest import byte_tokenizer, tiny_llama

gguf = pytest.importorskip("gguf")

NAMES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip


def llama(seed: int = 0) -> tf.LlamaForCausalLM:
    """The tiny model with widths that blocks of 32 entries divide."""
    torch.manual_seed(seed)
    changes = {"intermediate_size": 64, "vocab_size": 288}
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**tiny_llama().config.to_dict(), **changes})).eval()


def rotated(name: str, weight: torch.Tensor, config: Any) -> torch.Tensor:
    """Rows of queries and keys as llama.cpp has them: the two numbers of a rotation beside each other."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name)
    if heads is None:
        return weight
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write(file: Path, model: Any, kind: str = "Q8_0", without: str = "") -> None:
    """A model of Llama's kind as llama.cpp stores it: matrices in blocks of 32 entries, norms in float32."""
    config, tokenizer = model.config, byte_tokenizer()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    tokens += ["pl", "um"]
    tokens += [f"<unused{place}>" for place in range(config.vocab_size - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(["p l", "u m"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    own = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    for place in range(config.num_hidden_layers):
        own |= {f"blk.{place}.{name}": f"model.layers.{place}.{ours}" for name, ours in NAMES.items()}
    state = model.state_dict()
    own.pop(without, None)
    for name, ours in own.items():
        weight = rotated(name.rpartition(".")[2], state[f"{ours}.weight"], config).numpy()
        stored = gguf.GGMLQuantizationType[kind if weight.ndim > 1 else "F32"]
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PRUNUS_CACHE", str(tmp_path / "kept"))
    write(tmp_path / "m.gguf", llama())
    return tmp_path / "m.gguf"


def asked(file: Path, text: Path, **more: Any) -> LanguageRecipe:
    evaluate = {"data": {"t": {"source": str(text), "part": (0, 0.2)}}, "window": 32}
    calibrate = {"data": str(text), "samples": 4, "length": 32}
    return LanguageRecipe.model_validate(
        {"model": str(file), "device": "cpu", "evaluate": evaluate, "calibrate": calibrate, **more}
    )


def test_every_path_reads_the_dequantised_model(file: Path, text_file: Path) -> None:
    dequantise = tf.GgufConfig(dequantize=True)
    own = tf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, quantization_config=dequantise)
    found = []
    for streaming in (False, True):
        recipe = asked(file, text_file, streaming=streaming)
        loaded = stages.load(recipe)
        found.append(stages.evaluate(loaded, recipe, torch.device("cpu"))["t"])
    loaded = stages.Loaded(own.eval(), tf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), None)
    assert found[0] == found[1] == stages.evaluate(loaded, recipe, torch.device("cpu"))["t"]
    stored = read_checkpoint(file).tensors
    assert all(torch.equal(stored[name].read(), each) for name, each in own.state_dict().items() if name in stored)
    assert {name for name in own.state_dict() if name not in stored} == {"lm_head.weight"}
    near = llama().state_dict()["model.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(stored["model.layers.0.self_attn.q_proj.weight"].read(), near, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_0", "Q4_0", "Q4_1", "Q5_1"])
def test_zeros_of_a_file_are_counted_as_its_type_gives_them_back(tmp_path: Path, kind: str, capsys) -> None:
    """Types with a minimum for each block lose them, and that is said."""
    model = llama()
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight[torch.rand_like(weight) < 0.6] = 0
    write(tmp_path / "m.gguf", model, kind)
    found = inspect_model(tmp_path / "m.gguf")
    row = next(row for row in found if row.name == "blk.1.ffn_down.weight")
    assert (row.shape, row.dtype) == (tuple(weight.shape), kind)
    show_inspection(tmp_path / "m.gguf", found)
    said = " ".join(capsys.readouterr().out.split())
    if kind in ("Q4_1", "Q5_1"):
        assert row.zeros < (weight == 0).sum() / 4
        assert f"{kind} does not keep zeros" in said
    else:
        assert row.zeros >= (weight == 0).sum()  # small weights may be rounded to zero as well
        assert "does not keep" not in said
    assert found.bytes == (tmp_path / "m.gguf").stat().st_size
    (tmp_path / "b.gguf").write_bytes(b"plums" * 9)
    with pytest.raises(ValueError, match=r"b\.gguf' is no GGUF file that opens"):
        inspect_model(tmp_path / "b.gguf")


def test_both_roads_save_one_ordinary_model(file: Path, text_file: Path, tmp_path: Path) -> None:
    saved = []
    for name, streaming in (("memory", False), ("streamed", True)):
        compress(asked(file, text_file, streaming=streaming, out=str(tmp_path / name)))
        folder = tmp_path / name / "model"
        assert "quantization" not in (folder / "config.json").read_text()
        saved.append(tf.AutoModelForCausalLM.from_pretrained(folder))
    one, other = (each.state_dict() for each in saved)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (one["model.layers.0.mlp.up_proj.weight"] == 0).float().mean() == 0.5


def test_a_file_is_dequantised_once_and_anew_when_it_is_another(file: Path) -> None:
    folder = plain(file)
    (folder / "mark").touch()
    assert plain(file) == folder
    assert (folder / "mark").exists()
    write(file, llama(1), "Q4_0")
    assert plain(file) != folder


def test_two_files_with_one_head_are_two_models(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Archives and packages give all files one time, and a tuned model has the other's words before its weights."""
    monkeypatch.setattr("prunus.checkpoint.gguf._ENDS", 1 << 12)
    opened = Mock(return_value=(llama(), byte_tokenizer()))
    monkeypatch.setattr("prunus.checkpoint.gguf._opened", opened)
    data, place = file.read_bytes(), file.stat()
    folder = plain(file)
    file.write_bytes(data[:-8] + bytes(8))
    os.utime(file, ns=(place.st_atime_ns, place.st_mtime_ns))
    assert plain(file) != folder
    assert opened.call_count == 2


def test_a_cache_that_cannot_be_written_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mock(save_pretrained=Mock(side_effect=SafetensorError("I/O error: No space left on device (os error 28)")))
    monkeypatch.setattr("prunus.checkpoint.gguf._opened", Mock(return_value=(model, byte_tokenizer())))
    with pytest.raises(OSError, match=r"kept/models/\w+ cannot be written: .*No space left.*; PRUNUS_CACHE names"):
        plain(file)
    monkeypatch.setenv("PRUNUS_CACHE", str(file))
    with pytest.raises(OSError, match=r"m\.gguf/models'; PRUNUS_CACHE names"):
        plain(file)


@pytest.mark.parametrize("content", [b"", b"plums" * 99, None])
def test_a_damaged_file_is_named(file: Path, text_file: Path, content: bytes | None) -> None:
    file.write_bytes(file.read_bytes()[:20000] if content is None else content)
    with pytest.raises(ValueError, match=r"m\.gguf' is no GGUF file of a causal language model that opens \("):
        stages.load(asked(file, text_file))
    assert not [path for path in (file.parent / "kept" / "models").iterdir() if path.suffix != ".lock"]


def test_a_tensor_that_is_missing_is_no_random_one(file: Path, text_file: Path) -> None:
    write(file, llama(), without="blk.1.ffn_up")
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing; give a folder"):
        stages.load(asked(file, text_file))
