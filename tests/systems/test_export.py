"""A saved model is an ordinary Hugging Face folder: it reloads bit-equal with nothing of ours."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from prunus.adapt import adapt
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.prune import prune
from prunus.save import ShardWriter, load_info, load_model, save_model, save_tensors
from prunus.save.folder import model_card

SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 40,
    "max_position_embeddings": 32,
}


def llama(**options):
    torch.manual_seed(0)
    config = LlamaConfig(intermediate_size=24, num_key_value_heads=1, **SMALL, **options)
    return LlamaForCausalLM(config).eval()


def pruned(model, suffix="up_proj.weight"):
    """Masks of every second entry of the layers named, applied."""
    masks = {}
    for name, weight in model.named_parameters():
        if name.endswith(suffix):
            mask = torch.zeros(weight.shape, dtype=torch.bool)
            mask.view(-1)[::2] = True
            masks[name] = mask
            weight.data.mul_(mask)
            weight.data[~mask] = 0.0
    return Masks(masks)


def assert_same(model, again):
    state = again.state_dict()
    assert set(state) == set(model.state_dict())
    for name, value in model.state_dict().items():
        assert state[name].dtype == value.dtype
        assert torch.equal(state[name], value), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", [4e9, 6000])
def test_reload_is_bit_equal(tmp_path, dtype, tied, shard):
    model = llama(tie_word_embeddings=tied).to(dtype)
    masks = pruned(model)
    saved = save_model(
        model, None, tmp_path / "out", masks=masks, info={"pattern": "unstructured"}, max_shard_bytes=shard
    )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same(model, again)
    assert ("model.safetensors.index.json" in saved.files) == (shard < 1e6)
    stored = sum(load_file(f).keys().__len__() for f in (tmp_path / "out").glob("model*.safetensors"))
    assert stored == len(model.state_dict()) - tied
    assert Masks.load(tmp_path / "out" / "masks.safetensors") == masks


def test_experts_are_saved_one_by_one_and_reload(tmp_path):
    torch.manual_seed(0)
    config = MixtralConfig(intermediate_size=24, num_key_value_heads=1, num_local_experts=3, **SMALL)
    model = MixtralForCausalLM(config).eval()
    save_model(model, None, tmp_path / "out", masks=None, info={})
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert any("experts.2." in name for name in names)  # what other programs expect to find
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


BESIDE = ("tekken.json", "NOTICE.txt", "USE_POLICY.md", "additional_chat_templates/tools.jinja")


def saved_source(tmp_path, model):
    source = tmp_path / "source"
    model.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config, indent=7) + "\n\n")  # bytes that no library writes
    (source / "tokenizer_config.json").write_text('{"mine":  true}')
    for name in BESIDE:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(f"{name}, as it was")
    for name in ("notes.bin", "training_log.json", "README.md"):
        (source / name).write_text("not to be copied")
    return source


def test_config_and_small_files_are_the_sources_bytes(tmp_path):
    source = saved_source(tmp_path, llama())
    model = AutoModelForCausalLM.from_pretrained(source)
    model.config.use_cache = False  # set by training, no property of the model
    saved = save_model(model, None, tmp_path / "out", masks=None, info={}, source=source)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", *BESIDE):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not {"notes.bin", "training_log.json"} & set(saved.files)
    assert "not to be copied" not in (tmp_path / "out" / "README.md").read_text()
    assert "sparsity_config" not in (tmp_path / "out" / "config.json").read_text()


class Marked:
    """What transformers leaves on a model that it read from a quantised file."""

    def __init__(self, method):
        self.quantization_config = type("Config", (), {"quant_method": method, "to_dict": lambda self: {"bits": 4}})()

    def is_serializable(self):
        return False


def test_a_dequantised_gguf_model_is_saved_as_dense(tmp_path):
    model = llama()
    model.hf_quantizer = Marked("gguf")
    model.config.quantization_config = model.hf_quantizer.quantization_config
    before = dict(vars(model.config))
    save_model(model, None, tmp_path / "out", masks=None, info={})
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    assert isinstance(model.hf_quantizer, Marked)
    assert vars(model.config) == before
    model.hf_quantizer = None
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_a_quantised_model_is_refused(tmp_path):
    model = llama()
    model.hf_quantizer = Marked("awq")
    with pytest.raises(ValueError, match="quantised"):
        save_model(model, None, tmp_path / "out", masks=None, info={})
    with pytest.raises(ValueError, match=r"is quantised \(awq\)"):
        prune(model, sparsity=0.5)


def test_config_changes_only_in_added_biases_and_dtype(tmp_path):
    source = saved_source(tmp_path, llama())
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.config.attention_bias = True
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear = getattr(layer.self_attn, name)
            linear.bias = nn.Parameter(torch.randn(linear.out_features).bfloat16())
    save_model(model, None, tmp_path / "out", masks=None, info={}, source=source)
    before, after = (json.loads((p / "config.json").read_text()) for p in (source, tmp_path / "out"))
    assert {key for key in after if after[key] != before.get(key)} == {"attention_bias", "dtype"}
    assert set(after) == set(before)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))


def test_streamed_tensors_make_the_same_model(tmp_path):
    model = llama(tie_word_embeddings=True)
    source = saved_source(tmp_path, model)
    masks = pruned(model)
    named = ((name, value) for name, value in model.state_dict().items() if name != "lm_head.weight")
    save_tensors(named, None, tmp_path / "out", masks=masks, info={}, source=source, max_shard_bytes=6000)
    assert_same(model, AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_info_says_what_was_done(tmp_path):
    model = OPTForCausalLM(OPTConfig(ffn_dim=24, word_embed_proj_dim=16, **SMALL))
    masks = pruned(model, "fc1.weight")
    info = {"pattern": "unstructured", "recipe": {"sparsity": 0.5}, "metrics": {"perplexity": {"dense": 12.5}}}
    saved = save_model(model, None, tmp_path / "out", masks=masks, info=info)
    found = load_info(tmp_path / "out")
    assert found["format"] == 1
    assert found["recipe"] == {"sparsity": 0.5}
    assert found["sparsity"]["pruned"] == 0.5
    assert found["sparsity"]["layers"]["model.decoder.layers.1.fc1.weight"] == 0.5
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "as large as those of the dense model" in card
    assert "| perplexity, dense | 12.50 |" in card
    assert "## Results" not in model_card("model", {"metrics": {"perplexity": {}}})
    assert "as large" in saved.note
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert saved.weight_bytes == weights  # masks are not weights


def test_a_broken_mask_is_not_saved(tmp_path):
    model = llama()
    masks = pruned(model)
    model.model.layers[1].mlp.up_proj.weight.data.add_(1.0)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj"):
        save_model(model, None, tmp_path / "out", masks=masks, info={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("train", ["mask_lora", "norms"])
def test_what_an_adapter_trained_is_not_left_behind(tmp_path, train):
    model = llama().bfloat16()
    masks = prune(model, sparsity=0.5)
    adaptation = adapt(model, [train], masks=masks, views=find_layers(model), rank=2)
    with pytest.raises(ValueError, match=r"is adapted .*: call merge_"):
        save_model(model, None, tmp_path / "out", masks=masks, info={})
    adaptation.merge_()
    save_model(model, None, tmp_path / "out", masks=masks, info={})


def test_a_compiled_model_is_saved_as_the_ordinary_one(tmp_path):
    model = llama()
    compiled = torch.compile(model, backend="eager")
    save_model(compiled, None, tmp_path / "out", masks=prune(compiled, sparsity=0.5), info={})
    again = load_model(tmp_path / "out")
    assert_same(model, again)
    Masks.load(tmp_path / "out" / "masks.safetensors").check(again)


def test_only_our_own_folders_are_replaced(tmp_path):
    model = llama()
    out = tmp_path / "out"
    out.mkdir()
    save_model(model, None, out, masks=None, info={"turn": 1})
    save_model(model, None, out, masks=None, info={"turn": 2}, max_shard_bytes=6000)
    assert load_info(out)["turn"] == 2
    assert not (out / "model.safetensors").exists()  # nothing of the old save is left
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (out / "prunus.json").unlink()
    with pytest.raises(ValueError, match="so it is not replaced"):
        save_model(model, None, out, masks=None, info={})
    with pytest.raises(FileNotFoundError, match="not a model saved by Prunus"):
        load_info(out)


def test_a_failed_save_leaves_the_old_model(tmp_path):
    model = llama()
    save_model(model, None, tmp_path / "out", masks=None, info={"turn": 1})

    def tensors():
        yield "a", torch.ones(3)
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        save_tensors(tensors(), None, tmp_path / "out", masks=None, info={}, source="owner/name")
    assert load_info(tmp_path / "out")["turn"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["out", "out/deep", ""])
def test_a_model_is_not_saved_over_what_it_came_from(tmp_path, name):
    save_model(llama(), None, tmp_path / "out", masks=None, info={"turn": 1})
    with pytest.raises(ValueError, match=r"which is read, lie in each other|so it is not replaced"):
        save_model(llama(), None, tmp_path / name, masks=None, info={}, source=tmp_path / "out")
    assert load_info(tmp_path / "out")["turn"] == 1


def test_newer_format_is_refused(tmp_path):
    (tmp_path / "prunus.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99"):
        load_info(tmp_path)


def tensors_of_many_kinds():
    generator = torch.Generator().manual_seed(0)
    return {
        "z.half": torch.randn(3, generator=generator).half(),  # 6 bytes: what follows must still be aligned
        "a.bool": torch.tensor([True, False, True]),
        "b.double": torch.randn(2, 2, generator=generator).double(),
        "c.scalar": torch.tensor(2.5),
        "d.empty": torch.empty(0, 4),
        "e.strided": torch.randn(4, 6, generator=generator).t(),
        "f.brain": torch.randn(5, generator=generator).bfloat16(),
        "g.long": torch.arange(7),
    }


@pytest.mark.parametrize("writers", [1, 3])
@pytest.mark.parametrize("limit", [1, 64, 100, 4e9])
def test_shards_hold_every_tensor_within_the_limit(tmp_path, limit, writers):
    tensors = tensors_of_many_kinds()
    with ShardWriter(tmp_path, max_shard_bytes=limit, writers=writers) as writer:
        for name, value in tensors.items():
            writer.write(name, value)
    files = sorted(tmp_path.glob("*.safetensors"))
    found = {}
    for file in files:
        part = load_file(file)
        assert sum(t.nbytes for t in part.values()) <= limit or sum(t.nbytes > 0 for t in part.values()) == 1
        found |= part
        with safe_open(file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt"}
    assert set(found) == set(tensors)
    assert all(torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors.items())
    names = {p.name for p in tmp_path.iterdir()}
    if limit == 4e9:
        assert names == {"model.safetensors"}
    else:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
        assert names == {p.name for p in files} | {"model.safetensors.index.json"}


def test_shards_grow_side_by_side_once_one_is_full(tmp_path):
    with ShardWriter(tmp_path, max_shard_bytes=16, writers=2) as writer:
        for name in "abcdefgh":
            writer.write(name, torch.zeros(1))
        assert len(writer._open) == 2
    shards = [set(load_file(file)) for file in sorted(tmp_path.glob("*.safetensors"))]
    assert shards == [set("abcd"), {"e", "g"}, {"f", "h"}]


def test_a_write_that_fails_is_raised_and_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr("prunus.save.shards._append", fail)
    with pytest.raises(OSError, match="no space"), ShardWriter(tmp_path, writers=2) as writer:
        writer.write("a", torch.zeros(2))
    assert list(tmp_path.iterdir()) == []


def test_tensors_are_aligned(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for name, value in tensors_of_many_kinds().items():
            writer.write(name, value)
    raw = (tmp_path / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    del header["__metadata__"]
    sizes = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "BOOL": 1}
    assert all((start + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0 for entry in header.values())


def test_shard_writer_refuses_what_it_cannot_write(tmp_path):
    writer = ShardWriter(tmp_path)
    with pytest.raises(ValueError, match="no tensor"):
        writer.close()
    writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="'a' was written twice"):
        writer.write("a", torch.zeros(2))
    with pytest.raises(ValueError, match="meta device"):
        writer.write("b", torch.empty(2, device="meta"))
    with pytest.raises(ValueError, match="complex64"):
        writer.write("c", torch.zeros(2, dtype=torch.complex64))
    writer.abort()
    assert list(Path(tmp_path).iterdir()) == []
