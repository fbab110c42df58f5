"""What lies in a folder of weights is read alike by every path, or refused in one line before any work."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils import prune

from prunus.checkpoint import check_finite, read_checkpoint, read_config, read_state, read_tokenizer, wrapper_of
from prunus.data import ASSETS, windows
from prunus.language import stages
from prunus.language.texts import evaluation_texts
from prunus.masks import Masks
from prunus.measure import perplexity
from prunus.recipe import LanguageRecipe
from prunus.run.inspect import inspect_model
from prunus.save import average_folders, load_info, save_model
from tests.systems.test_families import FAMILIES, NORMAL, WIDTH

Tensors = dict[str, Tensor]
TEXT = {"source": str(Path(__file__).parents[2] / "constraints.txt"), "part": (0, 0.2)}  # any short text


def _gemma4() -> tf.PreTrainedModel:
    types = ["sliding_attention", "full_attention"]
    more = {"global_head_dim": 8, "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "layer_types": types}
    return tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**{**NORMAL, **more, "head_dim": 8, "sliding_window": 4}))


MAKERS: dict[str, Callable[[], Any]] = {name: row[0] for name, row in FAMILIES.items()} | {"gemma4": _gemma4}


@torch.no_grad()
def written(folder: Path, model: Any) -> Path:
    """A folder of the model with random weights and stored buffers, and the tokenizer of the embedded model."""
    model.resize_token_embeddings(4096)
    generator = torch.Generator().manual_seed(0)
    stored = set(model.state_dict())
    for name, each in [*model.named_parameters(), *model.named_buffers()]:
        if name in stored and each.is_floating_point():
            each.normal_(1.0 if each.ndim < 2 else 0.0, 0.2, generator=generator)
    model.eval().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ASSETS / name, folder / name)
    return folder


def asked(folder: Path, **more: Any) -> LanguageRecipe:
    return LanguageRecipe.model_validate(
        {"model": str(folder), "evaluate": {"data": {"t": TEXT}, "window": 16}, **more}
    )


@pytest.mark.parametrize("family", MAKERS)
def test_every_path_reads_the_same_model(family: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "m", MAKERS[family]())
    cpu, found = torch.device("cpu"), []
    for streaming in (False, True):
        recipe = asked(folder, streaming=streaming)
        loaded = stages.load(recipe)
        found.append(stages.evaluate(loaded, recipe, cpu)["t"])
    plain = tf.AutoModelForCausalLM.from_pretrained(folder)
    tokens = evaluation_texts(recipe, plain, tf.AutoTokenizer.from_pretrained(folder))["t"]
    with torch.no_grad():
        found.append(perplexity(plain, tokens, window=16, batch_size=4))
    assert len(windows(tokens, 16)) > 5
    assert found[0] == found[1] == found[2]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("llama") / "m", tf.LlamaForCausalLM(tf.LlamaConfig(**NORMAL)))


def edit(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def variant(source: Path, to: Path, change: Callable[[Tensors], Tensors] | None = None, **keys: Any) -> Path:
    """A copy of a model with other tensors and keys of config.json."""
    shutil.copytree(source, to)
    if change is not None:
        save_file(change(load_file(source / "model.safetensors")), to / "model.safetensors", {"format": "pt"})
    edit(to, **keys)
    return to


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: each for key, each in tensors.items() if key != name}


def prefixed(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {prefix + key: each for key, each in tensors.items()}


def coded(tensors: Tensors) -> Tensors:
    """Eight-bit codes with a scale each."""
    scales = {key.replace("weight", "weight_scale"): torch.ones(1, 1) for key in tensors if "proj" in key}
    return {k: each.to(torch.float8_e4m3fn) if "proj" in k else each for k, each in tensors.items()} | scales


def put(name: str, value: float) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[3] = value
        return tensors

    return change


DOWN, HEAD, UP = "model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"
WRONG: dict[str, tuple[Callable[[Tensors], Tensors] | None, dict[str, Any], str]] = {
    "a tensor is missing": (without(DOWN), {}, rf"lacks 1 of the 21 tensors of LlamaForCausalLM, such as '{DOWN}'"),
    "the head is missing": (without(HEAD), {}, r"'lm_head.weight' \(if it shares .* tie_word_embeddings: true"),
    "a wrapper": (prefixed("module."), {}, r"all names begin with 'module\.', which a wrapper"),
    "wrappers": (prefixed("_orig_mod.module."), {}, r"all names begin with '_orig_mod\.module\.'"),
    "more layers": (None, {"num_hidden_layers": 4}, r"asks for 4 layers, the weights have 2.*they would be random"),
    "fewer layers": (None, {"num_hidden_layers": 1}, r"holds 9 tensors that LlamaForCausalLM has no place for"),
    "another shape": (
        lambda tensors: {**tensors, HEAD: torch.zeros(4104, WIDTH)}, {}, r"'lm_head.weight' has shape \(4104, 32\)",
    ),
    "quantised": (None, {"quantization_config": {"quant_method": "gptq"}}, r"is quantised \(gptq, says config.json\)"),
    "codes": (coded, {}, r"is quantised: '.*proj.weight' has 8 bits \(F8_E4M3\)"),
    "untied": (None, {"tie_word_embeddings": True}, r"ties 'lm_head.weight' to 'model.embed_tokens.weight', .* differ"),
    "nan": (put(HEAD, math.nan), {}, r"'lm_head.weight' holds 1 values that are NaN or infinite"),
    "infinity": (put(UP, -math.inf), {}, rf"'{UP}' holds 1 values that are NaN or infinite"),
    "a classifier": (
        lambda tensors: {**without(HEAD)(tensors), "score.weight": torch.zeros(2, WIDTH)},
        {"architectures": ["LlamaForSequenceClassification"]},
        r"lacks 1 of .*'lm_head.weight' \(config.json says LlamaForSequenceClassification\)",
    ),
    "a tied classifier": (
        lambda tensors: {**without(HEAD)(tensors), "score.weight": torch.zeros(2, WIDTH)},
        {"architectures": ["LlamaForSequenceClassification"], "tie_word_embeddings": True},
        r"no place for, such as 'score.weight' \(config.json says LlamaForSequenceClassification\)",
    ),
    "an encoder": (
        None, {"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"BertForMaskedLM .* sees those after it",
    ),
    "an encoder-decoder": (
        None,
        {"model_type": "bart", "architectures": ["BartForConditionalGeneration"]},
        r"says BartForConditionalGeneration, an encoder-decoder: .* in Python, prunus\.prune_in_turn",
    ),
    "no language model": (None, {"model_type": "vit"}, r"transformers has no causal language model"),
}  # fmt: skip


READ = {"a tensor is missing", "nan", "infinity"}  # those asked once the check of headers is over, or of both paths


@pytest.mark.parametrize(
    ("kind", "streaming"), [(kind, streaming) for kind in WRONG for streaming in {False, kind in READ}]
)
def test_what_is_not_the_model_of_its_config_is_refused(
    llama: Path, tmp_path: Path, kind: str, streaming: bool
) -> None:
    change, keys, message = WRONG[kind]
    recipe = asked(variant(llama, tmp_path / "m", change, **keys), streaming=streaming)
    with pytest.raises(ValueError, match=message) as refusal:
        stages.evaluate(stages.load(recipe), recipe, torch.device("cpu"))
    assert "\n" not in str(refusal.value)
    assert str(tmp_path / "m") in str(refusal.value) or kind == "no language model"


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


@pytest.mark.parametrize("kind", ["pointer", "half", "shard"])
def test_damaged_files_are_named_by_every_reader(llama: Path, tmp_path: Path, kind: str) -> None:
    folder = variant(llama, tmp_path / "m")
    file, error = folder / "model.safetensors", ValueError
    if kind == "pointer":
        file.write_bytes(POINTER)
        message = r"model\.safetensors is a git-LFS pointer, not the weights; run `git lfs pull`"
    elif kind == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        message = r"model\.safetensors is not a complete safetensors file: it has [\d,]+ bytes of [\d,]+; download"
    else:
        tf.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(folder, max_shard_size="300KB")
        file.unlink()
        shard = sorted(folder.glob("model-*.safetensors"))[1]
        shard.unlink()
        message, error = rf"lacks {shard.name}, named in model\.safetensors\.index\.json; download it again", OSError
    readers: list[Callable[[], Any]] = [
        lambda: stages.load(asked(folder)),
        lambda: stages.load(asked(folder, streaming=True)),
        lambda: inspect_model(folder),
        lambda: average_folders([folder, llama], tmp_path / "mean"),
    ]
    for read in readers:
        with pytest.raises(error, match=message):
            read()


def test_the_file_that_transformers_reads_is_the_one_that_counts(llama: Path, tmp_path: Path) -> None:
    folder = variant(llama, tmp_path / "m")
    index = {"weight_map": dict.fromkeys(load_file(folder / "model.safetensors"), "old.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in read_checkpoint(folder).files] == ["model.safetensors"]


def test_pickled_weights_are_read_without_running_code(llama: Path, tmp_path: Path) -> None:
    folder = variant(llama, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    found = [stages.load(asked(folder, streaming=streaming)) for streaming in (False, True)]
    numbers = [stages.evaluate(each, asked(folder), torch.device("cpu")) for each in found]
    plain = stages.evaluate(stages.load(asked(llama)), asked(llama), torch.device("cpu"))
    assert numbers == [plain, plain]


def test_values_that_are_not_finite_are_found_by_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, own = [], Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda self: asked.append(self) or own(self))
    many = {
        "ids": torch.tensor([1]),
        "none": torch.zeros(0),
        "a": torch.ones(3),
        "b": torch.ones(2, dtype=torch.bfloat16),
    }
    check_finite(many.items(), "here")
    assert len(asked) == 1
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=r"here: 'c' holds 1 values that are NaN or infinite"):
            check_finite({**many, "c": torch.tensor([0.0, wrong]), "d": torch.tensor([math.nan])}.items(), "here")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_without_its_model_is_said_to_be_one(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=rf"is an adapter alone \({name}\): load its model, merge it \(`prunus merge"):
        stages.load(asked(tmp_path))


def test_the_folder_of_a_run_is_said_to_hold_a_model(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "run" / "model")
    with pytest.raises(ValueError, match=r"is the folder of a run; give its model, '.*/run/model'"):
        read_config(tmp_path / "run")
    with pytest.raises(ValueError, match=r"give a folder of transformers, such as .*/run/model"):
        read_checkpoint(tmp_path / "run")


def test_an_adapter_beside_the_weights_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = variant(llama, tmp_path / "m")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"has an adapter beside its weights .* merge it"):
        stages.load(asked(folder))


def test_code_of_its_own_runs_only_when_it_is_trusted(llama: Path, tmp_path: Path) -> None:
    own = {"AutoConfig": "configuration_mine.Config", "AutoModelForCausalLM": "modeling_mine.Model"}
    folder = variant(llama, tmp_path / "m", None, model_type="mine", auto_map=own)
    marker = tmp_path / "ran"
    (folder / "configuration_mine.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig\nPath({str(marker)!r}).touch()\n"
        "class Config(LlamaConfig):\n    model_type = 'mine'\n"
    )
    (folder / "modeling_mine.py").write_text(
        "from transformers import LlamaForCausalLM\nfrom .configuration_mine import Config\n"
        "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    )
    with pytest.raises(ValueError, match=r"needs code of its own .* trust_remote_code: true"):
        stages.load(asked(folder))
    assert not marker.exists()
    cpu, trusted = torch.device("cpu"), asked(folder, trust_remote_code=True)
    plain = stages.evaluate(stages.load(asked(llama)), asked(llama), cpu)
    for streaming in (False, True):
        recipe = trusted.model_copy(update={"streaming": streaming})
        assert stages.evaluate(stages.load(recipe), recipe, cpu) == plain
    assert marker.exists()


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows_is_refused(llama: Path, tmp_path: Path) -> None:
    def cut(tensors: Tensors) -> Tensors:
        return {name: each[:4000] if len(each) == 4096 else each for name, each in tensors.items()}

    folder = variant(llama, tmp_path / "m", cut, vocab_size=4000)
    with pytest.raises(ValueError, match=r"tokenizer has 4096 ids \(the last is .*\), the embedding 4000 rows"):
        stages.load(asked(folder))


def test_a_special_token_above_the_embedding_is_let_pass(llama: Path, tmp_path: Path) -> None:
    folder = variant(llama, tmp_path / "m")
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(folder)
    assert len(stages.load(asked(folder)).tokenizer) == 4097
    tokenizer.add_tokens(["forgotten"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"tokenizer has 4098 ids \(the last is 'forgotten'\)"):
        stages.load(asked(folder))


def test_a_model_of_several_towers_is_taken_whole_unless_its_class_is_unknown(tmp_path: Path) -> None:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    text = {**NORMAL, **linear, "linear_value_head_dim": 8, "head_dim": 8, "num_hidden_layers": 4}
    seen = {"hidden_size": 32, "intermediate_size": 48, "depth": 1, "num_heads": 4, "patch_size": 8}
    config = tf.Qwen3_5Config(text_config=text, vision_config={**seen, "out_hidden_size": WIDTH})
    folder = written(tmp_path / "m", tf.Qwen3_5ForConditionalGeneration(config))
    assert type(stages.load(asked(folder)).model) is tf.Qwen3_5ForConditionalGeneration
    said = (folder / "config.json").read_text().replace("Qwen3_5ForConditionalGeneration", "Eyes")
    (folder / "config.json").write_text(said)
    for streaming in (False, True):
        with pytest.raises(ValueError, match=r"several towers \(Eyes\): .* would leave out"):
            stages.load(asked(folder, streaming=streaming))


def test_a_wrapper_is_found_by_what_it_hides() -> None:
    known = {"a.w", "a.b"}
    names = ["module.a.w", "module.a.b"]
    assert wrapper_of(names, lambda found: set(found) == known) == "module."
    assert wrapper_of(["a.w", "b.w"], lambda found: set(found) == known) == ""
    assert wrapper_of(["x.a.w", "y.a.b"], lambda found: set(found) == known) == ""


def test_members_of_a_mean_share_their_tokenizer_and_are_finite(llama: Path, tmp_path: Path) -> None:
    other = variant(llama, tmp_path / "other")
    found = json.loads((other / "tokenizer.json").read_text())
    vocabulary = found["model"]["vocab"]
    one, two = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"the tokenizers differ: '.*' is id 300 in .* and 301 in"):
        average_folders([llama, other], tmp_path / "mean")
    broken = variant(llama, tmp_path / "broken", put(HEAD, math.nan))
    with pytest.raises(ValueError, match=r"broken: 'lm_head.weight' holds 1 values that are NaN"):
        average_folders([llama, broken], tmp_path / "mean")
    coarse = variant(llama, tmp_path / "coarse", None, quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"coarse is quantised \(fp8"):
        average_folders([coarse, coarse], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [("sparsity", [1]), ("sparsity", None), ("sparsity", {"pruned": "half"}), ("checksums", [1]), ("files", {"a": 1})],
)
def test_an_edited_prunus_json_is_named(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "prunus.json").write_text(json.dumps({"format": 1, key: value}))
    with pytest.raises(ValueError, match=rf"prunus\.json says {key}: .*; it was damaged or edited: get it again"):
        load_info(tmp_path)


@pytest.mark.parametrize("said", [[1, 2], "a"])
def test_a_config_is_an_object(llama: Path, tmp_path: Path, said: object) -> None:
    source = variant(llama, tmp_path / "m", None)
    (source / "config.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"m/config\.json is no object: it was damaged or edited: get it again"):
        average_folders([llama, source], tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


@pytest.mark.parametrize("said", [7, [], [7], None])
def test_architectures_that_say_nothing_are_none(llama: Path, tmp_path: Path, said: object) -> None:
    assert stages.load(asked(variant(llama, tmp_path / "m", None, architectures=said)))


def test_what_is_saved_says_what_it_left_out(llama: Path, tmp_path: Path) -> None:
    def more(tensors: Tensors) -> Tensors:
        old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
        return {**tensors, **old, "model.norm.weight": tensors["model.norm.weight"].double()}

    source = variant(llama, tmp_path / "m", more)
    loaded = stages.load(asked(source))
    masks = Masks({UP: torch.zeros(48, WIDTH, dtype=torch.bool)})
    loaded.model.get_parameter(UP).data.fill_(-0.0)
    save_model(loaded.model, loaded.tokenizer, tmp_path / "saved", masks=masks, info={}, source=source)
    why = "no tensor of the model is made of it"
    assert load_info(tmp_path / "saved")["tensors"] == {
        "dropped": {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": why for i in range(2)},
        "cast": {"model.norm.weight": "F64 to F32"},
    }
    assert not load_file(tmp_path / "saved" / "model.safetensors")[UP].signbit().any()


def test_a_tensor_that_was_not_saved_is_missed(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = stages.load(asked(llama))

    def lose(folder: Path, **_: Any) -> None:
        save_file(without(UP)(load_file(llama / "model.safetensors")), folder / "model.safetensors")

    monkeypatch.setattr(loaded.model, "save_pretrained", lose)
    with pytest.raises(ValueError, match=rf"'{UP}' and 0 other tensors of the model are in no file"):
        save_model(loaded.model, loaded.tokenizer, tmp_path / "saved", masks=None, info={}, source=llama)
    assert not (tmp_path / "saved").exists()


def test_state_dicts_from_elsewhere_are_read_or_the_mend_is_named(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    own = network.state_dict()
    held = copy.deepcopy(network)
    prune.l1_unstructured(held[0], "weight", 0.5)
    kinds: dict[str, tuple[Any, str]] = {
        "module": ({f"module.{name}": each for name, each in own.items()}, r"all names begin with 'module\.', which"),
        "nested": ({"state_dict": own, "epoch": 3}, r"whole checkpoint, whose state dict is under 'state_dict'"),
        "whole": (network, r"is a pickle of more than tensors, perhaps a whole module.*torch\.save\(model\.state"),
        "masked": (held.state_dict(), r"'0\.weight_orig' and its mask: .* torch\.nn\.utils\.prune\.remove"),
        "list": ([1], r"holds a list, not a state dict"),
        "other": (torch.nn.Linear(3, 2).state_dict(), r"not of the recipe's network: 9 tensors differ"),
        "shape": ({**own, "0.bias": torch.ones(3)}, r"first '0\.bias' \(\(3,\) in the file, \(2,\) in the network\)"),
        "nan": ({**own, "0.bias": torch.tensor([math.nan, 1])}, r"'0\.bias' holds 1 values that are NaN"),
    }
    for name, (content, message) in kinds.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(ValueError, match=message):
            read_state(tmp_path / f"{name}.pt", own)
    torch.save(own, tmp_path / "right.pt")
    save_file(own, tmp_path / "right.safetensors")
    for name in ("right.pt", "right.safetensors"):
        found = read_state(tmp_path / name, own)
        assert all(torch.equal(found[key], each) for key, each in own.items())


@pytest.mark.parametrize("kind", ["single", "shards", "pickle"])
def test_of_a_hub_model_only_the_weights_that_count_are_fetched(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    hub, cache = variant(llama, tmp_path / "hub"), tmp_path / "cache"
    if kind == "shards":
        tf.AutoModelForCausalLM.from_pretrained(llama).save_pretrained(hub, max_shard_size="300KB")
        (hub / "model.safetensors").unlink()
    if kind == "pickle":
        torch.save(load_file(hub / "model.safetensors"), hub / "pytorch_model.bin")
        (hub / "model.safetensors").unlink()
    (hub / "extra.safetensors").write_bytes(b"of another program")

    def snapshot(name: str, allow_patterns: list[str]) -> str:
        assert name == f"owner/{kind}"
        cache.mkdir(exist_ok=True)
        for path in hub.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                shutil.copy(path, cache / path.name)
        return str(cache)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    recipe = asked(llama).model_copy(update={"model": f"owner/{kind}"})
    cpu = torch.device("cpu")
    assert stages.evaluate(stages.load(recipe), recipe, cpu) == stages.evaluate(stages.load(asked(llama)), recipe, cpu)
    assert {path.name for path in hub.iterdir()} - {path.name for path in cache.iterdir()} == {"extra.safetensors"}


@pytest.mark.parametrize("kind", ["gpt2", "qwen2", "gemma3_text", "gpt_neox", "bert"])
def test_the_blank_tokenizer_of_a_model_without_one_is_refused(tmp_path: Path, kind: str) -> None:
    """Transformers makes one of the kind's special tokens alone, to which each text is nothing, or unknown words."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(ValueError, match=r"has no tokenizer that opens \(it has special tokens alone\); copy"):
        read_tokenizer(tmp_path)
