"""MaskLLM: masks that are learnt, against all there are, finite differences and the exact expectation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunus.during import MaskLLM
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.train import During, Plan, train

CHOICES = torch.tensor([[float(i in kept) for i in range(4)] for kept in itertools.combinations(range(4), 2)])


def attached(model: nn.Module, steps: int = 2, **options: object) -> MaskLLM:
    method = MaskLLM(0.5, **options)
    method.attach(model, torch.optim.Adam(model.parameters(), lr=0.1), Plan(steps, steps, tuple(find_layers(model))))
    return method


def test_the_best_of_all_masks_is_learnt_and_weights_stay():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 8, generator=generator) @ torch.randn(8, 8, generator=generator)
    w = torch.randn(3, 8, generator=generator)
    model = nn.Sequential(nn.Linear(8, 3))
    model[0].weight.data.copy_(w)
    bias = model[0].bias.detach().clone()

    def lost(weight: Tensor) -> Tensor:
        return ((weight - w) @ x.T).square().sum(1)

    every = torch.stack([torch.cat(pair) for pair in itertools.product(CHOICES, CHOICES)])  # (36, 8)
    best = every[torch.stack([lost(w * mask) for mask in every]).argmin(0)].bool()
    by_size = torch.zeros(3, 8).view(-1, 4).scatter(1, w.abs().view(-1, 4).topk(2).indices, 1.0).view(3, 8).bool()
    assert not torch.equal(best, by_size)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    learned = MaskLLM(0.5, keep=0.0)
    loss = lambda model, batch: (model(batch) - bias - batch @ w.T).square().mean()  # noqa: E731
    train(model, lambda step: x, optimizer, lambda step: 1.0, steps=120, loss=loss, during=[learned])
    masks = learned.finish()
    assert torch.equal(masks["0.weight"], best)
    assert torch.equal(model[0].weight.detach(), torch.where(best, w, 0.0))
    assert torch.equal(model[0].bias.detach(), bias)
    assert all(each.requires_grad for each in model.parameters())


class Failing(During):
    """Fails when it is attached, or when the first step is done."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook = hook

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan) -> None:
        self._fail("attach")

    def after_step(self, step: int) -> None:
        self._fail("after_step")

    def _fail(self, hook: str) -> None:
        if hook == self.hook:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("hook", ["attach", "after_step"])
def test_a_training_that_fails_leaves_nothing_frozen(hook: str):
    model = nn.Linear(4, 1)
    model.bias.requires_grad_(False)
    optimizer, x = torch.optim.Adam(model.parameters(), lr=0.1), torch.ones(2, 4)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    with pytest.raises(RuntimeError, match="on purpose"):
        train(model, lambda _: x, optimizer, lambda _: 1.0, steps=2, loss=loss, during=[MaskLLM(0.5), Failing(hook)])
    assert model.weight.requires_grad
    assert not model.bias.requires_grad


