"""2:4 layers take the kind of tensor that is faster where it is tried, and stay as they are where none is."""

import pytest
import torch
from torch import nn

import prunus
from prunus.shrink import accelerate as own
from prunus.shrink import is_two_four


def two_four(rows: int, columns: int, **how):
    weight = torch.randn(rows, columns, **how)
    weight.view(rows, -1, 4)[:, :, ::2] = 0
    return nn.Parameter(weight)


def made(device: str = "cpu", size: int = 8, dtype: torch.dtype = torch.float32):
    model = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size), nn.Linear(size, 3)).to(device, dtype)
    for place in (0, 2):
        model[place].weight = two_four(size, size, device=device, dtype=dtype)
    return model


def test_two_of_four_are_seen():
    assert is_two_four(two_four(3, 8))
    weight = torch.zeros(2, 8)
    weight[1, 4:7] = 1  # three of the second four
    assert not is_two_four(weight)
    assert not is_two_four(torch.zeros(2, 6))


def test_on_a_cpu_nothing_changes_and_that_is_said():
    model = made()
    before = model[0].weight
    (row,) = prunus.accelerate_(model, tokens=4)
    assert (row.layers, row.shape, row.chosen) == (("0", "2"), (8, 8), "dense")
    assert "no 2:4 products on cpu" in row.why
    assert model[0].weight is before
    with pytest.raises(ValueError, match="none of the 1 Linear layers is 2:4"):
        prunus.accelerate_(nn.Sequential(nn.Linear(8, 8)))


class Timed(torch.Tensor):
    """A weight that says that it is on a GPU."""

    is_cuda = True


@pytest.mark.parametrize(("times", "chosen"), [((3.0, 2.0, 1.0), "good"), ((1.0, 1.0, 0.99), "dense")])
def test_the_fastest_kind_that_computes_the_same_is_taken(monkeypatch, times, chosen):
    kinds = {"wrong": lambda weight: weight * 2, "bad": lambda weight: 1 / 0, "good": lambda weight: weight.clone()}
    kinds["bad"] = lambda weight: (_ for _ in ()).throw(RuntimeError("no such kernel"))
    monkeypatch.setattr(own, "PRODUCTS", kinds)
    clock = iter([times[0], times[2]])
    monkeypatch.setattr(own, "_milliseconds", lambda x, weight: next(clock))
    row = own._tried(("0",), two_four(4, 8).data.as_subclass(Timed), torch.randn(5, 8), float8=False)
    assert row.chosen == chosen
    assert list(row.times) == ["dense", "good"]
    assert "wrong: the product differs by 1" in row.why
    assert "bad: no such kernel" in row.why


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_accelerated_model_computes_the_same_on_a_gpu():
    torch.manual_seed(0)
    model = made("cuda", 2048, torch.bfloat16)
    x = torch.randn(4096, 2048, device="cuda", dtype=torch.bfloat16)
    expected = model(x).detach()
    (row,) = prunus.accelerate_(model)
    assert row.times["dense"] > 0
    assert len(row.times) > 1, row.why
    assert (model(x) - expected).norm() < 0.02 * expected.norm()
