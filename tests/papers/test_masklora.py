"""MaskLoRA and ScaleLoRA (Zimmer et al. 2023, "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs"):
values and gradients against the textbook expressions, differentiated by torch in float64, and one worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prunus.adapt import effective
from prunus.adapt.effective import Terms, effective_linear, effective_weight


def _case(
    dtype: torch.dtype = torch.float32, tokens: int = 6, out: int = 5, in_: int = 8, rank: int = 3
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    mask = draw(out, in_) > 0
    return {
        "x": draw(2, tokens // 2, in_).to(dtype),
        "weight": (draw(out, in_) * mask).to(dtype),
        "mask": mask,
        "A": draw(rank, in_),
        "B": draw(out, rank),
        "bias": draw(out),
        "g": draw(2, tokens // 2, out).to(dtype),
    }


def _textbook(case: dict[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    """Output and gradients of x (W + c M*(BA))^T + b, or x (W*(BA))^T + b, in float64."""
    leaf = {name: case[name].double().requires_grad_() for name in ("x", "A", "B", "bias")}
    W, product = case["weight"].double(), leaf["B"] @ leaf["A"]
    effective = W * product if scale is None else W + scale * case["mask"] * product
    y = leaf["x"] @ effective.T + leaf["bias"]
    y.backward(case["g"].double())
    return {"y": y.detach(), **{name: tensor.grad for name, tensor in leaf.items() if tensor.grad is not None}}


def _ours(case: dict[str, Tensor], scale: float | None) -> dict[str, Tensor]:
    leaf = {name: case[name].clone().requires_grad_() for name in ("x", "A", "B", "bias")}
    terms = Terms(case["weight"], leaf["A"], leaf["B"], None if scale is None else case["mask"], scale)
    y = effective_linear(leaf["x"], terms, leaf["bias"])
    y.backward(case["g"])
    return {"y": y.detach(), **{name: tensor.grad for name, tensor in leaf.items() if tensor.grad is not None}}


@pytest.mark.parametrize("scale", [0.5, None], ids=["mask_lora", "scale_lora"])
@pytest.mark.parametrize("tile", [1 << 22, 16, 1])
def test_gradients_are_those_of_the_textbook(scale: float | None, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effective, "_TILE", tile)
    case = _case()
    ours, textbook = _ours(case, scale), _textbook(case, scale)
    assert ours.keys() == textbook.keys() == {"y", "x", "A", "B", "bias"}
    for name, expected in textbook.items():
        torch.testing.assert_close(ours[name].double(), expected, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("scale", [0.5, None], ids=["mask_lora", "scale_lora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_of_the_factors_are_summed_in_float32(scale: float | None, dtype: torch.dtype) -> None:
    case = _case(dtype, tokens=512)
    ours, textbook = _ours(case, scale), _textbook(case, scale)
    for name in ("A", "B", "bias"):  # x and g are what they are: nothing else is rounded, so nothing is lost
        torch.testing.assert_close(ours[name].double(), textbook[name], rtol=1e-5, atol=1e-4, msg=name)
    for name in ("y", "x"):  # the effective weight is rounded
        torch.testing.assert_close(ours[name].double(), textbook[name], rtol=0.03, atol=0.1, msg=name)


@pytest.mark.parametrize("product", [False, True], ids=["mask_lora", "scale_lora"])
def test_float64_passes_gradcheck(product: bool) -> None:
    case = {name: tensor if tensor.dtype == torch.bool else tensor.double() for name, tensor in _case(tokens=4).items()}
    leaves = [case[name].requires_grad_() for name in ("x", "A", "B", "bias")]

    def call(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        terms = Terms(case["weight"], A, B, None if product else case["mask"], None if product else 0.7)
        return effective_linear(x, terms, bias)

    assert torch.autograd.gradcheck(call, leaves)


def test_worked_by_hand() -> None:
    """W = [[1, 0, 2], [0, 3, 0]], M its support, c = 2, B = (1, 2)^T, A = (1, 1, -1), x = (1, 1, 1), g = (1, 1).

    BA = [[1, 1, -1], [2, 2, -2]], so W + c M*(BA) = [[3, 0, 0], [0, 7, 0]] and y = (3, 7). G = g^T x is all ones:
    dB = c (M*G) A^T = 2 (1 - 1, 1) = (0, 2) and dA = c B^T (M*G) = 2 (1, 2, 1).
    """
    W, M = torch.tensor([[1.0, 0, 2], [0, 3, 0]]), torch.tensor([[True, False, True], [False, True, False]])
    A, B = torch.tensor([[1.0, 1, -1]], requires_grad=True), torch.tensor([[1.0], [2]], requires_grad=True)
    y = effective_linear(torch.ones(3), Terms(W, A, B, M, 2.0))
    y.sum().backward()
    assert y.tolist() == [3, 7]
    assert A.grad is not None
    assert B.grad is not None
    assert (B.grad.flatten().tolist(), A.grad.tolist()) == ([0, 2], [[2, 4, 2]])
    assert effective_weight(Terms(W, A, B, None, None)).tolist() == [[1, 0, -2], [0, 6, 0]]
