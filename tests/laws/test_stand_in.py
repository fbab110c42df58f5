"""Blocks of one shape fitted through one recorded step: the weights of blocks whose steps are each recorded anew."""

import logging
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from prunus.masks import Masks
from prunus.patterns import NM
from prunus.score.criteria import wanda
from prunus.stream import Fit, Work, stream
from prunus.train import Kept, StandIns, train
from tests.laws.test_capture import Played, plays

TOKENS = torch.arange(160).view(10, 16) * 7 % 64  # in batches of four the last is smaller, and is not replayed
_ = plays


def llama(**changes: Any) -> Any:
    """Four blocks, unless changed."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes))).eval()


def opt(**changes: Any) -> Any:
    """Three blocks, with dropout."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(vocab_size=64, num_hidden_layers=3, max_position_embeddings=32, **sizes)).eval()


def gpt2(**changes: Any) -> Any:
    """Three blocks, with dropout and transposed weights."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=3, n_head=2, **changes)).eval()


def mixtral(**changes: Any) -> Any:
    """Three blocks of experts, whose masks are not packed."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 3}
    return MixtralForCausalLM(MixtralConfig(**(sizes | heads | changes))).eval()


class Recordings(list[Played]):
    """Every recorded step."""


def addresses(played: Played) -> list[int]:
    """Where the tensors lie that a recorded step reads, besides its batch: those of a real one may not move."""
    run: Any = played.recorded.__self__  # pyright: ignore[reportFunctionMemberAccess]
    optimizer = run.optimizer
    rates = [group["lr"] for group in optimizer.param_groups]
    state = [value for each in optimizer.state.values() for value in each.values()]
    return [each.data_ptr() for each in (*run.model.parameters(), *run.model.buffers(), *rates, *state)]


@pytest.fixture
def recordings(plays: None, monkeypatch: pytest.MonkeyPatch) -> Recordings:
    """What was "recorded", on a CPU."""
    found, places = Recordings(), dict[int, list[int]]()
    record, replay = Played._record, Played.replay

    def recording(self: Played, parts: list[Any]) -> None:
        found.append(self)
        places.pop(id(self), None)  # of one that is gone
        record(self, parts)

    def replaying(self: Played) -> None:
        replay(self)
        assert addresses(self) == places.setdefault(id(self), addresses(self))

    monkeypatch.setattr(Played, "_record", recording)
    monkeypatch.setattr(Played, "replay", replaying)
    monkeypatch.setattr(sys.modules["prunus.stream.reconstruct"], "unrecordable", lambda *_, **__: "")
    return found


def fitted(
    model: Any, fit: Fit, recordings: Recordings, *, once: bool = True, **asked: Any
) -> tuple[dict[str, Tensor], Masks, int]:
    """Weights and masks of a model whose blocks were fitted, and how often a step was recorded."""
    recordings.clear()
    torch.manual_seed(1)
    with pytest.MonkeyPatch.context() as patch:
        if not once:
            patch.setattr(StandIns, "find", lambda *_: None)
        streamed = stream(model, wanda, NM(2, 4), 0.5, tokens=TOKENS, fit=fit, batch_size=4, **asked)
    streamed.masks.check(model)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return state, streamed.masks, len(recordings)


def assert_same(one: tuple[dict[str, Tensor], Masks, int], other: tuple[dict[str, Tensor], Masks, int]) -> None:
    assert one[1] == other[1]
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name


