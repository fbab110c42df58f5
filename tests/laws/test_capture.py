"""Recorded steps: beside other threads, of language models, and where a step cannot be recorded."""

import logging
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from prunus.adapt import adapt
from prunus.blocks import Arguments
from prunus.data import PackedTokens
from prunus.layers import find_layers
from prunus.prune import prune
from prunus.train import linear_warmup_decay, next_token_loss, train
from prunus.train.capture import _AHEAD, CapturedStep, Kept, _attending, _copied, _tell, captures
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


def retrained(
    capture: bool | str,
    loss: Any = next_token_loss,
    subset: tuple[str, ...] = ("norms", "mask_lora"),
    keep: bool = False,
    **options: Any,
) -> tuple[list[float], dict[str, Any]]:
    """Losses and state of a tiny language model after 12 steps on a GPU, in two parts each."""
    model = tiny_llama().cuda()
    masks, views = prune(model, sparsity=0.5), find_layers(model)
    generator = torch.Generator().manual_seed(0)
    adaptation = adapt(model, subset, masks=masks, views=views, rank=4, generator=generator)
    if keep:
        adaptation.keep_effective()
    packed = PackedTokens(torch.arange(4000) * 7 % 96, 16)
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-2), capturable=True, fused=True)
    trace = train(
        model,
        lambda step: packed.at(step, batch=4, seed=0),
        optimizer,
        linear_warmup_decay(12, 0.1),
        steps=12,
        loss=loss,
        masks=masks if "full" in subset else None,
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
@pytest.mark.parametrize("keep", [False, True])
def test_recorded_steps_of_a_language_model_are_the_plain_ones(keep: bool):
    (plain, weights), (recorded, others) = retrained(capture=False), retrained(capture=True, keep=keep)
    torch.testing.assert_close(torch.tensor(recorded), torch.tensor(plain), rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("subset", [("norms", "mask_lora"), ("full",)])
@pytest.mark.parametrize("stop", [1, 2, 8])
def test_a_recorded_run_that_was_killed_ends_where_the_whole_one_does(tmp_path: Path, subset: Any, stop: int):
    whole, weights = retrained(capture=True, subset=subset)
    resumed, others = resumed_after(stop, tmp_path, lambda **asked: retrained(capture=True, subset=subset, **asked))
    assert resumed == whole
    for name, weight in weights.items():
        assert torch.equal(others[name], weight), name


def resumed_after(stop: int, folder: Path, run: Callable[..., Any]) -> Any:
    """What a run returns that was killed after so many steps and called again."""

    def killed(done: int, _loss: float) -> None:
        if done == stop:
            raise KeyboardInterrupt

    asked: dict[str, Any] = {"checkpoint": folder / "c.pt", "save_seconds": 0.0, "report_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(on_step=killed, **asked)
    return run(**asked)


class Played(CapturedStep):
    """A recorded step on a CPU: the loss of what is replayed is one larger, so that one sees which ran.

    What is replayed is what was recorded: the step of then, on the tensors of then.
    """

    recorded: Callable[[list[Any]], Tensor]

    def _plain(self, parts: list[Any]) -> Tensor:
        return self.step(parts)

    def _attempt(self, masked: bool) -> str:
        self.loss = torch.zeros(())
        self.graph: Any = self
        self.recorded = self.step
        return ""

    def replay(self) -> None:
        assert self.loss is not None
        self.loss.copy_(self.recorded(self.static) + 1)

    def _wait(self) -> None:
        pass


def played(steps: int = 6, **asked: Any) -> tuple[list[float], Tensor]:
    """Losses and weight of a layer trained with dropout and momentum, its steps from the fourth on "recorded"."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(0.5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trace = train(
        model,
        lambda step: torch.full((4, 3), float(step)),
        optimizer,
        lambda _: 1.0,
        steps=steps,
        loss=lambda model, batch: model(batch).square().mean() / 100,
        capture=True,
        **asked,
    )
    return trace.losses, model[0].weight.detach()  # pyright: ignore[reportReturnType]


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are "recorded" on a CPU."""
    loop = sys.modules["prunus.train.train"]  # the name is also the function's
    monkeypatch.setattr(loop, "CapturedStep", Played)
    monkeypatch.setattr(loop, "captures", lambda asked, *_, **__: bool(asked))
    monkeypatch.setattr(loop, "settled", lambda _: nullcontext())


@pytest.mark.usefixtures("plays")
@pytest.mark.parametrize("stop", [1, 2, 3, 5, 6])
def test_a_resumed_run_records_the_same_steps(tmp_path: Path, stop: int):
    whole, weight = played()
    assert [loss >= 1 for loss in whole] == [False] * 3 + [True] * 3
    resumed, other = resumed_after(stop, tmp_path, played)
    assert resumed == whole
    assert torch.equal(other, weight)


def tiny_opt() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 32, "num_attention_heads": 2, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(vocab_size=64, num_hidden_layers=2, max_position_embeddings=32, **sizes))


@pytest.mark.parametrize(
    ("family", "other"),
    [(tiny_llama, {"position_ids": torch.arange(16)[None] % 8}), (tiny_opt, {"attention_mask": torch.eye(16)[:1]})],
    ids=["llama", "opt"],  # in transformers 5.17 that looks whether its own mask, of ones, has zeros
)
def test_a_model_attends_while_it_is_recorded_as_it_does_otherwise(
    monkeypatch: pytest.MonkeyPatch, family: Callable[[], Any], other: dict[str, Tensor]
):
    """Seen from inside, a recording is a trace: the model would form a mask of all pairs of tokens."""
    masks, tracing = list[bool](), False
    attend = F.scaled_dot_product_attention

    def seen(*args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        masks.append(attn_mask is not None)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", seen)
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda *_: tracing)
    model, ids, told = family(), torch.arange(16)[None], dict[Any, set[bool]]()

    def run(*, recording: bool, masked: bool = False, **more: Tensor) -> bool:
        """Whether there was a mask."""
        nonlocal tracing
        masks.clear()
        tracing = recording
        with _attending(told, recording=recording, masked=masked):
            model(ids, use_cache=False, **more)
        assert len(set(masks)) == 1
        return masks[0]

    assert run(recording=True) or family is tiny_opt, "nothing was noted yet"
    assert not run(recording=False)
    assert not run(recording=True)
    assert run(recording=True, masked=True, **other), "batches that may bring masks are not trusted"
    assert run(recording=False, **other)
    assert run(recording=True, **other)


def test_what_one_thread_notes_and_answers_is_of_its_own_model(monkeypatch: pytest.MonkeyPatch):
    """Members run in threads: the models of others ask the same functions, for the same sizes, with other masks."""
    asked: list[Any] = []
    monkeypatch.setattr("transformers.masking_utils._ignore_causal_mask_sdpa", lambda *sizes: bool(asked.append(sizes)))
    masking: Any = sys.modules["transformers.masking_utils"]

    def ask() -> bool:
        return masking._ignore_causal_mask_sdpa(None, 16, 16, 0, 0)

    def ask_elsewhere() -> bool:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(ask).result()

    key = ("_ignore_causal_mask_sdpa", None, 16, 16, 0, 0)
    told = {key: {True}}
    with _attending(told, recording=True, masked=False):
        assert ask()
        assert not asked
        assert not ask_elsewhere()
        assert len(asked) == 1
    with _attending(told, recording=False, masked=False):
        assert not ask_elsewhere()
        assert told == {key: {True}}
        assert not ask()
        assert told == {key: {True, False}}


def test_a_batch_takes_the_recorded_ones_place_only_where_it_fits():
    def call(rows: int, mask: Tensor | None) -> list[Any]:
        return [{"x": torch.ones(rows, 2), "args": (Arguments((mask,), {"use_cache": False}),)}]

    static = call(2, torch.zeros(2))
    assert _copied(static, call(2, torch.ones(2)))
    assert static[0]["args"][0].args[0].tolist() == [1.0, 1.0]
    assert not _copied(static, call(3, torch.ones(2)))
    assert not _copied(static, call(2, torch.ones(3)))
    assert not _copied(static, call(2, None))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_that_cannot_be_recorded_runs_as_it_is(caplog: pytest.LogCaptureFixture):
    def waiting(model: Any, ids: torch.Tensor) -> torch.Tensor:
        value = next_token_loss(model, ids)
        return value * (1.0 if float(value.detach()) > 0 else 0.0)  # the host waits for the device

    plain, weights = retrained(capture=False, loss=waiting)
    _tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        tried, others = retrained(capture="auto", loss=waiting)
        retrained(capture="auto", loss=waiting)
    assert caplog.text.count("not recorded as a CUDA graph") == 1
    torch.testing.assert_close(torch.tensor(tried), torch.tensor(plain), rtol=1e-4, atol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=1e-2, atol=1e-3)
    with pytest.raises(RuntimeError):
        retrained(capture=True, loss=waiting)
    retrained(capture=True)  # and what can be recorded still is


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_random_numbers_go_on_after_a_recording_that_failed():
    weight = torch.zeros((), device="cuda")

    def step(parts: list[Any]) -> Tensor:
        weight.add_(torch.rand((), device="cuda"))
        return parts[0] * weight.item()  # the host waits, which no recording survives

    batch = [torch.ones((), device="cuda")]
    torch.manual_seed(0)
    captured = CapturedStep(step, torch.device("cuda"), must=False)
    for _ in range(6):
        captured(batch)
    found, failure = torch.rand(4, device="cuda"), captured.failure
    assert failure
    torch.manual_seed(0)
    for _ in range(6):
        torch.rand((), device="cuda")
    assert torch.equal(found, torch.rand(4, device="cuda"))


def test_a_reason_is_told_once(caplog: pytest.LogCaptureFixture):
    _tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        for why in ("the host waits", "the host waits", "one process"):
            _tell(why)
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["the host waits", "one process"]


def test_auto_records_nothing_where_nothing_can_be_recorded():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert not captures("auto", model, optimizer, shared=False, scaled=False)
    assert not captures(False, model, optimizer, shared=False, scaled=False)
    with pytest.raises(ValueError, match="records a CUDA graph, and the model is on cpu; use capture=False"):
        captures(True, model, optimizer, shared=False, scaled=False)


def test_several_processes_are_recorded_unless_they_exchange_much_or_it_is_impossible(monkeypatch: pytest.MonkeyPatch):
    capture = sys.modules["prunus.train.capture"]
    monkeypatch.setattr(capture, "unrecordable", lambda *_, **__: "")
    model = nn.Sequential(nn.Linear(2, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    assert captures("auto", model, optimizer, shared=False, scaled=False)
    for asked in (True, "auto"):
        assert captures(asked, model, optimizer, shared=True, scaled=False)
    monkeypatch.setattr(capture, "_SENT", 4 * 6 - 1)  # a byte less than the gradients of 2 x 2 weights and 2 biases
    assert captures(True, model, optimizer, shared=True, scaled=False)
    assert not captures("auto", model, optimizer, shared=True, scaled=False)
    assert captures("auto", model, optimizer, shared=False, scaled=False)
    assert captures(Kept(), model, optimizer, shared=False, scaled=False)
    assert not captures(Kept(), model, optimizer, shared=True, scaled=False)
    model.append(nn.BatchNorm1d(2))
    assert captures(True, model, optimizer, shared=False, scaled=False)
    with pytest.raises(ValueError, match="no BatchNorm of several processes"):
        captures(True, model, optimizer, shared=True, scaled=False)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="capture=True goes with whole weights"):
        captures(True, model, optimizer, shared=True, scaled=False)
