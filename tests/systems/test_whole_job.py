"""The whole job on every kind of model: what is in the saved folder, by checks that share no code with the package."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from typer.testing import CliRunner

from prunus.checkpoint import read_checkpoint
from prunus.data import ASSETS, read_texts, tokenize
from prunus.language import stages
from prunus.language.single import compress
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.measure.perplexity import perplexity
from prunus.recipe import Recipe, parse
from prunus.run.cli import app
from tests.conftest import VOCABULARY, byte_tokenizer

IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NORMAL: dict[str, Any] = IDS | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
OPT: dict[str, Any] = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4} | IDS
MODELS: dict[str, Any] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**NORMAL, num_local_experts=8, num_experts_per_tok=2)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**IDS, n_embd=32, n_layer=2, n_head=4, n_positions=64)),
    "llama-tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**NORMAL, tie_word_embeddings=True)),
    "llama-bf16": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**NORMAL)).bfloat16(),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**IDS, hidden_size=32, n_layer=2, n_head=4)),
    "opt-fp16": lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, max_position_embeddings=64, dropout=0.0)).half(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build()
        if name == "mixtral":
            _starve(model)
        model.save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return {name: root / name for name in MODELS}


def _starve(model: nn.Module) -> None:
    """Experts 6 and 7 of the first block get no token: three opposite pairs always hold two positive logits."""
    gate = model.get_parameter("model.layers.0.mlp.gate.weight").data
    gate[3:6] = -gate[:3]
    gate[6:] = 0


def job(model: Path, text: Path, out: Path, **changes: Any) -> Recipe:
    retrain = {"data": str(text), "steps": 6, "batch_size": 4, "length": 32, "lr": 1e-2, "rank": 4}
    raw = {
        "model": str(model),
        "device": "cpu",
        "calibrate": {"data": str(text), "samples": 4, "length": 32, "batch_size": 2},
        "retrain": retrain | changes.pop("retrain", {}) if "retrain" not in changes or changes["retrain"] else None,
        "evaluate": {"data": {"text": str(text)}, "window": 32, "batch_size": 128},
        "out": str(out),
    }
    return parse(raw | changes, Recipe, "test")


def matrices(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(parameter, out x in matrix) of attention, MLP and experts, by the names and layouts these families have."""
    for name, value in model.named_parameters():
        block = ".layers." in name or ".h." in name
        if not block or value.ndim < 2 or "gate.weight" in name or "router" in name:
            continue
        stack = value if value.ndim == 3 else value[None]
        for matrix in stack:
            yield name, matrix.detach().T if isinstance(model, tf.GPT2LMHeadModel) else matrix.detach()


def zeros(matrix: Tensor) -> Tensor:
    """Where a matrix is exactly +0.0."""
    return (matrix == 0) & ~torch.signbit(matrix)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Tensor]]:
    """The state of the model at each evaluation of a run; the last is the merged model."""
    states: list[dict[str, Tensor]] = []

    def measure(model: nn.Module, *args: Any, **kwargs: Any) -> float:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return perplexity(model, *args, **kwargs)

    monkeypatch.setattr(stages, "perplexity", measure)
    return states


@pytest.mark.parametrize(
    "prune",
    [{"criterion": "wanda", "pattern": "2:4"}, {"criterion": "sparsegpt", "sparsity": 0.5}],
    ids=["2:4", "50%"],
)
@pytest.mark.parametrize("family", MODELS)
@pytest.mark.filterwarnings("ignore:.*saw no calibration token:UserWarning")
def test_prune_retrain_save_and_reload(
    family: str, prune: dict[str, Any], folders: dict[str, Path], text_file: Path, tmp_path: Path, measured: list[Any]
) -> None:
    dtype = "float16" if family == "opt-fp16" else "auto"
    result = compress(job(folders[family], text_file, tmp_path / "run", prune=prune, dtype=dtype))
    found = {stage: value["text"] for stage, value in result["perplexity"].items()}
    assert found["merged"] < 0.95 * found["pruned"]
    assert found["merged"] == pytest.approx(found["retrained"], rel=1e-3 if "16" in family else 1e-5)

    saved = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    dense = tf.AutoModelForCausalLM.from_pretrained(folders[family])
    assert saved.dtype == dense.dtype
    merged = measured[-1]
    assert all(torch.equal(value, merged[name].to(value.dtype)) for name, value in saved.state_dict().items())
    count = 0
    for (name, matrix), (_, before) in zip(matrices(saved), matrices(dense), strict=True):
        count += 1
        assert not torch.equal(matrix, before), name
        if "pattern" in prune:
            groups = zeros(matrix).view(matrix.shape[0], -1, 4)
            assert bool((groups.sum(-1) == 2).all()), name
        else:
            assert int(zeros(matrix).sum()) == matrix.numel() // 2, name
    assert count == {"mixtral": 2 * (4 + 16), "gpt2": 8, "bloom": 8, "opt-fp16": 12}.get(family, 14)
    masks = Masks.load(tmp_path / "run" / "model" / "masks.safetensors")
    assert sum(mask.numel() for mask in masks.values()) == sum(matrix.numel() for _, matrix in matrices(saved))
    if prune["criterion"] == "wanda":  # what a score keeps is kept as it was
        assert all(torch.equal(measured[1][name][mask], dense.state_dict()[name][mask]) for name, mask in masks.items())
    untouched = set(merged) - set(masks) - {"lm_head.weight"}
    assert all(torch.equal(merged[name], dense.state_dict()[name]) for name in untouched)


