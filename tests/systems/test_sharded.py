"""Two processes train what one trains: replicated or sharded, biases and norms, MaskLoRA, everything under masks."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import OPTConfig, OPTForCausalLM

from prunus.adapt.adapt import adapt
from prunus.blocks.recompute import recomputed
from prunus.data import IGNORED
from prunus.layers import Layer, find_layers
from prunus.machine import ranks
from prunus.masks import Masks
from prunus.patterns import NM, Pattern
from prunus.solve.sweep import sparsegpt
from prunus.stream.stream import stream
from prunus.train import Ema, Swa, next_token
from prunus.train.capture import CapturedStep
from prunus.train.lr import linear_warmup_decay
from prunus.train.next_token import next_token_loss
from prunus.train.sharded import asked, sharded
from prunus.train.train import classification_loss, train
from tests.laws.test_capture import Played
from tests.processes import run_ranks

STEPS, KILLED = 4, 2
KINDS = {"vectors": ["biases", "norms"], "mask_lora": ["mask_lora"], "full": ["full"], "head": ["head", "mask_lora"]}
KINDS["answers"] = ["biases", "norms"]
ENTRIES = 64 * 10  # of 8 x 64 x 16 logits, or half of them


def build(tied: bool = True, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, word_embed_proj_dim=16,
        max_position_embeddings=32, dropout=0.0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = OPTForCausalLM(config).to(dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def ids(step: int) -> Tensor:
    return torch.randint(64, (8, 16), generator=torch.Generator().manual_seed(step))


def answers(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows with their labels: the later the row, the fewer, so that the ranks have unequally many."""
    left_out = torch.arange(16) < torch.arange(3, 15)[: len(rows), None] + rows[0, 0] % 4
    return rows, rows.masked_fill(left_out, IGNORED)


