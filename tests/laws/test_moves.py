"""Moves of many tensors at once equal those of each by itself, in Triton's interpreter and on a GPU."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from prunus.frankwolfe.sets import Ball, k_sparse, k_support, lp
from prunus.frankwolfe.sets.norms import Lp
from prunus.frankwolfe.sfw import SFW
from prunus.kernels import moves as programs
from prunus.kernels.moves import move_, plan_moves
from prunus.kernels.switch import kernels

ON_CPU = pytest.param("cpu", marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="compiles"))
ON_GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)
each_device = pytest.mark.parametrize("device", [ON_CPU, ON_GPU])
SIZES = [1300, 1, 9, 256, 513]  # of three programs, of one, and one entry more than one reads


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that read few entries, where every step costs the interpreter milliseconds."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(programs, "_BLOCK", 256)
        monkeypatch.setattr(programs, "_STEPS", 2)


def made(kind: str) -> list[Tensor]:
    """Moments that are hard to order, of several sizes."""
    generator = torch.Generator().manual_seed(0)
    normal = [torch.randn(size, generator=generator) for size in SIZES]
    return {
        "random": normal,
        "tied": [each.mul(2).round() for each in normal],
        "equal": [torch.full((size,), -3.0) for size in SIZES],
        "zeros": [torch.zeros(size) for size in SIZES],
        "tiny": [each * 1e-30 for each in normal],
    }[kind]


@each_device
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("kind", "rescale"),
    [
        *(("random", rescale) for rescale in ("none", "diameter", "fast_gradient")),
        *((kind, "fast_gradient") for kind in ("tied", "equal", "zeros", "tiny")),
        ("zeros", "none"),
    ],
)
def test_moves_are_those_of_each_by_itself(device: str, kind: str, rescale: str) -> None:
    moments = [each.to(device) for each in made(kind)]
    points = [torch.randn(each.shape, generator=torch.Generator().manual_seed(1)).to(device) for each in moments]
    balls = [k_support(0.3, 2.0), k_sparse(1, 0.5), lp(2, 3.0), k_sparse(0.1, 1.5), k_support(0.01, 0.7)]
    kept = [390, 1, 9, 26, 5]
    halves = [ball.diameter(tuple(m.shape)) / 2 for ball, m in zip(balls, moments, strict=True)]
    rate, expected = 0.3, []
    for ball, x, m, half in zip(balls, points, moments, halves, strict=True):
        factor = {"none": 1.0, "diameter": 0.5 / half, "fast_gradient": float(m.double().norm()) / half}[rescale]
        share = min(1.0, rate * factor)
        expected.append((1 - share) * x.double() + share * ball.lmo(m).double())
    moves = plan_moves(points, moments, kept, [False, True, False, True, False])
    half = torch.tensor(halves, device=device) if rescale != "none" else None
    radius = torch.tensor([ball.radius for ball in balls], device=device)
    move_(moves, radius, half, torch.tensor(rate, device=device), by_length=rescale == "fast_gradient")
    for found, wanted in zip(points, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


SHAPES = [(6, 4, 3, 3), (6, 4, 3, 3), (5, 7), (4, 6, 1, 1), (1,)]


def run(device: str, on: bool, rescale: str, ball: Ball, layout: torch.memory_format) -> tuple[list[Tensor], list[int]]:
    """Where a few steps lead, and how often each parameter was written."""
    generator = torch.Generator().manual_seed(2)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).to(device)) for shape in SHAPES]
    for each in parameters:
        if each.ndim == 4:
            each.data = each.data.contiguous(memory_format=layout)
    balls = [replace(ball, radius=0.5 + place) for place in range(len(SHAPES))]
    optimizer = SFW(parameters, 0.1, constraint=balls, rescale=rescale)
    with kernels(on):
        for step in range(2):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=generator).mul(2).round().to(device)
                if parameter.ndim == 4:
                    parameter.grad = parameter.grad.contiguous(memory_format=layout)
            if step == 1:
                optimizer.load_state_dict(deepcopy(optimizer.state_dict()))  # momentum lies elsewhere then
            optimizer.step()
        assert bool(optimizer._fused) == (on and rescale != "gradient" and ball.gauge != Lp(1))
    return [each.detach() for each in parameters], [each._version for each in parameters]


@each_device
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("rescale", "layout"),
    [
        *((rescale, torch.contiguous_format) for rescale in ("none", "diameter", "gradient", "fast_gradient")),
        ("diameter", torch.channels_last),
        ("gradient", torch.channels_last),
    ],
)
@pytest.mark.parametrize("ball", [k_support(0.3), k_sparse(2), lp(2), lp(1)], ids=lambda ball: str(ball.gauge))
def test_steps_are_those_of_the_plain_path(device: str, ball: Ball, rescale: str, layout: torch.memory_format) -> None:
    plain, _ = run(device, False, rescale, ball, layout)
    found, versions = run(device, True, rescale, ball, layout)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert min(versions) >= 2
