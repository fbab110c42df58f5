"""Cross-entropy and its gradient: the program and its plain twin against autograd in float64."""

from __future__ import annotations

from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor

from prunus.kernels.switch import kernels
from prunus.train.next_token import _cross_entropy

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
in_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="programs are compiled where there is a GPU")
DEVICES = [pytest.param("cpu", marks=in_interpreter), pytest.param("cuda", marks=[pytest.mark.gpu, on_gpu])]
PATHS = [("plain", "cpu"), *(pytest.param("program", *each.values, marks=each.marks) for each in DEVICES)]
CLOSE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def expected(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = z.double().requires_grad_()
    value = torch.nn.functional.cross_entropy(wide, y, reduction="sum")
    return value.detach(), torch.autograd.grad(value, wide)[0]


def programs(path: str) -> AbstractContextManager[None]:
    """The way by which rows go: Triton's program, or its plain twin."""
    if path == "program":
        pytest.importorskip("triton")
    return kernels(path == "program")


def found(z: Tensor, y: Tensor, path: str) -> tuple[Tensor, Tensor]:
    with programs(path):
        return _cross_entropy(z, y)


@pytest.mark.parametrize(("path", "device"), PATHS)
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 4096), (2, 5001)])
def test_loss_and_gradient_are_those_of_autograd(
    shape: tuple[int, int], dtype: torch.dtype, path: str, device: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    rising = torch.linspace(0, 6, shape[1])  # so that the largest comes late
    z = (3 * torch.randn(shape, generator=generator) + rising).to(device, dtype)
    y = torch.randint(shape[1], shape[:1], generator=generator).to(device)
    y[-1] = shape[1] - 1
    (value, dz), (wanted, gradient) = found(z, y, path), expected(z, y)
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dz.double(), gradient, rtol=CLOSE[dtype], atol=1e-7 if dtype != torch.float16 else 1e-6)
    assert dz.dtype == dtype


@pytest.mark.parametrize(("path", "device"), PATHS)
def test_huge_and_hidden_logits_and_strides_are_taken(path: str, device: str) -> None:
    z = torch.tensor([[3e4, -3e4, 0.0], [float("-inf"), 2.0, 1.0], [-3e4, -3e4, -3e4]], device=device)
    y = torch.tensor([1, 2, 0], device=device)
    for laid in (z, z.t().contiguous().t(), torch.cat([z, z], 1)[:, :3]):
        (value, dz), (wanted, gradient) = found(laid, y, path), expected(z, y)
        torch.testing.assert_close(value.double(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dz.double(), gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("path", "device"), PATHS)
def test_logits_that_are_no_numbers_give_a_loss_that_is_none(path: str, device: str) -> None:
    z = torch.tensor([[0.0, float("nan")]], device=device)
    assert found(z, torch.tensor([0], device=device), path)[0].isnan()
