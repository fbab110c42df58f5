"""Laws of recomputing no more than memory asks for: the same gradients, fewer products, the bytes that were allowed."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.adapt.adapt import adapt
from prunus.blocks import recompute
from prunus.blocks.recompute import kept_blocks, recomputed, recomputing
from prunus.during import CS, DNW, DPF, DST, STR, MaskLLM
from prunus.layers import find_layers
from prunus.train.next_token import next_token_loss
from prunus.train.train import train
from tests.conftest import VOCABULARY, tiny_llama


def tokens() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))


class Products(TorchDispatchMode):
    """How many matrix products ran meanwhile."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def step(model: nn.Module) -> tuple[int, dict[str, Tensor]]:
    """Products of one forward and backward pass, and the gradients."""
    model.train().zero_grad()
    with Products() as products:
        next_token_loss(model, tokens()).backward()
    return products.count, {key: each.grad.clone() for key, each in model.named_parameters() if each.grad is not None}


def test_blocks_recompute_afterwards_as_before() -> None:
    model = tiny_llama()
    blocks = recomputing(model)
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    blocks[1].gradient_checkpointing, own = False, blocks[0]._gradient_checkpointing_func
    with recomputed(model):
        with recomputed(model, spare=1 << 40):
            step(model)
        assert kept_blocks(model) == 0
        assert blocks[0]._gradient_checkpointing_func is not own
    assert [each.gradient_checkpointing for each in blocks] == [True, False]
    assert blocks[0]._gradient_checkpointing_func is own
    assert model._require_grads_hook is not None


def test_nothing_measures_a_block_after_a_pass_that_ended_before_it() -> None:
    model = tiny_llama().train()
    with pytest.raises(IndexError), recomputed(model, spare=1 << 40):
        model(torch.tensor([[VOCABULARY]]))
    assert not any("forward" in vars(each) for each in model.modules())


@pytest.mark.parametrize("subset", ["norms", "mask_lora", "full"])
def test_gradients_are_the_same_bits_and_products_fewer(subset: str) -> None:
    model = tiny_llama()
    adapt(model, [subset], masks=None, views=find_layers(model), rank=2)
    least, wanted = step(model)
    counts: list[int] = []
    for spare in (0, 1 << 40):
        with recomputed(model, spare=spare):
            step(model)
            count, found = step(model)
        counts.append(count)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert counts[0] > counts[1] == least
    if subset == "mask_lora":
        assert counts[0] - least == 2 * 6 * 2, "in each block the product and the weight of all layers but the last"


def test_as_many_blocks_are_kept_as_bytes_were_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    sizes: list[int] = []
    own = recompute._measure_once

    def measure(block: nn.Module, then: Any) -> Any:
        return own(block, lambda size: (sizes.append(size), then(size)))

    monkeypatch.setattr(recompute, "_measure_once", measure)
    with recomputed(model, spare=1):
        step(model)
    assert len(sizes) == 1
    assert len(model.model.layers) == 2
    for room, kept in ((0.5, 0), (1, 1), (1.9, 1), (2, 2), (100, 2)):
        with recomputed(model, spare=int(room * sizes[0])):
            step(model)
            assert kept_blocks(model) == kept
            assert model.model.layers[0].gradient_checkpointing is (kept < 2), "the first are recomputed"
    assert "forward" not in vars(model.model.layers[0])


def test_what_is_measured_is_what_a_block_holds() -> None:
    """Against the bytes by hand."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 32, bias=False).requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).relu().exp()

    block, found = Block(), list[int]()
    recompute._measure_once(block, found.append)
    block(torch.randn(4, 8, requires_grad=True))
    block(torch.randn(4, 8, requires_grad=True))
    assert found == [2 * 4 * 32 * 4]  # the outputs of relu and exp


@pytest.mark.parametrize("spare", [0, "free"])
def test_a_run_ends_with_the_same_bits(spare: int | Literal["free"]) -> None:
    ids = tokens()

    def run(spare: Any) -> nn.Module:
        model = tiny_llama()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with recomputed(model, spare=spare):
            train(model, lambda _: ids, optimizer, lambda _: 1.0, steps=4, accumulate=2)
            assert kept_blocks(model) == (2 if spare else 0)
        return model

    one, other = run(spare), run(0)
    assert all(torch.equal(each, other.get_parameter(name)) for name, each in one.named_parameters())


@pytest.mark.parametrize("method", [DPF, STR, CS, DST, DNW, MaskLLM])
def test_a_block_runs_again_with_the_weights_that_a_method_put_in_place(method: Any) -> None:
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        model = tiny_llama()
        optimizer, during = torch.optim.SGD(model.parameters(), lr=0.5), [method(0.5)]
        with recomputed(model) if again else nullcontext():
            train(model, lambda _: tokens(), optimizer, lambda _: 1.0, steps=4, accumulate=2, during=during)
        found.append(dict(model.state_dict()) | dict(during[0].state_dict()))
    assert all(torch.equal(each, found[1][name]) for name, each in found[0].items() if "reached" not in name)


def test_without_room_everything_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recompute, "_left", lambda _: -1)
    model = tiny_llama()
    with recomputed(model, spare="free"):
        for _ in range(3):
            step(model)
        assert kept_blocks(model) == 0


def test_nothing_before_the_first_trained_parameter_gets_a_gradient() -> None:
    model = tiny_llama()
    with recomputed(model):
        assert not model.get_input_embeddings()._forward_hooks
        train_only_last = model.model.norm.weight
        model.requires_grad_(False)
        train_only_last.requires_grad_(True)
        with Products() as products:
            next_token_loss(model.train(), tokens()).backward()
        assert products.count == 2 * 7 + 2, "each layer once, and the head twice"


def test_an_adapted_layer_can_be_differentiated_twice_over() -> None:
    model = tiny_llama()
    adaptation = adapt(model, ["mask_lora"], masks=None, views=find_layers(model), rank=2, init="gaussian")
    factors = adaptation.groups["mask_lora"]
    loss = next_token_loss(model.train(), tokens())
    one = torch.autograd.grad(loss, factors, retain_graph=True)
    other = torch.autograd.grad(loss, factors)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_with_room_recomputes_nothing_after_its_first_pass() -> None:
    model, ids = tiny_llama().cuda(), tokens().cuda()
    with recomputed(model, spare="free"):
        counts: list[int] = []
        for _ in range(3):
            next_token_loss(model.train(), ids).backward()
            counts.append(kept_blocks(model))
    assert counts == [0, 2, 2]
