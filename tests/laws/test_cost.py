"""Cost: operations and parameters counted by hand on a small network; weight change; energy where it is told."""

import math
import sys

import pytest
import torch
from torch import nn

from prunus.data.models import build_model
from prunus.masks import Masks
from prunus.measure.cost import Cost, Energy, cost, flops_of, weight_change

cost_module = sys.modules[cost.__module__]  # `prunus.measure.cost` is the function


def network():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5))


def keep(shape, kept):
    return (torch.arange(math.prod(shape)) < kept).view(shape)


def test_a_small_network_by_hand():
    """Conv: 16 places x 4 filters x 18 weights x 2 x batch 3 = 6912; linear: 64 x 5 x 2 x 3 = 1920."""
    model, x = network(), torch.zeros(3, 2, 4, 4)
    parameters = 4 * 18 + 4 + 8 + 64 * 5 + 5
    assert cost(model, x) == Cost(8832, 8832, 1.0, parameters, parameters)
    masks = Masks({"0.weight": keep((4, 2, 3, 3), 18), "4.weight": keep((5, 64), 32)})  # a quarter, a tenth
    found = cost(model, x, masks)
    assert (found.dense_flops, found.sparse_flops) == (8832, 1728 + 192)
    assert found.speedup == pytest.approx(8832 / 1920)
    assert found.nonzero == parameters - 54 - 288


def test_a_weight_that_two_modules_have_saves_in_both():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    assert cost(model, torch.zeros(1, 4), Masks({"0.weight": keep((4, 4), 8)})) == Cost(64, 32, 2.0, 24, 16)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "wrn10_1"])
def test_operations_are_counted_on_shapes_alone_as_on_values(name):
    model, x = build_model(name, classes=10), torch.zeros(2, 3, 8, 8)
    assert flops_of(model, x) == cost(model, x).dense_flops > 1e6
    assert flops_of(network(), torch.zeros(3, 2, 4, 4)) == 8832
    assert not next(model.parameters()).is_meta


def test_equal_sparsity_saves_most_where_a_weight_is_used_often():
    model, x = network(), torch.zeros(1, 2, 4, 4)
    conv = cost(model, x, Masks({"0.weight": keep((4, 2, 3, 3), 0)}))
    linear = cost(model, x, Masks({"4.weight": keep((5, 64), 320 - 72)}))  # as many weights
    assert conv.nonzero == linear.nonzero
    assert conv.speedup > 3 > 1.2 > linear.speedup
    assert cost(nn.Linear(2, 2), torch.zeros(1, 2), Masks({"weight": keep((2, 2), 0)})).speedup == math.inf


def test_nested_modules_own_what_they_compute_themselves():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)
            self.weight = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x):
            return self.inner(self.inner(x)) @ self.weight

    model = nn.Sequential(Outer())
    x = torch.zeros(1, 4)
    assert cost(model, x).dense_flops == 96
    assert cost(model, x, Masks({"0.weight": keep((4, 4), 4)})).sparse_flops == 64 + 8
    assert cost(model, x, Masks({"0.inner.weight": keep((4, 4), 4)})).sparse_flops == 16 + 32


def test_counting_leaves_the_model_as_it_was():
    model = network().train()
    model[2].eval()
    before = model[1].running_mean.clone()
    cost(model, torch.ones(3, 2, 4, 4))
    assert [module.training for module in model] == [True, True, False, True, True]
    assert torch.equal(model[1].running_mean, before)
    with pytest.raises(ValueError, match=r"no parameter '0\.wight'"):
        cost(model, torch.ones(3, 2, 4, 4), Masks({"0.wight": keep((1, 1), 1)}))


def test_weight_change_is_a_relative_distance():
    before = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[4.0]]), "count": torch.tensor(1)}
    after = {"a": torch.tensor([0.0, 0.0]), "b": torch.tensor([[0.0]]), "count": torch.tensor(9)}
    assert weight_change(before, after) == 1.0
    assert weight_change(before, before) == 0.0
    assert weight_change(before, {**before, "a": torch.tensor([3.0, 1.0])}) == pytest.approx(0.2)
    assert weight_change({"a": torch.zeros(1)}, {"a": torch.ones(1)}) == math.inf
    tiny = {"a": torch.full((10**4,), 1e-25)}  # squares underflow in float32
    assert weight_change(tiny, {"a": tiny["a"] * 1.5}) == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"different names: \['b'\]"):
        weight_change({"a": after["a"]}, {"a": after["a"], "b": after["b"]})
    with pytest.raises(ValueError, match=r"'a' has shape \(2,\) before and \(1, 1\) after"):
        weight_change({"a": after["a"]}, {"a": after["b"]})


def test_energy_is_a_difference_or_none(monkeypatch):
    readings = iter([100.0, 130.5])
    monkeypatch.setattr(cost_module, "_joules_so_far", lambda: next(readings))
    with Energy() as energy:
        assert energy.joules is None
    assert energy.joules == 30.5
    monkeypatch.setattr(cost_module, "_joules_so_far", lambda: None)
    with energy:
        pass
    assert energy.joules is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPU")
def test_a_cpu_tells_no_energy():
    with Energy() as energy:
        pass
    assert energy.joules is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_tells_its_energy():
    with Energy() as energy:
        x = torch.randn(4096, 4096, device="cuda")
        for _ in range(200):
            x = x @ x / 64
    assert energy.joules is None or energy.joules > 1
