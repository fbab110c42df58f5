"""What only a GPU can show: bits after a kill, 16-bit paths, and that one block at a time is on the device."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from prunus.language import stages
from prunus.language.single import compress
from prunus.layers import Inputs
from prunus.patterns import NM, Unstructured
from prunus.recipe import Recipe, parse
from prunus.score import Criterion
from prunus.score.criteria import wanda
from prunus.solve.sweep import sparsegpt
from prunus.stream.reconstruct import Fit
from prunus.stream.sources import Shards
from prunus.stream.stream import stream
from prunus.stream.work import Work
from prunus.train import StandIns
from prunus.train import train as training
from prunus.train.capture import CapturedStep
from tests.conftest import tiny_llama
from tests.systems.test_compress import raw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def recipe(folder: Path, text: Path, out: Path, **changes: Any) -> Recipe:
    return parse(raw(folder, text, out, **changes) | {"device": "cuda"}, Recipe, "gpu")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_killed_run_ends_with_the_same_bits(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    compress(recipe(tiny_folder, text_file, tmp_path / "whole", precision=precision))
    asked = recipe(tiny_folder, text_file, tmp_path / "killed", precision=precision)

    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "retrain", kill)
        with pytest.raises(KeyboardInterrupt):
            compress(asked)
    result = compress(asked)
    assert result["perplexity"]["merged"]["text"] < result["perplexity"]["pruned"]["text"]
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "killed")
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("columns", [64, 2500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_of_16_bit_inputs_is_exact_to_float32_sums(dtype: torch.dtype, columns: int) -> None:
    x = torch.randn(3, 500, columns, device="cuda").to(dtype)
    inputs = Inputs(columns, gram=True, device="cuda")
    for part in x:
        inputs.add_(part)
    rows = x.double().flatten(0, 1)
    assert inputs.gram is not None
    torch.testing.assert_close(inputs.gram.double(), rows.T @ rows, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_are_exact_to_float32_sums(dtype: torch.dtype) -> None:
    x = torch.randn(500, 64, device="cuda").to(dtype)
    inputs = Inputs(64, device="cuda")
    for part in x.split(100):
        inputs.add_(part)
    torch.testing.assert_close(inputs.squares.double(), x.double().square().sum(0), rtol=1e-5, atol=0)


def test_gram_of_16_bit_inputs_takes_no_second_matrix() -> None:
    inputs, x = Inputs(4096, gram=True, device="cuda"), torch.randn(512, 4096, device="cuda").bfloat16()
    inputs.add_(x)  # handles and workspaces
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    inputs.add_(x)
    assert torch.cuda.max_memory_allocated() - start < 4 * 4096 * 4096 // 4


@pytest.mark.parametrize("train", [("full",), ("mask_lora",), ("scale_lora", "norms")])
def test_a_16_bit_model_is_fitted_on_the_gpu_and_keeps_its_zeros(train: tuple[str, ...]) -> None:
    model = tiny_llama().to(torch.bfloat16)
    tokens = torch.randint(260, (8, 32))
    fit = Fit(steps=20, lr=3e-3, train=train, precision="bf16")
    streamed = stream(
        model, sparsegpt(), NM(2, 4), 0.5, tokens=tokens, fit=fit, device="cuda", precision="bf16", batch_size=4
    )
    streamed.masks.check(model)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    assert all((r.error_after or 0) < (r.error_before or 0) for r in streamed.reports)


def test_only_one_block_is_on_the_device(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM(config)
    model.tie_weights()
    block = sum(parameter.numel() * 4 for parameter in model.model.layers[0].parameters())
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    stream(
        model.eval(), wanda, Unstructured("row"), 0.5, tokens=torch.randint(256, (4, 64)),
        source=Shards.of(model, tmp_path / "model"), work=Work(tmp_path / "work", "k").open(), device="cuda",
    )  # fmt: skip
    # The block, those before and after it, scores and ranks of its largest matrix (1.5 blocks here), activations; never
    # the twelve blocks.
    assert torch.cuda.max_memory_allocated() - start < 5.5 * block


@pytest.mark.parametrize("solver", [wanda, sparsegpt()])
def test_blocks_that_travel_beside_the_computing_end_with_the_bits_of_those_that_stay(
    tmp_path: Path, solver: Criterion
) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=8,
        num_key_value_heads=8, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokens = torch.randint(256, (8, 128), generator=torch.Generator().manual_seed(1))
    ends: list[dict[str, torch.Tensor]] = []
    for home in ("cuda", "cpu", "cpu", "cpu"):
        model = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).to(home)
        stream(model, solver, Unstructured("row"), 0.5, tokens=tokens, device="cuda", batch_size=2)
        assert {each.device.type for each in model.parameters()} == {home}
        ends.append({name: each.cpu() for name, each in model.state_dict().items()})
    for other in ends[1:]:
        for name, each in ends[0].items():
            assert torch.equal(each, other[name]), name


@pytest.mark.parametrize("window", ["block", "half", "matrix"])
@pytest.mark.parametrize("train", [("full",), ("norms", "mask_lora")])
def test_recorded_steps_of_a_fit_are_the_plain_ones(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, window: Any, train: tuple[str, ...]
) -> None:
    """Of ten calibration windows in batches of four: the last batch is smaller, and runs as it is."""
    if window != "block" and "norms" in train:
        pytest.skip("halves and matrices have no norms")
    found: list[dict[str, torch.Tensor]] = []
    for plain in ({}, {"capture": False}):
        fitting = lambda *args, plain=plain, **kwargs: training(*args, **(kwargs | plain))  # noqa: E731
        monkeypatch.setattr(sys.modules["prunus.stream.reconstruct"], "train", fitting)
        model = tiny_llama().cuda()
        fit = Fit(window=window, train=train, steps=20, lr=3e-3)
        tokens = torch.arange(160).view(10, 16) * 7 % 96
        streamed = stream(model, wanda, NM(2, 4), 0.5, tokens=tokens, fit=fit, batch_size=4)
        streamed.masks.check(model)
        assert all((each.error_after or 1) < (each.error_before or 0) for each in streamed.reports)
        found.append(model.state_dict())
    assert "not recorded" not in caplog.text
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=1e-2, atol=1e-3)


def blocks(count: int, width: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=count, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def fitted(
    model: LlamaForCausalLM, fit: Fit, monkeypatch: pytest.MonkeyPatch, once: bool, **asked: Any
) -> tuple[list[int], list[float]]:
    """How many replays each recorded step had, and the blocks' errors, after they were fitted on the GPU."""
    replays: list[int] = []
    record, wait = CapturedStep._record, CapturedStep._wait
    places: dict[int, int] = {}

    def recording(self: CapturedStep, parts: list[Any]) -> None:
        record(self, parts)
        places[id(self)] = len(replays)
        replays.append(0)

    def waiting(self: CapturedStep) -> None:
        replays[places[id(self)]] += 1
        wait(self)

    with monkeypatch.context() as patch:
        patch.setattr(CapturedStep, "_record", recording)
        patch.setattr(CapturedStep, "_wait", waiting)
        if not once:
            patch.setattr(StandIns, "find", lambda *_: None)
        tokens = torch.arange(160).view(10, 16) * 7 % 256  # the last of three batches is smaller
        streamed = stream(model, wanda, NM(2, 4), 0.5, tokens=tokens, fit=fit, device="cuda", batch_size=4, **asked)
    streamed.masks.check(model)
    return replays, [each.error_after or 0.0 for each in streamed.reports]


