"""Recalibration: statistics become those of everything seen as one batch, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

from prunus.train.batchnorm import recalibrate_


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(16, 5), nn.BatchNorm1d(5), nn.LayerNorm(5),
    )  # fmt: skip


def images(*sizes, shift=10.0):
    generator = torch.Generator().manual_seed(1)
    return [shift + place + torch.randn(size, 3, 4, 4, generator=generator) for place, size in enumerate(sizes)]


def statistics(norm):
    return norm.running_mean.clone(), norm.running_var.clone()


def test_ragged_batches_give_the_mean_and_variance_of_all_together():
    model, batches = network(), images(8, 8, 3)
    assert recalibrate_(model, batches) == 19
    whole = torch.cat(batches).double().transpose(0, 1).flatten(1)  # (3, N * H * W)
    torch.testing.assert_close(model[0].running_mean, whole.mean(1).float())
    torch.testing.assert_close(model[0].running_var, whole.var(1).float())
    assert model[0].num_batches_tracked == 3


def test_one_batch_gives_every_layer_what_training_on_it_would_with_full_momentum():
    """Inner layers see inputs that are normalised by the batch, and no dropout."""
    model, (x,) = network(), images(16)
    expected = copy.deepcopy(model).train()
    expected[2].eval()
    for norm in (expected[0], expected[3], expected[6]):
        norm.momentum = 1.0
    expected(x)
    recalibrate_(model, [x])
    for place in (0, 3, 6):
        for one, other in zip(statistics(model[place]), statistics(expected[place]), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_large_means_cost_no_precision():
    norm, x = nn.BatchNorm1d(1), 1000 + torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    recalibrate_(norm, x.split(100))
    assert norm.running_var.item() == pytest.approx(x.double().var().item(), rel=1e-4)


def test_old_statistics_leave_no_trace():
    one, other, batches = network(), network(), images(8, 8)
    for place in (0, 3, 6):
        other[place].running_mean.fill_(1e6)
        other[place].running_var.fill_(float("nan"))
    recalibrate_(one, batches)
    recalibrate_(other, batches)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_modes_momentum_weights_and_hooks_stay():
    model = network()
    model[3].eval()
    model[0].requires_grad_(False)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    recalibrate_(model, iter([(x, torch.zeros(4)) for x in images(4, 4)]))
    assert [module.training for module in model] == [True, True, True, False, True, True, True, True]
    assert [model[place].momentum for place in (0, 3)] == [0.3, 0.1]
    assert all(model[place].track_running_stats for place in (0, 3, 6))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_pre_hooks for module in model)
    found = statistics(model[0])
    model(images(4, shift=0.0)[0])  # training goes on with momentum
    assert not torch.equal(model[0].running_mean, found[0])


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "from no batch"),
        ([torch.full((4, 3, 4, 4), float("inf"))], FloatingPointError, "'0' received NaN or infinite"),
        ([torch.zeros(4, 7, 4, 4)], RuntimeError, "."),
    ],
)
def test_what_cannot_be_counted_changes_nothing(batches, error, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        recalibrate_(model, batches)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert model[0].training
    assert model[0].track_running_stats


def test_norms_without_statistics_or_inputs_are_left_alone():
    assert recalibrate_(nn.Linear(2, 2), [torch.zeros(1, 2)]) == 0
    assert recalibrate_(nn.BatchNorm1d(2, track_running_stats=False), [torch.zeros(1, 2)]) == 0

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.used(self.used(x))

    model = Half()
    x = torch.tensor([[0.0, 2.0], [2.0, 6.0]])
    assert recalibrate_(model, [x]) == 2
    assert model.unused.running_var.tolist() == [1, 1]
    # Called twice in a pass, it sees x and then x normalised to -1 and 1.
    torch.testing.assert_close(model.used.running_mean, torch.tensor([0.5, 2.0]), atol=1e-4, rtol=0)


def test_16_bit_products_are_counted_in_float32():
    one, other, batches = network(), network(), images(8, 8)
    recalibrate_(one, batches)
    recalibrate_(other, batches, precision="bf16")
    assert torch.equal(one[0].running_mean, other[0].running_mean)  # float32 inputs
    assert not torch.equal(one[3].running_mean, other[3].running_mean)
    torch.testing.assert_close(one[3].running_var, other[3].running_var, rtol=0.05, atol=0.05)
