"""Recorded steps: beside other threads, of language models, and where a step cannot be recorded."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from prunus.adapt import adapt
from prunus.data import PackedTokens
from prunus.layers import find_layers
from prunus.prune import prune
from prunus.train import linear_warmup_decay, next_token_loss, train
from prunus.train.capture import _AHEAD, CapturedStep, captures
from tests.conftest import tiny_llama


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_replays_do_not_queue_up_without_end():
    weight = torch.zeros(4, device="cuda")

    def step(parts):
        weight.add_(parts[0])
        return weight.sum()

    captured = CapturedStep(step, torch.device("cuda"))
    losses = [captured([torch.full((4,), float(place), device="cuda")]) for place in range(40)]
    assert len(captured.queued) <= _AHEAD
    assert torch.stack(losses).tolist() == [4.0 * sum(range(place + 1)) for place in range(40)]


def retrained(capture: bool | str, loss: Any = next_token_loss, **options: Any) -> tuple[list[float], dict[str, Any]]:
    """Losses and state of a tiny language model after 12 steps of norms and MaskLoRA on a GPU, in two parts each."""
    model = tiny_llama().cuda()
    masks, views = prune(model, sparsity=0.5), find_layers(model)
    generator = torch.Generator().manual_seed(0)
    adaptation = adapt(model, ["norms", "mask_lora"], masks=masks, views=views, rank=4, generator=generator)
    packed = PackedTokens(torch.arange(4000) * 7 % 96, 16)
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-2), capturable=True)
    trace = train(
        model,
        lambda step: packed.at(step, batch=4, seed=0),
        optimizer,
        linear_warmup_decay(12, 0.1),
        steps=12,
        loss=loss,
        accumulate=2,
        clip=1.0,
        capture=capture,  # pyright: ignore[reportArgumentType]
        **options,
    )
    adaptation.merge_()
    masks.check(model)
    return trace.losses, model.state_dict()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_recorded_steps_of_a_language_model_are_the_plain_ones():
    (plain, weights), (recorded, others) = retrained(capture=False), retrained(capture="auto")
    torch.testing.assert_close(torch.tensor(recorded), torch.tensor(plain), rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_run_that_was_killed_ends_where_the_whole_one_does(tmp_path: Path):
    """To rounding: after a resumption the first steps run as they are, and a recording may choose other kernels."""
    whole, weights = retrained(capture=True)

    def killed(done: int, _loss: float) -> None:
        if done == 8:
            raise KeyboardInterrupt

    asked: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "save_seconds": 0.0, "report_every": 4}
    with pytest.raises(KeyboardInterrupt):
        retrained(capture=True, on_step=killed, **asked)
    resumed, others = retrained(capture=True, **asked)
    assert resumed == pytest.approx(whole, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture):
    def waiting(model: Any, ids: torch.Tensor) -> torch.Tensor:
        value = next_token_loss(model, ids)
        return value * (1.0 if float(value.detach()) > 0 else 0.0)  # the host waits for the device

    plain, weights = retrained(capture=False, loss=waiting)
    with caplog.at_level(logging.WARNING):
        tried, others = retrained(capture="auto", loss=waiting)
    assert "not recorded as a CUDA graph" in caplog.text
    torch.testing.assert_close(torch.tensor(tried), torch.tensor(plain), rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-2, atol=1e-3)
    with pytest.raises(RuntimeError):
        retrained(capture=True, loss=waiting)
    retrained(capture=True)  # and what can be recorded still is


def test_auto_records_nothing_where_nothing_can_be_recorded():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not captures("auto", model, optimizer, shared=False, scaled=False)
    assert not captures(False, model, optimizer, shared=False, scaled=False)
    with pytest.raises(ValueError, match="records a CUDA graph, and the model is on cpu; use capture=False"):
        captures(True, model, optimizer, shared=False, scaled=False)