def test_weights_of_double_precision_are_masked_too():
    model = nn.Linear(4, 1, bias=False, dtype=torch.float64)
    learned, x = MaskLLM(0.5), torch.ones(2, 4, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loss = lambda model, batch: model(batch).square().mean()  # noqa: E731
    train(model, lambda step: x, optimizer, lambda step: 1.0, steps=2, loss=loss, during=[learned])
    assert learned.finish().table() == {"weight": (2, 4)}


def test_it_begins_near_the_masks_it_is_given():
    # S_0 = (1, 0, 0, 1) meets (01, 02, 03, 12, 13, 23) in 1, 1, 2, 0, 1, 1 weights, in 1 in the mean
    model = nn.Linear(4, 1, bias=False)
    method = attached(model, prior=Masks({"weight": torch.tensor([[True, False, False, True]])}), trust=2.0)
    assert method.logits[0].tolist() == [[0.0, 0.0, 2.0, -2.0, 0.0, 0.0]]
    assert method.finish()["weight"].tolist() == [[True, False, False, True]]


@pytest.mark.parametrize(
    "layer", [nn.Linear(8, 3), Conv1D(3, 8), nn.Conv2d(2, 3, (2, 2))], ids=lambda x: type(x).__name__
)
def test_gradients_are_those_of_the_loss_and_what_is_held_on_to(layer: nn.Module):
    method = attached(layer, keep=0.7).double()
    method.before_step(1)
    method.heat.copy_(torch.tensor([1.5, 0.8]))
    method.noise = [each.double() for each in method.noise]
    weight, (logits,) = layer.double().weight.detach(), method.logits
    toward = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()

    def loss() -> Tensor:
        return (method.weights()["weight"] - toward).square().sum()

    def asked() -> float:  # what autograd is not told of is a part of the gradient all the same
        drawn = method.weights()["weight"]
        return float(loss() - 0.7 * drawn.square().sum() / weight.square().sum())

    (grad,) = torch.autograd.grad(loss(), logits)
    for place in [(0, 0), (2, 3), (5, 5)]:
        ends = []
        for change in (1e-5, -1e-5):
            with torch.no_grad():
                logits[place] += change
                ends.append(asked())
                logits[place] -= change
        assert float(grad[place]) == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_micro_batches_hold_on_to_weights_once_a_step():
    ends: list[Tensor] = []
    for parts in (1, 4):
        layer, learned, x = nn.Linear(8, 3, bias=False), MaskLLM(0.5, keep=5.0), torch.ones(2, 8)
        nn.init.constant_(layer.weight, 0.5)
        layer.weight.data[:, ::2] = 1.0
        made = torch.optim.SGD(layer.parameters(), lr=1.0)
        loss = lambda layer, x: layer(x).square().mean()  # noqa: E731
        train(layer, lambda _, x=x: x, made, lambda _: 1.0, steps=3, loss=loss, during=[learned], accumulate=parts)
        ends.append(learned.logits[0].detach().clone())
    assert torch.allclose(*ends, atol=1e-6)


def test_draws_have_the_gradient_of_the_expectation():
    # 30,000 groups alike: the mean over their draws against the sum over all six masks
    w, a = torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([0.3, 0.7, -1.0, 0.2])
    model = nn.Linear(4, 30_000, bias=False)
    model.weight.data.copy_(w.expand(30_000, 4))
    method = attached(model, keep=0.0, trust=0.5)
    method.before_step(0)
    method.heat.copy_(torch.tensor([1.0, 0.3]))
    (logits,) = method.logits
    (grad,) = torch.autograd.grad((method.weights()["weight"] @ a).sum(), logits)
    z = logits[0].detach().clone().requires_grad_()
    (exact,) = torch.autograd.grad(z.softmax(0) @ (CHOICES * w) @ a, z)
    torch.testing.assert_close(grad.mean(0), exact, atol=0.02, rtol=0)
    assert exact.abs().max() > 0.1


@pytest.mark.parametrize(("shape", "said"), [(None, "has none"), ((4, 4), r"has one of \(4, 4\)")])
def test_a_prior_of_another_model_is_refused(shape, said: str):
    model = nn.Linear(8, 4)
    prior = Masks({} if shape is None else {"weight": torch.ones(shape, dtype=torch.bool)})
    with pytest.raises(ValueError, match=rf"a mask of 'weight' \(4, 8\), and its prior {said}"):
        MaskLLM(0.5, prior=prior).attach(
            model, torch.optim.SGD(model.parameters()), Plan(2, 2, tuple(find_layers(model)))
        )


def test_what_cannot_be_learnt_is_refused():
    for options, message in [
        ({"pattern": "unstructured"}, "take 2:4, say"),
        ({"temperature": (4.0, 0.0)}, "temperatures and scales > 0"),
        ({"keep": -1.0}, "keep >= 0"),
        ({"sparsity": 0.7}, "0.7"),
    ]:
        with pytest.raises(ValueError, match=message):
            MaskLLM(**{"sparsity": 0.5} | options)
