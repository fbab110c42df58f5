"""Distillation against its formula written out and differentiated by autograd: whole, in chunks, for classifiers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.adapt import adapt
from prunus.layers import find_layers
from prunus.prune import prune
from prunus.train import (
    distilled_classification,
    distilled_next_token,
    distilled_regression,
    lighten_,
    next_token,
    next_token_loss,
    train,
)
from prunus.train.distill import _Filled, _Mixed
from tests.conftest import VOCABULARY, tiny_llama
from tests.laws.test_entropy import CLOSE, PATHS, programs
from tests.laws.test_next_token import build, gradients, tokens


def written_out(z: Tensor, taught: Tensor, labels: Tensor, weight: float, temperature: float) -> Tensor:
    """a T^2 sum_c p_T (log p_T - log p_S) + (1 - a) (-log p_S(label)), mean over rows."""
    z, taught = z.double(), taught.double()
    p = (taught / temperature).softmax(-1)
    divergence = (p * ((taught / temperature).log_softmax(-1) - (z / temperature).log_softmax(-1))).sum(-1)
    entropy = -z.log_softmax(-1).gather(1, labels[:, None])[:, 0]
    return (weight * temperature**2 * divergence + (1 - weight) * entropy).mean()


def plain(teacher: nn.Module, weight: float, temperature: float) -> Any:
    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        z = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        with torch.no_grad():
            taught = teacher(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        return written_out(z, taught, ids[:, 1:].flatten(), weight, temperature)

    return loss


def pair(family: str) -> tuple[Any, Any, Tensor]:
    teacher = build(family)
    model = copy.deepcopy(teacher)
    prune(model, sparsity=0.5, views=[view for view in find_layers(model) if view.shape[0] != 64])
    return model, teacher, tokens(min(64, model.config.vocab_size))


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 1.0), (0.3, 2.0), (1.0, 4.0)])
@pytest.mark.parametrize("family", ["llama", "gemma2-capped", "phi-bias"])
def test_value_and_gradients_are_those_of_the_formula(
    family: str, weight: float, temperature: float, chunked: bool, monkeypatch: pytest.MonkeyPatch
):
    if chunked:
        monkeypatch.setattr(next_token, "_ENTRIES", 64 * 5)  # five rows at a time
    model, teacher, ids = pair(family)
    expected, wanted = gradients(model, ids, plain(teacher, weight, temperature))
    value, found = gradients(model, ids, distilled_next_token(teacher, weight, temperature))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-6 + 1e-5 * grad.abs().max().item(), msg=name)
    with torch.no_grad():
        again = distilled_next_token(teacher, weight, temperature)(model, ids)
    torch.testing.assert_close(again.double(), expected, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("path", "device"), PATHS)
@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1), (1, 1.0), (0.3, 2.0), (1.0, 4.0)])
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 4096), (2, 5001)])
def test_rows_have_the_loss_and_the_gradient_of_autograd(
    shape: tuple[int, int], dtype: torch.dtype, weight: float, temperature: float, path: str, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    rising = torch.linspace(0, 6, shape[1])  # so that the largest come late
    z, taught = ((3 * torch.randn(shape, generator=generator) + rising).to(device, dtype) for _ in range(2))
    y = torch.randint(shape[1], shape[:1], generator=generator).to(device)
    wide = z.double().requires_grad_()
    expected = shape[0] * written_out(wide, taught, y, weight, temperature)
    wanted = torch.autograd.grad(expected, wide)[0]
    with programs(path):
        value, dz = _Mixed(weight, temperature).gradient(z, taught, y)
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    near = 1e-6 if dtype != torch.float32 else 3e-7
    torch.testing.assert_close(dz.double(), wanted, rtol=10 * CLOSE[dtype], atol=near)
    assert dz.dtype == dtype


@pytest.mark.parametrize(("path", "device"), PATHS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_huge_and_hidden_logits_and_strides_have_their_loss(temperature: float, path: str, device: str) -> None:
    hidden = float("-inf")
    z = torch.tensor([[3e4, -3e4, 0.0], [hidden, 2.0, 1.0], [-3e4, -3e4, -3e4]], device=device)
    taught = torch.tensor([[3e4, 0.0, hidden], [hidden, 1.0, 3.0], [2.0, 0.0, 1.0]], device=device)
    y = torch.tensor([0, 2, 0], device=device)
    p = (taught.double() / temperature).softmax(-1)
    student = (z.double() / temperature).log_softmax(-1)
    kl = torch.where(p > 0, p * (p.log() - student), 0.0).sum()
    entropy = torch.nn.functional.cross_entropy(z.double(), y, reduction="sum")
    wanted = 0.5 * temperature * (student.exp() - p) + 0.5 * (z.double().softmax(-1) - F.one_hot(y, 3))
    for laid in (lambda x: x, lambda x: x.t().contiguous().t(), lambda x: torch.cat([x, x], 1)[:, :3]):
        with programs(path):
            value, dz = _Mixed(0.5, temperature).gradient(laid(z), laid(taught), y)
        torch.testing.assert_close(value.double(), 0.5 * temperature**2 * kl + 0.5 * entropy, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dz.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("path", "device"), PATHS)
def test_logits_that_are_no_numbers_give_a_loss_that_is_none(path: str, device: str) -> None:
    good, bad = torch.zeros(1, 2, device=device), torch.tensor([[0.0, float("nan")]], device=device)
    for z, taught in ((good, bad), (bad, good)):
        with programs(path):
            assert _Mixed(0.5, 1.0).gradient(z, taught, torch.tensor([0], device=device))[0].isnan()


def test_a_teacher_runs_in_the_precision_of_training():
    model, teacher, ids = pair("llama")
    seen = set()
    teacher.model.layers[0].mlp.register_forward_hook(lambda _module, _inputs, output: seen.add(output.dtype))
    train(
        model,
        lambda _step: ids,
        torch.optim.SGD(model.parameters(), lr=0.01),
        lambda _step: 1.0,
        steps=1,
        loss=distilled_next_token(teacher),
        precision="bf16",
    )
    assert seen == {torch.bfloat16}


def test_a_teacher_that_agrees_teaches_nothing():
    model, _, ids = pair("llama")
    value, found = gradients(model, ids, distilled_next_token(model, weight=1.0))
    assert abs(float(value)) < 1e-6
    assert all(float(grad.abs().max()) < 1e-6 for grad in found.values())


def test_adapters_learn_from_the_dense_model_under_their_masks():
    teacher, ids = tiny_llama(), tokens(VOCABULARY, batch=4, length=16)
    model = copy.deepcopy(teacher)
    masks, views = prune(model, sparsity=0.7), find_layers(model)
    adaptation = adapt(model, ["mask_lora"], masks=masks, views=views, rank=8)
    loss = distilled_next_token(teacher, weight=1.0)
    optimizer = torch.optim.AdamW(adaptation.param_groups(2e-2))
    losses = train(model, lambda _: ids, optimizer, lambda _: 1.0, steps=40, loss=loss).losses
    assert losses[-1] < 0.5 * losses[0]
    adaptation.merge_()
    masks.check(model)


@pytest.mark.parametrize(("weight", "temperature"), [(0.5, 1.0), (1.0, 3.0)])
def test_classifiers_have_the_formula_too(weight: float, temperature: float):
    torch.manual_seed(0)
    model, teacher = nn.Linear(6, 5), nn.Linear(6, 5)
    x, labels = torch.randn(7, 6), torch.randint(5, (7,))
    value = distilled_classification(teacher, weight, temperature)(model, (x, labels))
    expected = written_out(model(x), teacher(x), labels, weight, temperature)
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)  # float32: exp and log differ by processor
    own, other = (torch.autograd.grad(each, model.weight)[0] for each in (value, expected))
    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6)
    smoothed = distilled_classification(teacher, weight, temperature, smoothing=0.2)(model, (x, labels))
    spread = torch.full((7, 5), 0.04).scatter_add_(1, labels[:, None], torch.full((7, 1), 0.8))
    moved = ((F.one_hot(labels, 5) - spread) * model(x).log_softmax(-1)).sum(-1).mean()
    torch.testing.assert_close(smoothed, value + (1 - weight) * moved)


def beside(teacher: nn.Module, model: nn.Module) -> int:
    """Bytes of tensors that a teacher holds and the model does not."""
    theirs = {each.data_ptr() for each in (*model.parameters(), *model.buffers())}
    own = {each.data_ptr(): each.numel() * each.element_size() for each in (*teacher.parameters(), *teacher.buffers())}
    return sum(size for place, size in own.items() if place not in theirs)


def rotary(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in model.buffers())


@pytest.mark.parametrize("trained", [["mask_lora"], ["norms", "scale_lora"], ["lora_prune"]])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "opt"])
def test_a_light_teacher_has_the_bits_of_a_dense_copy_and_costs_what_was_pruned(family: str, trained: list[str]):
    dense = build(family)
    model, ids = copy.deepcopy(dense), tokens(min(64, dense.config.vocab_size))
    views = find_layers(model)
    masks = prune(model, sparsity=0.5, views=views)
    masks = masks & prune(model, sparsity=0.6, views=views, within=masks)
    adapt(model, trained, masks=masks, views=views, rank=2)
    teacher = lighten_(copy.deepcopy(dense).requires_grad_(False), model)
    for part in (2, 0.5):  # trained or not, the teacher stays what it was
        for one in (slice(None), slice(0, 1)):
            expected, wanted = gradients(model, ids[one], distilled_next_token(dense))
            value, found = gradients(model, ids[one], distilled_next_token(teacher))
            assert torch.equal(value, expected)
            assert all(torch.equal(found[name], grad) for name, grad in wanted.items())
        with torch.no_grad():
            for each in model.parameters():
                each.mul_(part if each.requires_grad else 1)
    pruned = sum(int((~mask).sum()) for mask in masks.values())
    bits = sum(-(-mask.numel() // 8) for mask in masks.values())
    norms = sum(each.numel() for name, each in dense.named_parameters() if "norm" in name or "ln" in name)
    assert beside(teacher, model) <= 4 * (pruned + norms * ("norms" in trained)) + bits + rotary(dense)
    assert not any(each._whole is not None for each in teacher.modules() if isinstance(each, _Filled))


def test_a_light_teacher_keeps_what_moved_or_is_trained():
    dense, ids = tiny_llama(), tokens(VOCABULARY)
    before = dense(ids).logits.detach()
    model = copy.deepcopy(dense)
    prune(model, sparsity=0.5)
    moved = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        moved.mul_(1.5)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    teacher = lighten_(dense, model)
    table = model.get_input_embeddings().weight
    assert teacher is dense
    assert teacher.get_input_embeddings().weight.data_ptr() == table.data_ptr()
    assert teacher.model.layers[0].mlp.up_proj.weight.data_ptr() != moved.data_ptr()
    with torch.no_grad():
        for parameter in (*(each for each in model.parameters() if each.requires_grad), moved):
            parameter.add_(1.0)
        assert torch.equal(teacher(ids).logits, before)


def test_a_light_teacher_of_a_model_of_which_all_is_trained_is_a_copy():
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    prune(model, sparsity=0.5)
    size = sum(each.numel() * each.element_size() for each in dense.parameters())
    assert beside(lighten_(dense, model), model) == size + rotary(dense)


def test_values_are_compared_one_by_one():
    model, teacher, x = nn.Linear(4, 1), nn.Linear(4, 1), torch.randn(8, 4)
    loss, values = distilled_regression(teacher, 0.25), x[:, :1] ** 2
    expected = 0.25 * (model(x) - teacher(x)).square().mean() + 0.75 * (model(x) - values).square().mean()
    assert torch.allclose(loss(model, (x, values)), expected)
    assert torch.allclose(loss(model, (x, values[:, 0])), expected)
    with pytest.raises(ValueError, match="8 logits for 7 values"):
        loss(model, (x, values[1:]))


@pytest.mark.parametrize("weight", [-1.0, 0.0, 1.5, float("nan")])
def test_a_weight_that_would_drive_a_network_from_its_labels_is_refused(weight: float):
    with pytest.raises(ValueError, match=r"a weight in \(0, 1\]"):
        distilled_regression(nn.Linear(4, 1), weight)


def test_what_is_refused():
    for weight, temperature in ((0.0, 1.0), (1.5, 1.0), (0.5, 0.0), (0.5, float("inf")), (float("nan"), 1.0)):
        with pytest.raises(ValueError, match="distillation needs a weight in \\(0, 1\\] and a temperature > 0"):
            distilled_next_token(nn.Linear(1, 1), weight, temperature)
    model, teacher = nn.Linear(6, 5), nn.Linear(6, 4)
    with pytest.raises(ValueError, match="the teacher returns 4 logits and the model 5"):
        distilled_classification(teacher)(model, (torch.zeros(2, 6), torch.tensor([0, 1])))


def test_cross_entropy_is_the_limit():
    model, teacher, ids = pair("llama")
    with torch.no_grad():
        near = distilled_next_token(teacher, weight=1e-6)(model, ids)
        torch.testing.assert_close(near, next_token_loss(model, ids), rtol=1e-4, atol=0)


@pytest.mark.parametrize("chunked", [False, True])
def test_prompts_are_left_out(chunked: bool, monkeypatch: pytest.MonkeyPatch):
    if chunked:
        monkeypatch.setattr(next_token, "_ENTRIES", 64 * 5)
    model, teacher, ids = pair("llama")
    labels = ids.clone()
    labels[:, :5] = -100
    wanted = labels[:, 1:].flatten() != -100
    with torch.no_grad():
        z, taught = (each(ids).logits[:, :-1].flatten(0, 1)[wanted] for each in (model, teacher))
        expected = written_out(z, taught, ids[:, 1:].flatten()[wanted], 0.5, 2.0)
        value = distilled_next_token(teacher, 0.5, 2.0)(model, (ids, labels))
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