def retrain(
    kind: str,
    *,
    checkpoint: Path | None = None,
    steps: int = STEPS,
    killed: int | None = None,
    seen: list[Any] | None = None,
    device: torch.device | None = None,
    **asked: Any,
) -> Any:
    """A pruned model whose parameters of one kind were trained, merged."""
    model = build(tied=kind != "head").to(device)
    views = find_layers(model)
    generator = torch.Generator().manual_seed(1)
    masks = Masks({v.parameter: torch.rand(v.shape, generator=generator) < 0.5 for v in views})
    masks.apply_(model)
    adaptation = adapt(model, KINDS[kind], masks=masks, views=views, rank=2)
    # A key's bias has no gradient but rounding, which Adam's usual epsilon would make a step of.
    cuda = device is not None
    optimizer = torch.optim.AdamW(
        adaptation.param_groups(1e-2), weight_decay=0.0, eps=1e-4, fused=cuda or None, capturable=cuda
    )

    def loss(wrapped: nn.Module, batch: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        if seen is not None:
            seen.append((wrapped, [each for each in wrapped.parameters() if isinstance(each, DTensor)]))
        return next_token_loss(wrapped, batch)

    def batches(step: int) -> Tensor | tuple[Tensor, Tensor]:
        if killed is not None and step == 2 * killed:
            raise KeyboardInterrupt
        return answers(ids(step)) if kind == "answers" else ids(step)

    with recomputed(model):
        train(
            model, batches, optimizer, linear_warmup_decay(steps), steps=steps, loss=loss, accumulate=2, clip=0.5,
            masks=masks if kind == "full" else None, checkpoint=checkpoint, save_seconds=0, **asked,
        )  # fmt: skip
    adaptation.merge_()
    masks.check(model)
    return model


def prune(seen: list[str] | None = None) -> Any:
    """A model whose blocks were pruned by SparseGPT, the windows and the layers shared."""
    model = build()
    criterion = sparsegpt()

    def solver(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        if seen is not None:
            seen.append(layer.name)
        assert layer.inputs is not None
        assert layer.inputs.tokens == 6 * 16, "every rank's windows"
        return criterion.solve(layer, pattern, kept)

    tokens = torch.cat([ids(100)[:6]])
    shared = ranks.count() > 1
    stream(
        model,
        replace(criterion, solve=solver),
        NM(2, 4),
        0.5,
        tokens=tokens,
        batch_size=2,
        shared=shared,
        include=["*"],
    )
    return model


def launch(folder: Path, what: Callable[[Path], object], *, fsdp: bool) -> dict[str, dict[str, Tensor]]:
    """The weights that two ranks ended with, by what was done."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if fsdp else {}  # as `accelerate launch` says it
    run_ranks(rank, what, folder, folder=folder, environment=asked)
    return torch.load(folder / "model.pt")


def check_close(found: dict[str, Tensor], model: nn.Module) -> None:
    assert found.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module", params=[False, True], ids=["replicated", "sharded"])
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, dict[str, Tensor]]:
    return launch(tmp_path_factory.mktemp("ranks"), ranks_train, fsdp=request.param)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_what_one_trains(trained: dict[str, dict[str, Tensor]], kind: str) -> None:
    expected = retrain(kind)
    before = build(tied=kind != "head").state_dict()
    assert any(not torch.equal(value, before[name]) for name, value in expected.state_dict().items())
    check_close(trained[kind], expected)


@pytest.mark.slow
def test_two_ranks_whose_steps_are_recorded_train_what_one_trains(tmp_path: Path) -> None:
    """On a CPU, where what is "recorded" is called again: gradients are averaged in the step, not by hooks."""
    for kind, found in launch(tmp_path, ranks_record, fsdp=False).items():
        check_close(found, retrain(kind.partition(",")[0]))


@pytest.mark.slow
def test_two_ranks_end_with_the_same_statistics(tmp_path: Path) -> None:
    assert launch(tmp_path, ranks_normalise, fsdp=False)["alike"]["1.num_batches_tracked"] == STEPS


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("kind", KINDS)
def test_two_gpus_whose_steps_are_recorded_train_what_one_trains(tmp_path: Path, kind: str) -> None:
    run_ranks(rank_on_gpu, kind, tmp_path, folder=tmp_path, environment={"RANKS_BACKEND": "cpu:gloo,cuda:nccl"})


@pytest.mark.slow
def test_two_ranks_prune_what_one_prunes(tmp_path: Path) -> None:
    found, expected = launch(tmp_path, rank_prunes, fsdp=False)["prune"], prune()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name] == 0, value == 0), name
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_rank_that_fails_alone_does_not_wait_in_a_gathering(tmp_path: Path) -> None:
    assert not launch(tmp_path, rank_fails, fsdp=True)


def test_the_first_version_of_fsdp_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not asked()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="--fsdp_version 2"):
        asked()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert asked()


def test_an_optimizer_that_has_stepped_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="make a new one"), sharded(model, optimizer):
        pass


def rank_trains(kind: str, folder: Path) -> Any:
    chunks: list[int] = []
    seen: list[Any] = []
    checkpoint = folder / f"{kind}.pt"
    own = next_token._Tail.logits

    def logits(self: Any, rows: Tensor) -> Tensor:
        chunks.append(len(rows))
        return own(self, rows)

    next_token._Tail.logits = logits  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        retrain(kind, checkpoint=checkpoint, killed=KILLED)
    model = retrain(kind, checkpoint=checkpoint, seen=seen)
    next_token._Tail.logits = own  # type: ignore[method-assign]
    assert len(seen) == 2 * (STEPS - KILLED), "resumed from the checkpoint"
    rows = 40 if kind in ("full", "head") else 10  # fewer and larger where each forms the gradient of the head
    assert max(chunks) == rows, "logits in chunks, not in full"
    wrapped, parts = seen[0]
    assert bool(parts) == asked()
    if asked():
        assert len(parts) == len(list(wrapped.parameters()))
        units = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
        assert len(units) == 2 + 1, "each block by itself, and the rest"
        held = sum(each.to_local().numel() for each in parts)
        assert held < 0.6 * sum(each.numel() for each in parts), "this rank holds its half"
    assert not any(isinstance(each, DTensor) for each in model.parameters())
    return model


def rank_fails(folder: Path) -> None:
    """One rank's error ends its part without waiting for the other; an error that both have gives the weights back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), sharded(model, torch.optim.SGD(model.parameters())):
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ranks.all_failed.__defaults__ = (0.2,)
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(RuntimeError, match="failed alone"), sharded(model, optimizer):  # noqa: PT012
        if ranks.index() == 0:
            time.sleep(1.0)
            os._exit(0)  # leaving properly would wait for the other's part
        raise KeyError
    torch.save({}, folder / "model.pt")
    os._exit(0)


def ranks_train(folder: Path) -> dict[str, Any]:
    return {kind: rank_trains(kind, folder) for kind in KINDS}


def ranks_normalise(folder: Path) -> dict[str, Any]:
    """BatchNorm keeps statistics of what its own process saw, which pruning by what layers receive would go by."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        return torch.randn(8, 4, generator=torch.Generator().manual_seed(step)), torch.arange(8) % 2

    ema, swa = Ema(0.5), Swa(0.5, every=1)
    train(model, batch, optimizer, lambda _: 1.0, steps=STEPS, loss=classification_loss(), during=[ema, swa])
    return {"alike": model, "ema": ema, "swa": swa}


def ranks_record(folder: Path) -> dict[str, Any]:
    loop: Any = sys.modules["prunus.train.train"]
    loop.CapturedStep, loop.settled = Played, lambda _: nullcontext()
    loop.captures = lambda *_, **__: True
    seen, sent, models = list[Any](), list[int](), dict[str, Any]()
    mean = ranks.mean_
    ranks.mean_ = lambda tensors: (sent.append(1), mean(tensors))  # type: ignore[assignment]
    ranks._BUCKET = 100  # values: some tensors share a message, some do not
    for kind in KINDS:
        models[kind] = retrain(kind, seen=seen)
        assert len(sent) == STEPS, "once a step, whatever is accumulated"
        sent.clear()
    with pytest.raises(KeyboardInterrupt):
        retrain("full", checkpoint=folder / "full.pt", killed=KILLED)
    models["full, resumed"] = retrain("full", checkpoint=folder / "full.pt", seen=seen)
    attempt, failures = Played._attempt, list[str]()
    Played._attempt = lambda self, masked: "no" if ranks.index() else attempt(self, masked)  # type: ignore[method-assign]
    loop.CapturedStep = lambda *given, **how: Played(*given, **how | {"agree": lambda why: said(failures, how, why)})
    models["mask_lora, one could not"] = retrain("mask_lora", seen=seen)
    assert failures == ["no"], "this process, too, though it could have"
    assert not any(isinstance(wrapped, DistributedDataParallel) for wrapped, _ in seen)
    for name, value in models["full"].state_dict().items():
        assert torch.equal(value, models["full, resumed"].state_dict()[name]), name
    return models


def said(failures: list[str], how: dict[str, Any], why: str) -> str:
    failures.append(how["agree"](why))
    return failures[-1]


def rank_on_gpu(kind: str, folder: Path) -> None:
    """Recorded steps, those of DistributedDataParallel, and one process's own, each twice on two GPUs."""
    device = ranks.join(torch.device("cuda"))
    recordings = list[CapturedStep]()
    record = CapturedStep._record
    CapturedStep._record = lambda self, parts: (record(self, parts), recordings.append(self))  # type: ignore[method-assign]
    train_ = partial(retrain, kind, device=device, steps=5)
    alone, hooked = train_(shared=False), train_()
    assert not recordings
    recorded = train_(capture=True)
    with pytest.raises(KeyboardInterrupt):
        train_(capture=True, checkpoint=folder / "c.pt", killed=4)
    assert len(recordings) == 2, "step 3 is the first to be recorded"
    resumed = train_(capture=True, checkpoint=folder / "c.pt")
    assert len(recordings) == 3
    assert not any(each.failure for each in recordings)
    ends = {name: value.cpu() for name, value in recorded.state_dict().items()}
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, ends)
    for name, end in ends.items():
        assert all(torch.equal(end, other[name]) for other in everyone), "the same on both ranks"
        assert torch.equal(end, resumed.state_dict()[name].cpu()), f"{name}: resumed"
        for other in (alone, hooked):
            torch.testing.assert_close(end, other.state_dict()[name].cpu(), rtol=1e-3, atol=1e-5, msg=name)


def rank_prunes(folder: Path) -> dict[str, Any]:
    seen: list[str] = []
    model = prune(seen)
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, seen)
    assert not set(everyone[0]) & set(everyone[1]), "each layer is solved once"
    assert all(everyone)
    return {"prune": model}


def rank(what: Callable[[Path], dict[str, Any]], folder: Path) -> None:
    """One of the two: does it, and the main one saves what both ended with."""
    ranks.join(torch.device("cpu"))
    next_token._ENTRIES = ENTRIES
    ends = {name: model.state_dict() for name, model in what(folder).items()}
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, ends)
    for name, end in everyone[0].items():
        assert all(torch.equal(each, everyone[1][name][key]) for key, each in end.items()), "the same on both ranks"
    if ranks.is_main():
        torch.save(ends, folder / "model.pt")
    ranks.wait()
    ranks.leave()
