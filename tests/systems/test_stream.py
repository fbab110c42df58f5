"""The block pipeline: exact counts, memory and shards alike, kill and resume, and what a fit does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from prunus.blocks import chain as blocks
from prunus.layers import Layer, find_layers
from prunus.masks import Masks
from prunus.measure import streamed_perplexity
from prunus.patterns import NM, Block, Pattern, Unstructured
from prunus.score import Allocation, Criterion, uniform
from prunus.score.allocations import erk, evopress, global_, lamp, owl, uniform_plus
from prunus.score.criteria import magnitude, wanda
from prunus.score.tried import Tried
from prunus.shrink.language import choose_blocks
from prunus.solve.frank_wolfe import frank_wolfe
from prunus.solve.sweep import sparsegpt
from prunus.stream.reconstruct import Fit
from prunus.stream.sources import Memory, Shards
from prunus.stream.stream import stream, survey
from prunus.stream.work import Work
from prunus.train import StandIns
from tests.conftest import VOCABULARY, tiny_llama

TOKENS = torch.randint(VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(1))
WANDA = wanda


def run(model: LlamaForCausalLM, **changes: object) -> dict[str, torch.Tensor]:
    asked: dict[str, object] = {"tokens": TOKENS, "batch_size": 5} | changes
    streamed = stream(model, WANDA, Unstructured("row"), 0.5, **asked)  # type: ignore[arg-type]
    streamed.masks.check(model)
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_every_layer_reaches_its_count_and_the_rest_is_untouched() -> None:
    model, dense = tiny_llama(), tiny_llama()
    streamed = stream(model, WANDA, Unstructured("row"), 0.3, tokens=TOKENS)
    for name, mask in streamed.masks.items():
        assert int((~mask).sum()) == round(0.3 * mask.numel())
        kept = model.get_parameter(name)[mask]
        assert torch.equal(kept, dense.get_parameter(name)[mask])
    rest = set(dict(model.named_parameters())) - set(streamed.masks)
    assert "model.embed_tokens.weight" in rest
    assert all(torch.equal(model.get_parameter(name), dense.get_parameter(name)) for name in rest)
    assert [report.name for report in streamed.reports] == ["model.layers.0", "model.layers.1"]
    assert streamed.reports[0].sparsity == pytest.approx(0.3, abs=1e-3)


def test_a_weight_in_two_blocks_is_solved_once_with_what_both_receive() -> None:
    model = tiny_llama()
    first, second = model.model.layers
    second.mlp = first.mlp
    seen: list[torch.Tensor] = []
    hook = first.mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0].square().sum((0, 1))))
    dense = first.mlp.down_proj.weight.detach().clone()
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    masks = stream(model, WANDA, None, 0.5, tokens=TOKENS).masks
    assert not any(name.startswith("model.layers.1.mlp") for name in masks)
    kept = (dense.abs() * sum(seen).sqrt()).topk(24).indices
    assert torch.equal(
        masks["model.layers.0.mlp.down_proj.weight"], torch.zeros(32, 48, dtype=torch.bool).scatter(1, kept, True)
    )


@pytest.mark.parametrize("asked", [wanda, sparsegpt()], ids=lambda each: each.name)
def test_a_search_by_the_models_loss_keeps_the_budget(asked: Criterion) -> None:
    dense, found = tiny_llama(), {}
    with torch.no_grad():
        expected = dense(TOKENS).logits.log_softmax(-1)
    for allocation in (uniform, evopress(8, 6, step=0.2)):
        model = tiny_llama()
        masks = stream(model, asked, Unstructured("layer"), 0.75, tokens=TOKENS, allocation=allocation).masks
        masks.check(model)
        assert masks.sparsity == 0.75
        with torch.no_grad():
            other = model(TOKENS).logits.log_softmax(-1)
        found[allocation.name] = float((expected.exp() * (expected - other)).sum(-1).mean())
    assert found["evopress"] < found["uniform"]


def test_a_search_goes_by_the_hidden_states_of_a_model_without_a_head() -> None:
    model = tiny_llama().model
    assert stream(model, wanda, sparsity=0.5, tokens=TOKENS, allocation=evopress(1)).masks.sparsity == 0.5


def test_a_search_needs_the_model_in_memory(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path)
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="the allocation tries the whole model: leave out streaming"):
        stream(empty, magnitude, sparsity=0.5, tokens=TOKENS, allocation=evopress(1), source=Shards.of(empty, tmp_path))


def test_the_second_block_sees_what_the_pruned_first_block_gives() -> None:
    model = tiny_llama()
    run(model)
    seen: list[torch.Tensor] = []
    layer = model.get_submodule("model.layers.1.mlp.gate_proj")
    layer.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    dense = tiny_llama()
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):  # the second block as it was while it was calibrated
            target = model.get_submodule(f"model.layers.1.self_attn.{name}").weight
            target.copy_(tiny_llama().get_parameter(f"model.layers.1.self_attn.{name}.weight"))
        model(TOKENS)
    x = torch.cat(seen).flatten(0, 1)
    weight = tiny_llama().get_parameter("model.layers.1.mlp.gate_proj.weight").detach()
    score = weight.abs() * x.square().sum(0).sqrt()
    expected = score >= score.topk(score.shape[1] // 2, dim=1).values[:, -1:]
    assert torch.equal(dense.get_parameter("model.layers.1.mlp.gate_proj.weight") != 0, expected)


def test_shards_give_the_same_bits_as_memory(tiny_folder: Path) -> None:
    expected = run(AutoModelForCausalLM.from_pretrained(tiny_folder))
    config = AutoConfig.from_pretrained(tiny_folder)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    source = Shards.of(model, tiny_folder)
    work = Work(tiny_folder.parent / "shards-work", "key").open()
    streamed = stream(
        model, WANDA, Unstructured("row"), 0.5, tokens=TOKENS, source=source, work=work, batch_size=5,
        device="cpu",
    )  # fmt: skip
    assert all(parameter.is_meta for parameter in model.parameters()), "a finished block stayed in memory"
    for name in ("model.layers.0", "model.layers.1"):
        for key, value in work.tensors(name).items():
            assert torch.equal(value, expected[f"{name}.{key}"])
    assert streamed.masks.sparsity == 0.5


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    "fit", [None, Fit(steps=4, lr=1e-2), Fit(steps=4, lr=1e-2, inputs="dense", train=("mask_lora",))]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bits(tmp_path: Path, fit: Fit | None) -> None:
    expected = run(tiny_llama(), fit=fit)

    def kill(_: object) -> None:
        raise Killed

    work = Work(tmp_path, "job").open()
    with pytest.raises(Killed):
        run(tiny_llama(), fit=fit, work=work, on_block=kill)
    assert work.has("model.layers.0")
    assert not work.has("model.layers.1")
    solved: list[str] = []

    def solver(layer: Layer, pattern: object, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
        solved.append(layer.name)
        return WANDA.solve(layer, pattern, kept)  # type: ignore[arg-type]

    model = tiny_llama()
    streamed = stream(
        model, replace(WANDA, solve=solver), Unstructured("row"), 0.5, tokens=TOKENS, batch_size=5, fit=fit, work=work
    )
    assert_equal(expected, model.state_dict())
    assert all(name.startswith("model.layers.1.") for name in solved)
    assert solved
    assert len(streamed.masks) == 14


@pytest.mark.parametrize("train", ["full", "mask_lora"])
def test_what_dropout_draws_in_a_block_hangs_on_nothing_before(tmp_path: Path, train: str) -> None:
    def dropping() -> LlamaForCausalLM:
        model = tiny_llama()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        return model

    fit, work = Fit(steps=8, lr=1e-3, train=(train,)), Work(tmp_path, "job").open()
    torch.manual_seed(1)
    expected, plain = run(dropping(), fit=fit), run(tiny_llama(), fit=fit)
    assert not torch.equal(expected[name := "model.layers.0.mlp.up_proj.weight"], plain[name])

    def kill(_: object) -> None:
        raise Killed

    with pytest.raises(Killed):
        run(dropping(), fit=fit, work=work, on_block=kill)
    assert not work.has("model.layers.1")
    assert_equal(expected, run(dropping(), fit=fit, work=work))


def test_a_search_goes_on_and_tries_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = evopress(generations=3, offspring=4, step=0.1)
    expected, tried, measure = run(tiny_llama(), allocation=search), list[object](), Tried._loss

    def counted(self: Tried, counts: Mapping[str, int], batches: range) -> float:
        if len(tried) == 5:
            tried.append(None)
            raise Killed
        tried.append((tuple(counts.items()), batches))
        return measure(self, counts, batches)

    monkeypatch.setattr(Tried, "_loss", counted)
    work = Work(tmp_path, "job").open()
    with pytest.raises(Killed):
        run(tiny_llama(), allocation=search, work=work)
    with (tmp_path / "tries.jsonl").open("a") as file:
        file.write('["[1.0, [\\"model.la')  # the line at which a process died
    model = tiny_llama()
    assert_equal(expected, run(model, allocation=search, work=work))
    assert len(tried) > 8
    assert len(set(tried)) == len(tried)


def test_a_work_folder_of_another_job_is_refused(tmp_path: Path) -> None:
    Work(tmp_path, "one").open()
    with pytest.raises(ValueError, match="another job"):
        Work(tmp_path, "two").open()


@pytest.mark.parametrize("window", ["block", "half", "matrix"])
@pytest.mark.parametrize("inputs", ["pruned", "dense"])
@pytest.mark.parametrize("train", [("full",), ("mask_lora",)])
def test_a_fit_lowers_the_error_and_keeps_every_zero(window: str, inputs: str, train: tuple[str, ...]) -> None:
    model = tiny_llama()
    fit = Fit(window=window, inputs=inputs, train=train, steps=20, lr=5e-3)  # type: ignore[arg-type]
    streamed = stream(model, WANDA, NM(2, 4), 0.5, tokens=TOKENS, fit=fit, batch_size=4)
    streamed.masks.check(model)
    for report in streamed.reports:
        assert report.error_before is not None
        assert report.error_after is not None
        assert report.error_after < report.error_before
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    assert int((weight.unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2


@pytest.mark.parametrize("train", ["full", "mask_lora", "norms"])
def test_a_block_that_stays_dense_is_not_fitted(train: str) -> None:
    model, dense = tiny_llama(), tiny_llama().state_dict()
    fit = Fit(inputs="dense", train=(train,), steps=2)
    stream(model, WANDA, NM(2, 4), tokens=TOKENS, exclude=["layers.1.*"], fit=fit)
    block = model.model.layers[1].state_dict()
    assert_equal(block, {name: dense[f"model.layers.1.{name}"] for name in block})


@pytest.mark.parametrize("window", ["block", "half"])
def test_a_weight_in_two_blocks_is_fitted_in_the_first(window: Any, tmp_path: Path) -> None:
    ends: list[dict[str, torch.Tensor]] = []
    for folder in (None, tmp_path, tmp_path):  # without one, with one, and with the first block found in it
        model, fitted = tiny_llama(), list[dict[str, torch.Tensor]]()
        first, second = model.model.layers
        second.mlp, second.input_layernorm = first.mlp, first.input_layernorm

        def keep(_: object, first: Any = first, fitted: list[dict[str, torch.Tensor]] = fitted) -> None:
            fitted.append({name: value.clone() for name, value in first.state_dict().items()})

        work = None if folder is None else Work(folder, "one").open()
        fit = Fit(window=window, steps=4, lr=1e-3)
        stream(model, WANDA, NM(2, 4), tokens=TOKENS, fit=fit, work=work, on_block=keep).masks.check(model)
        assert_equal(*fitted)
        ends.append(model.state_dict())
        (tmp_path / "model.layers.1.safetensors").unlink(missing_ok=True)
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


@pytest.mark.parametrize("window", ["block", "half", "matrix"])
def test_the_steps_of_a_fit_run_in_its_precision(window: Any) -> None:
    model, seen = tiny_llama(), set[torch.dtype]()
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    with_gradients = lambda output: seen.add(output.dtype) if torch.is_grad_enabled() else None  # noqa: E731
    layer.register_forward_hook(lambda _module, _args, output: with_gradients(output))
    stream(model, WANDA, NM(2, 4), 0.5, tokens=TOKENS, fit=Fit(window=window, steps=1, precision="bf16"))
    assert seen == {torch.bfloat16}


@pytest.mark.parametrize("train", ["mask_lora", "norms", "full"])
def test_a_fit_that_fails_leaves_a_model_without_adapters(train: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama().bfloat16()
    how = [(type(each), each.training) for each in model.modules()]
    parameters = {name: (id(each), each.dtype, each.requires_grad) for name, each in model.named_parameters()}

    def fail(*_: Any) -> None:
        raise FloatingPointError("the loss is NaN")

    monkeypatch.setattr(StandIns, "train_", fail)
    with pytest.raises(FloatingPointError):
        stream(model, wanda, NM(2, 4), tokens=TOKENS, fit=Fit(steps=1, train=(train,)))  # type: ignore[arg-type]
    assert [(type(each), each.training) for each in model.modules()] == how
    found = {name: (id(each), each.dtype, each.requires_grad) for name, each in model.named_parameters()}
    assert found == parameters


def test_a_fit_that_would_hurt_is_put_back() -> None:
    fit = Fit(steps=3, lr=10.0)
    model = tiny_llama()
    streamed = stream(model, WANDA, Unstructured("row"), 0.5, tokens=TOKENS, fit=fit)
    assert all(report.error_after == report.error_before for report in streamed.reports)
    assert_equal(run(tiny_llama(), batch_size=8), {k: v.detach() for k, v in model.state_dict().items()})


def test_the_reported_error_is_that_of_the_block() -> None:
    model = tiny_llama()
    fit = Fit(steps=1, lr=1e-12)
    report = stream(model, WANDA, Unstructured("row"), 0.5, tokens=TOKENS, fit=fit).reports[0]
    pruned, dense = tiny_llama(), tiny_llama()
    stream(pruned, WANDA, Unstructured("row"), 0.5, tokens=TOKENS)
    with torch.no_grad():
        one = pruned(TOKENS, output_hidden_states=True).hidden_states[1]
        other = dense(TOKENS, output_hidden_states=True).hidden_states[1]
    assert report.error_before == pytest.approx(float((one - other).square().sum() / other.square().sum()), rel=1e-4)


@pytest.mark.parametrize("found", [0, 1])
def test_a_block_is_fitted_to_its_dense_outputs_where_it_shares_weights(found: int, tmp_path: Path) -> None:
    def shared() -> LlamaForCausalLM:
        model = tiny_llama()
        model.model.layers[1].mlp = model.model.layers[0].mlp
        return model

    def leaving(model: LlamaForCausalLM) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = model.model.layers[1].register_forward_hook(lambda _module, _args, y: seen.append(y))
        with torch.no_grad():
            model(TOKENS)
        hook.remove()
        return seen[0]

    fit = Fit(inputs="dense", steps=1, lr=1e-12)
    for _ in range(1 + found):  # the second time the first block is found
        model, work = shared(), Work(tmp_path, "one").open()
        report = stream(model, WANDA, Unstructured("row"), 0.5, tokens=TOKENS, fit=fit, work=work).reports[1]
        (tmp_path / "model.layers.1.safetensors").unlink()
    one, other = leaving(model), leaving(shared())
    assert report.error_before == pytest.approx(float((one - other).square().sum() / other.square().sum()), rel=1e-4)


def test_norms_of_a_half_are_refused_as_empty() -> None:
    with pytest.raises(ValueError, match="norms"):
        run(tiny_llama(), fit=Fit(window="half", train=("norms",)))


def test_sparsegpt_beats_wanda_beats_magnitude_on_the_output_of_a_block() -> None:
    errors = []
    for criterion in (sparsegpt(), WANDA, magnitude):
        model = tiny_llama()
        with torch.no_grad():  # inputs of very different scale, which magnitude does not see
            model.model.embed_tokens.weight.mul_(torch.logspace(-2, 1, 32))
        fit = Fit(steps=1, lr=1e-12)
        reports = stream(model, criterion, Unstructured("layer"), 0.5, tokens=TOKENS, fit=fit).reports
        errors.append(reports[0].error_before)
    assert errors == sorted(errors)


def test_masks_by_frank_wolfe_serve_a_block_better_and_are_fitted_like_others() -> None:
    fit = Fit(steps=20, lr=3e-3, train=("full",))
    found = {}
    for name, solver in (("wanda", WANDA), ("frank_wolfe", frank_wolfe())):
        model = tiny_llama()
        streamed = stream(model, solver, NM(2, 4), 0.5, tokens=TOKENS, fit=fit)
        streamed.masks.check(model)
        found[name] = streamed.reports[0]
    assert found["frank_wolfe"].error_before < 0.98 * found["wanda"].error_before
    assert found["frank_wolfe"].error_after < found["frank_wolfe"].error_before


@pytest.mark.parametrize(
    "allocation", [global_, lamp, erk, uniform_plus(), owl(c=2.0, lam=0.1)], ids=lambda each: each.__name__
)
def test_counts_of_an_allocation_are_hit_and_add_up(allocation: Allocation) -> None:
    model = tiny_llama()
    inputs = survey(model, tokens=TOKENS, batch_size=5)
    views = [view for view in find_layers(model) if view.name in inputs]
    scores = {
        v.name: wanda(Layer(v.name, v.matrix(model.get_parameter(v.parameter).detach()), inputs[v.name])) for v in views
    }
    counts = allocation(scores, 0.6)
    masks = stream(model, WANDA, Unstructured("layer"), 0.6, tokens=TOKENS, allocation=allocation, batch_size=5).masks
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total - round(0.6 * total)
    assert {v.name: int(masks[v.parameter].sum()) for v in views} == counts
    assert len(set(counts.values())) > 1


def largest(layer: Layer) -> torch.Tensor:
    """Scores that zeros win."""
    return -layer.weight.abs().float()


def drifting(scores: Any, sparsity: float) -> dict[str, int]:
    """Counts that are not monotone in the sparsity: the layers that keep the most keep the least at 0.75."""
    shares = [0.5, 0.1, 0.3, 0.1] if sparsity < 0.7 else [0.1, 0.5, 0.1, 0.3]
    exact = [(shares[i % 4] + 0.25 * (sparsity < 0.7)) * each.numel() for i, each in enumerate(scores.values())]
    return {name: int(count) for name, count in zip(scores, exact, strict=True)}


@pytest.mark.parametrize(
    ("criterion", "pattern", "allocation"),
    [
        (largest, Unstructured("layer"), uniform),
        (largest, Unstructured("row"), uniform),
        (largest, Block(2, 2), uniform),
        (largest, Unstructured("layer"), owl(lam=0.2)),
        (wanda, Unstructured("layer"), drifting),
        (wanda, Unstructured("layer"), global_),
        (magnitude, Unstructured("layer"), erk),
    ],
)
def test_what_an_earlier_phase_pruned_stays_pruned(criterion: Any, pattern: Pattern, allocation: Any) -> None:
    """Also where zeros score best, and where a layer should keep more than the phase before left it."""
    model = tiny_llama()
    asked: dict[str, Any] = {"tokens": TOKENS, "allocation": allocation, "include": ["model.layers.*", "lm_head"]}
    first = stream(model, criterion, pattern, 0.5, **asked).masks
    second = stream(model, criterion, pattern, 0.75, within=first, **asked).masks
    second.check(model)
    assert second.keys() == first.keys()
    assert not any(bool((second[name] & ~first[name]).any()) for name in first)
    if allocation is not drifting:
        assert second.sparsity == pytest.approx(0.75, abs=1e-3)


def test_a_phase_that_cannot_stay_within_the_one_before_is_refused() -> None:
    """A criterion without scores and a sparsity below the earlier one before any work, a pattern before its block."""
    model = tiny_llama()
    first = stream(model, WANDA, Unstructured("row"), 0.75, tokens=TOKENS).masks
    for criterion, pattern, sparsity, message in (
        (WANDA, Unstructured("row"), 0.5, "earlier masks left only"),
        (sparsegpt(), Unstructured("row"), 0.8, "sparsegpt cannot stay within earlier masks"),
        (WANDA, NM(2, 4), 0.5, r"2:4 cannot keep \d+ entries of 'model.layers.0"),
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            stream(model, criterion, pattern, sparsity, tokens=TOKENS, within=first)
        assert_equal(before, model.state_dict())


def test_masks_of_few_layers_limit_those_alone() -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    shape = tiny_llama().get_parameter(name).shape
    masks = stream(
        tiny_llama(),
        WANDA,
        Unstructured("row"),
        0.5,
        tokens=TOKENS,
        within=Masks({name: torch.arange(shape[1]).expand(shape) % 2 == 0}),
    ).masks
    assert not masks[name][:, 1::2].any()
    assert masks.sparsity == pytest.approx(0.5, abs=1e-3)


def test_the_criterion_says_what_is_measured() -> None:
    """Norms for Wanda, Gram matrices for SparseGPT, nothing for magnitude, whose blocks run once: to hand on."""
    for criterion, needs, runs in ((WANDA, "norms", 2), (sparsegpt(), "gram", 2), (magnitude, "", 1)):
        model, seen, calls = tiny_llama(), set[str](), []
        model.model.layers[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))

        def solve(
            layer: Layer, pattern: Any, kept: int, seen: set[str] = seen, criterion: Criterion = criterion
        ) -> Any:
            inputs = layer.inputs
            seen.add("" if inputs is None else "norms" if inputs.gram is None else "gram")
            return criterion.solve(layer, pattern, kept)

        stream(model, replace(criterion, solve=solve), NM(2, 4), tokens=TOKENS, batch_size=len(TOKENS))
        assert seen == {needs}
        assert len(calls) == runs


def test_a_pattern_says_its_sparsity_and_plain_scores_their_rows() -> None:
    def relative(layer: Layer) -> torch.Tensor:
        score = wanda(layer)
        return score / score.sum(1, keepdim=True)

    pruned = [stream(tiny_llama(), each, NM(2, 4), tokens=TOKENS).masks for each in (wanda, relative)]
    assert pruned[0] == pruned[1]
    rows = [stream(tiny_llama(), each, None, 0.5, tokens=TOKENS).masks for each in (wanda, relative)]
    assert rows[0] == rows[1] == stream(tiny_llama(), wanda, Unstructured("row"), 0.5, tokens=TOKENS).masks


@pytest.mark.parametrize("tokens", [TOKENS.flatten(), TOKENS[:0]], ids=["a stream", "none"])
def test_tokens_that_are_no_windows_are_refused(tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"tokens are windows \(samples, length\)"):
        stream(tiny_llama(), WANDA, Unstructured("row"), 0.5, tokens=tokens)


def test_tokens_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match=f"token {VOCABULARY} is not in the model's vocabulary of {VOCABULARY}"):
        run(tiny_llama(), tokens=torch.full((2, 16), VOCABULARY))


def test_a_compiled_model_is_pruned_as_the_plain_one_under_its_ordinary_names() -> None:
    expected = stream(tiny_llama(), WANDA, Unstructured("row"), 0.5, tokens=TOKENS).masks
    inside = tiny_llama()
    for layer in inside.model.layers:
        layer.compile(backend="eager")
    for model in (torch.compile(tiny_llama(), backend="eager"), inside):
        assert stream(model, WANDA, Unstructured("row"), 0.5, tokens=TOKENS).masks == expected
    assert inside.model.layers[0]._compiled_call_impl is not None


@pytest.mark.parametrize(
    ("criterion", "changes", "message"),
    [
        (sparsegpt, {}, "sparsegpt is no criterion; it makes one: call it"),
        (sparsegpt(), {"allocation": global_}, "sparsegpt .* no scores for global to compare"),
        (wanda, {"allocation": owl}, "owl is no allocation; it makes one"),
    ],
)
def test_what_cannot_be_done_is_refused_before_work(criterion: Any, changes: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match=message):
        stream(model, criterion, Unstructured("row"), 0.5, tokens=TOKENS, **changes)


def test_the_survey_sees_the_dense_model() -> None:
    model = tiny_llama()
    inputs = survey(model, tokens=TOKENS, batch_size=5)
    seen: list[torch.Tensor] = []
    model.get_submodule("model.layers.1.mlp.down_proj").register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        model(TOKENS)
    expected = torch.cat(seen).flatten(0, 1).square().sum(0)
    torch.testing.assert_close(inputs["model.layers.1.mlp.down_proj"].squares, expected)


def test_a_model_left_in_training_is_read_without_dropout_and_stays_in_training() -> None:
    found: list[dict[str, torch.Tensor]] = []
    for training in (False, True):
        model = tiny_llama()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
        model.train(training).model.norm.eval()
        torch.manual_seed(3)
        surveyed = survey(model, tokens=TOKENS)["model.layers.1.mlp.down_proj"].squares
        ahead = streamed_perplexity(model, TOKENS[0], window=8, source=Memory(model), device=torch.device("cpu"))
        gone = choose_blocks(model, TOKENS, 1)
        pruned = run(model, fit=Fit(steps=2))
        found.append(pruned | {"surveyed": surveyed, "said": torch.tensor([ahead, gone[0]])})
        assert (model.training, model.model.layers[0].training, model.model.norm.training) == (
            training,
            training,
            False,
        )
    assert_equal(*found)


def test_wrong_asks_are_refused_before_any_work() -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        stream(tiny_llama(), WANDA, Unstructured("row"), 1.5, tokens=TOKENS)
    with pytest.raises(ValueError, match=r"0\.7"):
        stream(tiny_llama(), WANDA, NM(2, 4), 0.7, tokens=TOKENS)
    with pytest.raises(ValueError, match="nothing to prune"):
        stream(tiny_llama(), WANDA, Unstructured("row"), 0.5, tokens=TOKENS, exclude=["*_proj"])


def test_statistics_are_float32_although_blocks_run_in_16_bits() -> None:
    inputs = survey(tiny_llama(), tokens=TOKENS, precision="bf16")
    exact = survey(tiny_llama(), tokens=TOKENS)
    name = "model.layers.0.self_attn.q_proj"  # its inputs were not touched by a 16-bit product yet
    assert torch.equal(inputs[name].squares, exact[name].squares)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_pruned_when_asked_for_from_what_reaches_it(tied: bool) -> None:
    torch.manual_seed(0)
    config = tiny_llama().config
    config.tie_word_embeddings = tied
    model = LlamaForCausalLM(config).eval()
    weight = model.lm_head.weight.detach().clone()
    include = ["*_proj", "lm_head"]
    streamed = stream(model, WANDA, Unstructured("row"), 0.5, tokens=TOKENS, include=include, batch_size=5)
    streamed.masks.check(model)
    assert streamed.reports[-1].name == "lm_head"
    seen: list[torch.Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda _m, _a, output: seen.append(output.detach()))
    if tied:  # calibration saw the dense embeddings
        dense = LlamaForCausalLM(config).eval()
        dense.load_state_dict(model.state_dict())
        model.model.embed_tokens.weight.data = weight
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    score = weight.abs() * torch.cat(seen).flatten(0, 1).square().sum(0).sqrt()
    name = next(name for name in streamed.masks if name.endswith(("lm_head.weight", "embed_tokens.weight")))
    expected = score >= score.topk(score.shape[1] // 2, dim=1).values[:, -1:]
    assert torch.equal(streamed.masks[name], expected)


def test_without_being_asked_the_head_stays_dense() -> None:
    masks = stream(tiny_llama(), WANDA, Unstructured("row"), 0.5, tokens=TOKENS).masks
    assert all(".layers." in name for name in masks)


@pytest.mark.parametrize("window", ["block", "half", "matrix"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_model_is_fitted_in_float32_and_comes_back(window: str, dtype: torch.dtype) -> None:
    model = tiny_llama().to(dtype)
    fit = Fit(window=window, steps=20, lr=3e-3)  # type: ignore[arg-type]
    streamed = stream(model, WANDA, NM(2, 4), 0.5, tokens=TOKENS, fit=fit, batch_size=4)
    streamed.masks.check(model)
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert all((r.error_after or 1) < (r.error_before or 0) for r in streamed.reports)


def test_arguments_that_depend_on_the_tokens_are_kept_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    original = blocks.capture

    def with_tokens(model: object, names: list[str], ids: torch.Tensor) -> object:
        hidden, calls = original(model, names, ids)
        for call in calls.values():
            call.kwargs["extra"] = ids.float()
        return hidden, calls

    monkeypatch.setattr(blocks, "capture", with_tokens)
    model = tiny_llama()
    _, arguments = blocks.embed(
        model, ["model.layers.0", "model.layers.1"], TOKENS, source=Memory(model), device=torch.device("cpu"),
        batch_size=4,
    )  # fmt: skip
    for call, ids in zip(arguments["model.layers.1"], TOKENS.split(4), strict=True):
        assert torch.equal(call.kwargs["extra"], ids.float())