@pytest.mark.parametrize("criterion", ["wanda", "ria", "sparsegpt", "frank_wolfe"])
def test_experts_have_their_own_statistics_and_one_without_tokens_falls_back(
    criterion: str, folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    asked = job(folders["mixtral"], text_file, tmp_path, prune={"criterion": criterion, "pattern": "2:4"}, retrain=None)
    with pytest.warns(UserWarning, match=f"saw no calibration token.*{criterion} falls back to magnitude") as caught:
        result = compress(asked)
    stacks = [f"model.layers.0.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    unseen = {f"{stack}[{expert}]" for stack in stacks for expert in (6, 7)}
    assert {str(each.message).split("'")[1] for each in caught} == unseen
    assert set(result["pruning"]["blocks"][0]["fallback"]) == unseen
    assert not result["pruning"]["blocks"][1]["fallback"]
    dense = tf.AutoModelForCausalLM.from_pretrained(folders["mixtral"])
    saved = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for stack in stacks:
        before, after = dense.get_parameter(stack).detach(), saved.get_parameter(stack).detach()
        size = before.abs().unflatten(-1, (-1, 4))
        magnitude = (size >= size.topk(2, dim=-1).values[..., -1:]).flatten(-2) * before
        same = [torch.equal(after[expert], magnitude[expert]) for expert in range(8)]
        assert same == [False] * 6 + [True] * 2


WAYS = [
    (criterion, way)
    for criterion in ("magnitude", "random", "wanda", "ria", "sparsegpt", "frank_wolfe")
    for way in ("row", "layer", "model", "owl", "2:4", "4:8", "1:4")
    if way != "model" or criterion not in ("sparsegpt", "frank_wolfe")
]


@pytest.mark.parametrize(("criterion", "way"), WAYS)
def test_every_criterion_reaches_every_pattern_exactly(
    criterion: str, way: str, folders: dict[str, Path], text_file: Path
) -> None:
    prune: dict[str, Any] = {"criterion": criterion}
    prune |= {"pattern": way} if ":" in way else {"sparsity": 0.37}
    prune |= {"allocation": way} if way == "owl" else {"scope": way} if way in ("row", "layer", "model") else {}
    asked = job(folders["llama-tied"], text_file, Path("unused"), prune=prune, retrain=None)
    loaded = stages.load(asked)
    stages.prune(loaded, asked, torch.device("cpu"))
    found = [matrix for _, matrix in matrices(loaded.model)]
    total = sum(matrix.numel() for matrix in found)
    if ":" in way:
        n, m = map(int, way.split(":"))
        assert all(int((matrix.unflatten(1, (-1, m)) != 0).sum(-1).max()) == n for matrix in found)
        assert all(int(zeros(matrix).sum()) * m == matrix.numel() * (m - n) for matrix in found)
    elif way in ("model", "owl"):
        assert sum(int(zeros(matrix).sum()) for matrix in found) == round(0.37 * total)
    else:
        assert all(int(zeros(matrix).sum()) == round(0.37 * matrix.numel()) for matrix in found)
    if way == "row":
        counts = [zeros(matrix).sum(1) for matrix in found]
        assert all(int(count.max() - count.min()) <= 1 for count in counts)


def test_a_head_that_is_tied_stays_dense_and_in_one_piece(
    folders: dict[str, Path], text_file: Path, tmp_path: Path
) -> None:
    asked = job(folders["llama-tied"], text_file, tmp_path, retrain={"train": ["head", "norms"]})
    compress(asked)
    saved = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert saved.lm_head.weight is saved.model.embed_tokens.weight
    assert not bool((saved.lm_head.weight == 0).any())
    before = tf.AutoModelForCausalLM.from_pretrained(folders["llama-tied"]).lm_head.weight
    assert not torch.equal(saved.lm_head.weight, before)


def test_added_biases_are_trained_saved_and_loaded(folders: dict[str, Path], text_file: Path, tmp_path: Path) -> None:
    asked = job(folders["llama-tied"], text_file, tmp_path, retrain={"train": ["biases", "norms"], "add_biases": True})
    merged = compress(asked)["perplexity"]["merged"]
    saved = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    biases = [value for name, value in saved.named_parameters() if name.endswith("proj.bias")]
    assert len(biases) == 14
    assert sum(bool(bias.any()) for bias in biases) >= 12  # those of k_proj hardly move: softmax cancels them
    tokens = tokenize(read_texts(text_file), byte_tokenizer())
    assert perplexity(saved, tokens, window=32, batch_size=32) == merged["text"]


@torch.no_grad()
def test_perplexity_of_the_embedded_model_by_ten_lines(tmp_path: Path) -> None:
    text = (ASSETS / "text" / "test.txt").read_text(encoding="utf-8")[:8000]
    (tmp_path / "held-out.txt").write_text(text, encoding="utf-8")
    flags = [
        "--data",
        str(tmp_path / "held-out.txt"),
        "--window",
        "128",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "p"),
    ]
    assert CliRunner().invoke(app, ["evaluate", "embedded", *flags]).exit_code == 0
    (found,) = json.loads((tmp_path / "p").read_text())["perplexity"].values()
    model = tf.AutoModelForCausalLM.from_pretrained(ASSETS, dtype=torch.float32)
    ids = tf.AutoTokenizer.from_pretrained(ASSETS)(text, verbose=False)["input_ids"]
    total, count = 0.0, 0
    for start in range(0, len(ids) - 127, 128):
        window = torch.tensor(ids[start : start + 128])
        logs = model(window[None]).logits[0].double().log_softmax(-1)
        total -= logs[torch.arange(127), window[1:]].sum().item()
        count += 127
    assert count > 10 * 127
    assert found == pytest.approx(math.exp(total / count), rel=2e-3)  # the weights are float16
    assert found < 45  # a trigram model fitted on the same novels has 66, a unigram model 756


def test_views_and_matrices_name_the_same_parameters(folders: dict[str, Path]) -> None:
    """The oracle above looks at what the package prunes."""
    for folder in folders.values():
        model = tf.AutoModelForCausalLM.from_pretrained(folder)
        assert {view.parameter for view in find_layers(model)} == {name for name, _ in matrices(model)}


@pytest.mark.parametrize(
    ("config", "stored"),
    [
        (
            tf.MixtralConfig(**NORMAL | {"num_hidden_layers": 1}, num_local_experts=4),
            "block_sparse_moe.experts.3.w1.weight",
        ),
        (
            tf.OlmoeConfig(**NORMAL | {"num_hidden_layers": 1}, num_experts=4, num_experts_per_tok=2),
            "mlp.experts.3.gate_proj.weight",
        ),
    ],
    ids=["mixtral", "olmoe"],
)
@pytest.mark.filterwarnings("ignore:.*saw no calibration token:UserWarning")
def test_experts_that_are_stored_one_by_one_stream(config: Any, stored: str, text_file: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    files = read_checkpoint(tmp_path / "dense").tensors
    assert f"model.layers.0.{stored}" in files
    made: list[Any] = []
    for streaming in (False, True):
        prune, out = {"criterion": "sparsegpt", "pattern": "2:4"}, tmp_path / f"run-{streaming}"
        compress(
            job(
                tmp_path / "dense",
                text_file,
                out,
                prune=prune,
                retrain=None,
                streaming=streaming,
                evaluate={"data": {}},
            )
        )
        made.append(tf.AutoModelForCausalLM.from_pretrained(out / "model"))
        assert read_checkpoint(out / "model").tensors.keys() == files.keys()
        Masks.load(out / "model" / "masks.safetensors").check(made[-1])
    memory, disk = (each.state_dict() for each in made)
    assert all(torch.equal(each, disk[name]) for name, each in memory.items())
    assert all(bool((zeros(matrix).view(-1, 4).sum(-1) == 2).all()) for _, matrix in matrices(made[1]))