@pytest.mark.parametrize(
    ("window", "train", "recordings"),
    [
        ("block", ("full",), 1), ("block", ("norms", "mask_lora"), 1), ("half", ("full",), 2),
        ("half", ("scale_lora",), 2), ("matrix", ("full",), 4), ("block", ("lora_prune",), 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_blocks_are_fitted_through_one_recorded_step(
    monkeypatch: pytest.MonkeyPatch, window: Any, train: Any, recordings: int, precision: Any
) -> None:
    fit = Fit(window=window, train=train, steps=20, lr=1e-3, precision=precision)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    one, other = blocks(4, 64).to(dtype), blocks(4, 64).to(dtype)
    once, errors = fitted(one, fit, monkeypatch, True)
    anew, found = fitted(other, fit, monkeypatch, False)
    assert len(once) == recordings
    assert len(anew) == 4 * {"block": 1, "half": 2, "matrix": 7}[window]
    assert sum(once) > sum(anew), "the first steps are replayed too"
    assert errors == pytest.approx(found, rel=0.02)
    _, pruned = fitted(blocks(4, 64).to(dtype), Fit(steps=1, lr=1e-12, precision=precision), monkeypatch, False)
    assert all(after < before for after, before in zip(errors, pruned, strict=True))
    if precision == "fp32":
        for name, weight in one.state_dict().items():
            torch.testing.assert_close(weight, other.state_dict()[name], rtol=1e-2, atol=1e-3, msg=name)


def test_fitted_blocks_of_a_run_that_was_killed_have_the_bits_of_the_whole_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, whole, resumed = Fit(steps=20, lr=1e-3), blocks(4, 64), blocks(4, 64)
    fitted(whole, fit, monkeypatch, True)

    def kill(report: Any) -> None:
        if report.name.endswith("1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(blocks(4, 64), fit, monkeypatch, True, work=Work(tmp_path, "k").open(), on_block=kill)
    fitted(resumed, fit, monkeypatch, True, work=Work(tmp_path, "k").open())
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_one_recorded_step_for_all_blocks_takes_the_memory_of_one_more_block_in_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    peaks, left = list[int](), list[int]()
    for once in (False, False, True):  # the first makes handles and workspaces, which stay
        model = blocks(3, 1024).bfloat16()
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        start = torch.cuda.memory_allocated()
        highest: list[int] = []  # each run of `train` begins to count anew
        report = lambda _, highest=highest: highest.append(torch.cuda.max_memory_allocated())  # noqa: E731
        replays, _ = fitted(model, Fit(steps=8, lr=1e-4, precision="bf16"), monkeypatch, once, on_block=report)
        assert len(replays) == (1 if once else 3)
        peaks.append(max(highest) - start)
        gc.collect()
        torch.cuda.synchronize()
        left.append(torch.cuda.memory_allocated() - start)
    assert left[2] <= left[1] + (1 << 20), "no more stays than where each is recorded anew"
    values = sum(each.numel() for each in blocks(1, 1024).model.layers[0].parameters())
    assert peaks[2] - peaks[1] < (4 + 8 + 1) * values + (1 << 22), "weights, moments, masks"
