"""Laws of the chunked loss: plain loss and gradients for every family and every way to train, in less memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from prunus.adapt.adapt import adapt
from prunus.blocks.recompute import recomputed
from prunus.during import CS, DPF, STR
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.train import next_token
from prunus.train.next_token import next_token_loss
from prunus.train.train import train
from tests.conftest import VOCABULARY, tiny_llama
from tests.systems.test_families import FAMILIES, NORMAL, _normal

SCALED = {  # what follows the head differs: soft-capping, a factor, a divisor, a bias
    "gemma2-capped": _normal("Gemma2", head_dim=8, final_logit_softcapping=2.0),
    "cohere": lambda: tf.CohereForCausalLM(tf.CohereConfig(**NORMAL, logit_scale=0.3)),
    "granite": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**NORMAL, logits_scaling=3.0)),
    "phi-bias": _normal("Phi"),
}
MODELS = {name: make for name, (make, *_) in FAMILIES.items()} | SCALED


def plain(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def build(name: str) -> Any:
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.2) if parameter.ndim > 1 else parameter.data.add_(0.1)
    return model


def tokens(words: int, batch: int = 3, length: int = 12) -> Tensor:
    return torch.randint(3, words, (batch, length), generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, ids: Tensor, loss: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    value = loss(model, ids)
    (2 * value).backward()
    found = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return value.detach(), {name: grad.clone() for name, grad in found.items()}


def check_same(model: nn.Module, ids: Tensor) -> None:
    expected, wanted = gradients(model, ids, plain)
    value, found = gradients(model, ids, next_token_loss)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 + 1e-5 * grad.abs().max().item(), msg=name)
    with torch.no_grad():
        torch.testing.assert_close(next_token_loss(model, ids), expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks of five rows or so; the list receives how many rows each had."""
    sizes: list[int] = []
    own = next_token._Tail.logits

    def logits(self: Any, rows: Tensor) -> Tensor:
        sizes.append(len(rows))
        return own(self, rows)

    monkeypatch.setattr(next_token, "_ENTRIES", 64 * 5)
    monkeypatch.setattr(next_token._Tail, "logits", logits)
    return sizes


@pytest.mark.parametrize("family", MODELS)
def test_every_family_has_the_plain_loss_and_gradients(family: str, chunks: list[int]) -> None:
    model = build(family)
    ids = tokens(min(64, model.config.vocab_size))
    check_same(model, ids)
    assert sum(chunks) == 2 * 33 + 1, "rows in chunks, with and without gradients, and one row to see what is trained"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("subset", ["norms", "head", "mask_lora", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_to_train_has_the_plain_gradients(
    subset: str, tied: bool, dtype: torch.dtype, chunks: list[int]
) -> None:
    torch.manual_seed(0)
    model: Any = tf.LlamaForCausalLM(tf.LlamaConfig(**NORMAL, tie_word_embeddings=tied)).to(dtype)
    views = find_layers(model, include=["*"])
    name = next(view.parameter for view in views if view.shape[0] == 64)  # the head
    masks = Masks({name: torch.rand(model.get_parameter(name).shape) < 0.5})
    masks.apply_(model)
    adaptation = adapt(model, [subset], masks=masks, views=views, rank=2)
    for group in adaptation.groups.values():
        for parameter in group:
            parameter.data.add_(torch.randn(parameter.shape), alpha=0.02)
    ids = tokens(64)
    if dtype == torch.float32:
        check_same(model, ids)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            (expected, wanted), (value, found) = (gradients(model, ids, each) for each in (plain, next_token_loss))
        torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-2)
        for key, grad in wanted.items():
            assert (found[key] - grad).norm() <= 0.05 * grad.norm() + 1e-6, key
    assert chunks


def test_a_whole_run_with_checkpointing_ends_with_the_plain_weights(chunks: list[int]) -> None:
    ids = tokens(VOCABULARY, batch=4, length=16)

    def run(loss: Any) -> nn.Module:
        model = tiny_llama()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with recomputed(model):
            assert all(block.gradient_checkpointing for block in model.model.layers)
            train(model, lambda _: ids, optimizer, lambda _: 1.0, steps=4, loss=loss, accumulate=2)
        assert not any(block.gradient_checkpointing for block in model.model.layers)
        assert "forward" not in vars(model)
        return model

    one, other = run(next_token_loss), run(plain)
    for name, each in one.named_parameters():
        torch.testing.assert_close(each, other.get_parameter(name), rtol=1e-4, atol=1e-6)
    assert chunks


class Largest(TorchDispatchMode):
    """The most entries of any tensor made meanwhile, each counted where it is stored."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [each for each in tree_leaves(out) if isinstance(each, Tensor)]
        self.entries = max([self.entries, *(each.untyped_storage().nbytes() // each.itemsize for each in made)])
        return out


@pytest.mark.parametrize("method", [DPF, STR, CS])
def test_a_head_that_a_method_replaces_has_the_plain_gradients(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    found: list[Tensor] = []
    for entries in (1 << 25, 64 * 5):
        monkeypatch.setattr(next_token, "_ENTRIES", entries)
        model = tiny_llama()
        optimizer, views = torch.optim.SGD(model.parameters(), lr=0.5), find_layers(model, include=["*"])
        train(model, lambda _: ids, optimizer, lambda _: 1.0, steps=2, during=[method(0.5)], views=views)
        found.append(model.lm_head.weight.detach())
    assert torch.allclose(*found, atol=1e-6)


def test_logits_never_exist_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=4096, hidden_size=16, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2,
            word_embed_proj_dim=16, max_position_embeddings=64,
        )
    )  # fmt: skip
    ids = tokens(4096, batch=8, length=64)
    sizes: list[int] = []
    for entries, head in ((1 << 25, True), (4096 * 32, True), (4096 * 32, False)):
        monkeypatch.setattr(next_token, "_ENTRIES", entries)
        model.lm_head.weight.requires_grad_(head)
        with Largest() as largest:
            next_token_loss(model, ids).backward()
        sizes.append(largest.entries)
    assert sizes[0] >= 8 * 63 * 4096
    assert sizes[1] <= 4 * 4096 * 32, "fewer and larger chunks where each forms the gradient of the head"
    assert sizes[2] <= 4096 * 32


def test_a_compiled_model_and_other_modules_have_the_plain_loss(chunks: list[int]) -> None:
    model = tiny_llama()
    ids = tokens(VOCABULARY)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(next_token_loss(compiled, ids), plain(model, ids))
    assert not chunks


def test_an_error_leaves_the_model_as_it_was(chunks: list[int]) -> None:
    model = tiny_llama()
    before = copy.copy(vars(model))
    with pytest.raises((IndexError, RuntimeError)):
        next_token_loss(model, tokens(VOCABULARY) + 10_000)
    assert vars(model).keys() == before.keys()
    assert all("forward" not in vars(module) for module in model.modules())
