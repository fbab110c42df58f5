"""Every method that prunes while training, end to end on scikit-learn's handwritten digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from prunus import during
from prunus.data.images import ImageBatches, Images, read_images
from prunus.recipe.names import methods
from prunus.train import During
from prunus.train.lr import linear_warmup_decay
from prunus.train.train import classification_loss, train

METHODS = [each.__name__ for each in methods.members().values() if each is not during.MaskLLM]  # it trains no weights
OPTIONS: dict[str, dict[str, Any]] = {
    "RigL": {"delta": 10},
    "STR": {"init": -4.0},
    "CS": {"penalty": 1e-4},
    "DST": {"penalty": 1e-4},
}
STEPS = 120


@pytest.fixture(scope="module")
def digits() -> tuple[Images, Images]:
    return read_images("digits"), read_images("digits", "test")


def learn(images: Images, method: During, batch_size: int = 64, **changes: Any) -> tuple[nn.Sequential, Any]:
    batches = ImageBatches(images, batch_size=batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    rates = linear_warmup_decay(STEPS)
    options = {"steps": STEPS, "loss": classification_loss(), "epoch_steps": 22, "clip": 2.0}
    return model, train(model, batches, optimizer, rates, during=[method], **options | changes)


def accuracy(model: nn.Module, train_set: Images, images: Images) -> float:
    mean, std = train_set.statistics()
    x = (images.pixels.float() / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
    with torch.no_grad():
        return (model(x).argmax(1) == images.labels).float().mean().item()


@pytest.mark.parametrize("name", METHODS)
def test_a_sparse_network_has_learnt_the_digits(name, digits):
    train_set, test_set = digits
    method = getattr(during, name)(0.7, **OPTIONS.get(name, {}))
    model, trace = learn(train_set, method)
    masks = method.finish()
    masks.check(model)
    assert masks.sparsity == pytest.approx(0.7, abs=1 / 3552)
    assert trace.losses[-1] < 0.5 * trace.losses[0]
    assert accuracy(model, train_set, test_set) > 0.9


@pytest.mark.parametrize("name", METHODS)
def test_small_batches_in_bf16_are_accumulated(name, digits):
    method = getattr(during, name)(0.7, **OPTIONS.get(name, {}))
    model, trace = learn(digits[0], method, batch_size=16, accumulate=4, precision="bf16")
    masks = method.finish()
    masks.check(model)
    assert masks.sparsity == pytest.approx(0.7, abs=1 / 3552)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert trace.losses[-1] < 0.5 * trace.losses[0]
