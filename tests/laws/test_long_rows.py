"""The largest of long rows equal those of a stable sort, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from prunus.frankwolfe.sets import k_support
from prunus.kernels.long_rows import largest_of_long_rows
from prunus.kernels.switch import kernels

ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles"))
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
each_device = pytest.mark.parametrize("device", [ON_CPU, ON_GPU])


def sorted_out(score: Tensor, kept: int) -> Tensor:
    """What a stable sort of each row leaves."""
    first = score.float().sort(dim=1, descending=True, stable=True).indices[:, :kept]
    return torch.zeros_like(score).scatter(1, first, score.gather(1, first))


def made(kind: str) -> Tensor:
    """Two or three rows that are hard to order."""
    normal = torch.randn(2, 9000, generator=torch.Generator().manual_seed(0))
    return {
        "random": normal,
        "tied": normal.mul(2).round(),
        "zeros": torch.zeros(3, 5000),
        "equal": torch.full((2, 4097), -3.0),
        "bfloat16": normal.abs().bfloat16(),
        "float16": normal.half(),
        "denormal": normal * 1e-40,
        "one": normal[:, :1],
        "infinite": torch.tensor([[3.0, 3.0, -1.0, torch.inf, -torch.inf, 0.0, -0.0, 1e-42]]),
    }[kind]


@each_device
@pytest.mark.parametrize(
    "kind", ["random", "tied", "zeros", "equal", "bfloat16", "float16", "denormal", "one", "infinite"]
)
def test_equal_a_stable_sort(device: str, kind: str) -> None:
    score = made(kind)
    n = score.shape[1]
    for kept in sorted({1, n // 3, n - 1, n} & set(range(1, n + 1))):
        found, squares = largest_of_long_rows(score.to(device), kept)
        assert torch.equal(found.cpu(), sorted_out(score, kept)), kept
        torch.testing.assert_close(squares.cpu(), found.cpu().double().square().sum(1))


@each_device
def test_rows_may_be_slices(device: str) -> None:
    wide = torch.randn(3, 700, generator=torch.Generator().manual_seed(1)).to(device)
    assert torch.equal(largest_of_long_rows(wide[:, 1:600], 50)[0].cpu(), sorted_out(wide[:, 1:600].cpu(), 50))
    columns = wide[:, :5].T  # few: each row costs the interpreter as much as a long one
    assert torch.equal(largest_of_long_rows(columns, 2)[0].cpu(), sorted_out(columns.cpu(), 2))


@each_device
def test_absolute_values_keep_their_signs(device: str) -> None:
    score = made("tied")
    kept = largest_of_long_rows(score.to(device), 3000, absolute=True)[0].cpu()
    assert torch.equal(kept.abs(), sorted_out(score.abs(), 3000))
    assert torch.equal(kept, score * (kept != 0))


@each_device
def test_the_vertex_of_a_k_support_ball_is_that_of_the_plain_path(device: str) -> None:
    for kind in ("random", "tied", "zeros", "denormal"):
        gradient = made(kind).to(device)
        with kernels(False):
            expected = k_support(0.1).lmo(gradient)
        with kernels(True):
            torch.testing.assert_close(k_support(0.1).lmo(gradient), expected)