@pytest.mark.parametrize(
    ("window", "train", "inputs", "times"),
    [
        ("block", ("full",), "pruned", 1),
        ("block", ("norms", "mask_lora"), "dense", 1),
        ("block", ("norms",), "pruned", 1),
        ("half", ("full",), "dense", 2),
        ("half", ("scale_lora",), "pruned", 2),
        ("matrix", ("full",), "pruned", 4),  # q and o are of one shape, k and v, gate and up
        ("matrix", ("lora_prune",), "dense", 4),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_recorded_once_for_all_blocks_and_the_weights_are_the_same(
    recordings: Recordings, window: Any, train: Any, inputs: Any, times: int, dtype: torch.dtype
):
    fit = Fit(window=window, train=train, inputs=inputs, steps=6, lr=3e-3, rank=2)
    dense = llama(num_hidden_layers=3).to(dtype)
    once = fitted(deepcopy(dense), fit, recordings)
    anew = fitted(deepcopy(dense), fit, recordings, once=False)
    assert once[2] == times
    assert anew[2] == 3 * {"block": 1, "half": 2, "matrix": 7}[window]
    assert_same(once, anew)
    assert any(not torch.equal(once[0][name], value) for name, value in dense.state_dict().items())


@pytest.mark.parametrize(
    ("family", "train"),
    [(opt, ("full",)), (opt, ("biases", "mask_lora")), (gpt2, ("full",)), (gpt2, ("norms", "mask_lora")),
     (mixtral, ("full",)), (mixtral, ("mask_lora",))],
)  # fmt: skip
def test_random_numbers_and_masks_of_experts_are_those_of_steps_recorded_anew(
    recordings: Recordings, family: Callable[..., Any], train: Any
):
    fit = Fit(train=train, steps=6, lr=3e-3, rank=2)
    once = fitted(family(), fit, recordings)
    assert once[2] == 1
    assert_same(once, fitted(family(), fit, recordings, once=False))


@pytest.mark.parametrize("seed", range(4))
def test_the_smaller_last_batch_is_not_what_is_recorded(recordings: Recordings, seed: int):
    """In some seed it is the first of a block."""
    once = fitted(llama(), Fit(steps=6, lr=3e-3, seed=seed), recordings)
    assert [each.static[0]["target"].shape[0] for each in recordings] == [4]
    assert_same(once, fitted(llama(), Fit(steps=6, lr=3e-3, seed=seed), recordings, once=False))


def test_a_run_that_goes_on_after_a_block_ends_with_the_same_bits(recordings: Recordings, tmp_path: Path):
    fit = Fit(steps=6, lr=3e-3)
    whole = fitted(llama(), fit, recordings)

    def kill(report: Any) -> None:
        if report.name.endswith("1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(llama(), fit, recordings, work=Work(tmp_path, "job").open(), on_block=kill)
    assert_same(whole, fitted(llama(), fit, recordings, work=Work(tmp_path, "job").open()))
    assert len(recordings) == 1


def hooked(model: Any) -> None:
    model.model.layers[1].register_forward_hook(lambda *_: None)


def frozen(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)


def wider(model: Any) -> None:
    model.model.layers[1].mlp = type(model.model.layers[1].mlp)(llama(intermediate_size=32).config)


def otherwise(model: Any) -> None:
    model.model.layers[1].mlp.act_fn = nn.ReLU()


def thrown(model: Any) -> None:
    model.model.layers[1].self_attn.attention_dropout = 0.5


@pytest.mark.parametrize("change", [hooked, frozen, wider, otherwise, thrown])
def test_a_block_unlike_the_others_is_recorded_for_itself(recordings: Recordings, change: Callable[[Any], None]):
    fit = Fit(steps=6, lr=3e-3)
    found: list[tuple[dict[str, Tensor], Masks, int]] = []
    for once in (True, False):
        model = llama()
        change(model)
        found.append(fitted(model, fit, recordings, once=once))
    assert found[0][2] == 3, "of the first block, of the second, and of the third, which the fourth is like"
    assert_same(*found)


class Numbered(nn.Module):
    """An activation by a whole number, which also says where a block is."""

    def __init__(self, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) / (self.layer_idx + 1)


def test_blocks_that_compute_by_their_number_are_recorded_anew(
    recordings: Recordings, caplog: pytest.LogCaptureFixture
):
    fit = Fit(steps=6, lr=3e-3)
    found: list[tuple[dict[str, Tensor], Masks, int]] = []
    for once in (True, False):
        model = llama()
        for place, block in enumerate(model.model.layers):
            block.mlp.act_fn = Numbered(place)
        with caplog.at_level(logging.INFO):
            found.append(fitted(model, fit, recordings, once=once))
    assert caplog.text.count("recorded anew for each block: models of one shape compute different things") == 1
    assert found[0][2] == 4
    assert_same(*found)


@pytest.mark.parametrize("how", ["failed", "crowded"])
def test_nothing_stands_in_where_it_is_of_no_use(
    recordings: Recordings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
):
    def fail(self: Played, parts: list[Any]) -> None:
        recordings.append(self)
        self.failure = "it waits"
        self.forget()

    if how == "failed":
        monkeypatch.setattr(Played, "_record", fail)
    else:
        monkeypatch.setattr(sys.modules["prunus.train.stand_in"], "_is_crowded", lambda _: True)
    fit = Fit(steps=6, lr=3e-3)
    with caplog.at_level(logging.INFO):
        once = fitted(llama(), fit, recordings)
    why = {"failed": "none could be recorded", "crowded": "half of the device's memory was in use"}[how]
    assert caplog.text.count("recorded anew for each block") == 1
    assert why in caplog.text
    assert once[2] == 4
    assert_same(once, fitted(llama(), fit, recordings, once=False))


def test_a_kept_step_and_a_checkpoint_exclude_each_other(tmp_path: Path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"leave out checkpoint='.*c\.pt'"):
        train(
            model, lambda _: torch.ones(1, 2), optimizer, lambda _: 1.0, steps=1, capture=Kept(),
            checkpoint=tmp_path / "c.pt",
        )  # fmt: skip
