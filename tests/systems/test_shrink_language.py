"""Language models that are smaller: equal to the masked ones, fitted by least squares, saved as ordinary folders."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from prunus.layers import Inputs, Layer
from prunus.patterns import Unstructured
from prunus.save import save_model
from prunus.shrink import choose_blocks, columns, remove_blocks, remove_heads, remove_neurons

SMALL = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2, **SMALL}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, **SMALL}
MAKERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GATED, tie_word_embeddings=True)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**GATED, head_dim=16, layer_types=["full_attention"] * 3)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**GATED, pad_token_id=0)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, n_positions=64)),
}  # fmt: skip


def made(family: str):
    torch.manual_seed(0)
    model = MAKERS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens():
    return torch.randint(0, 60, (6, 20), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module, tokens: torch.Tensor):
    with torch.no_grad():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("family", list(MAKERS))
def test_neurons_go_and_the_model_is_the_masked_one(family: str, tokens: torch.Tensor, tmp_path):
    model = made(family)
    size = model.config.to_dict().get("intermediate_size") or model.config.to_dict().get("ffn_dim") or 128
    before = sum(each.numel() for each in model.parameters())
    small = remove_neurons(model, tokens, 0.25)
    assert size * 3 // 4 in small.config.to_dict().values()
    assert sum(each.numel() for each in small.parameters()) < 0.93 * before
    assert torch.allclose(logits(small, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)  # used up: masked
    save_model(small, None, tmp_path / "out", masks=None, info={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(small, tokens))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_heads_go_by_the_groups_that_share_a_key(family: str, tokens: torch.Tensor, tmp_path):
    model = made(family)
    size = getattr(model.config, "head_dim", None) or 8
    small = remove_heads(model, tokens, 0.5)
    assert (small.config.num_attention_heads, small.config.num_key_value_heads, small.config.head_dim) == (2, 1, size)
    assert torch.allclose(logits(small, tokens), logits(model, tokens), atol=1e-4, rtol=1e-4)
    small = remove_neurons(small, tokens, 0.5)
    save_model(small, None, tmp_path / "out", masks=None, info={})
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), tokens), logits(small, tokens))


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3"])
def test_heads_that_a_config_cannot_say_are_refused(family: str, tokens: torch.Tensor):
    with pytest.raises(ValueError, match=r"shrink"):
        remove_heads(made(family), tokens, 0.5)


def layer(rows: int, size: int, seen: int = 40):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(seen, size, generator=generator) @ torch.randn(size, size, generator=generator)
    inputs = Inputs(size, gram=True)
    inputs.add_(x)
    return Layer("fc", torch.randn(rows, size, generator=generator), inputs), x.double()


@pytest.mark.parametrize("width", [1, 3])
def test_what_stays_solves_the_least_squares_problem(width: int):
    each, x = layer(5, 12)
    weight, mask = columns(width, damping=0.0).solve(each, Unstructured("layer"), 5 * 6)
    stays = mask.any(0)
    assert mask.all(0).equal(stays)
    assert stays.sum() == 6
    assert stays.view(-1, width).all(1).sum() * width == 6
    expected = torch.linalg.lstsq(x[:, stays], x @ each.weight.T.double()).solution.T
    assert torch.allclose(weight[:, stays].double(), expected, atol=1e-3)
    assert not weight[:, ~stays].any()


def test_columns_go_one_after_another_with_the_least_damage():
    """Against the errors of least squares problems, solved anew for every column that might go."""
    each, x = layer(4, 9)
    stays = columns(damping=0.0).solve(each, Unstructured("layer"), 4 * 5)[1].any(0)
    left = list(range(9))

    def error(kept: list[int]) -> float:
        target = x @ each.weight.T.double()
        found = torch.linalg.lstsq(x[:, kept], target).solution
        return float((x[:, kept] @ found - target).square().sum())

    for _ in range(4):
        left.remove(min(left, key=lambda gone: error([k for k in left if k != gone])))
    assert stays.nonzero()[:, 0].tolist() == left


def test_the_blocks_that_go_are_those_that_brute_force_finds(tokens: torch.Tensor):
    model = made("qwen3")
    dense = logits(model, tokens).log_softmax(-1)

    def divergence(gone: list[int]) -> float:
        found = logits(remove_blocks(copy.deepcopy(model), gone), tokens).log_softmax(-1)
        return float((dense.exp() * (dense - found)).sum())

    first = min(range(3), key=lambda index: divergence([index]))
    second = min(set(range(3)) - {first}, key=lambda index: divergence([first, index]))
    for batch_size in (2, 6):
        assert choose_blocks(model, tokens, 1, batch_size=batch_size) == [first]
        assert choose_blocks(model, tokens, 2, batch_size=batch_size) == sorted([first, second])
    assert torch.equal(logits(model, tokens).log_softmax(-1), dense)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "opt"])
def test_blocks_go_and_the_config_follows(family: str, tokens: torch.Tensor, tmp_path):
    model = made(family)
    small = remove_blocks(model, [1])
    assert small.config.num_hidden_layers == 2
    assert len(getattr(small.config, "layer_types", None) or [0, 0]) == 2
    save_model(small, None, tmp_path / "out", masks=None, info={})
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, tokens), logits(small, tokens))
    with torch.no_grad():
        cached = again.generate(tokens[:1], max_new_tokens=4, do_sample=False)
    assert cached.shape == (1, 24)


def test_counts_that_leave_nothing_are_refused(tokens: torch.Tensor):
    with pytest.raises(ValueError, match="at most 2"):
        choose_blocks(made("llama"), tokens, 3)
    with pytest.raises(ValueError, match="cannot go of 3 blocks"):
        remove_blocks(made("llama"), [3])
