"""Masked weights in the forward pass whose gradient reaches the dense weights as if there were no mask.

forward w * m      backward dL/dw = dL/d(w * m)      (straight through; nothing is kept for the backward pass)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def straight_through(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """w * m of each tensor, of which the gradient with respect to w is taken to be the identity.

    >>> straight_through({"a": torch.tensor([2.0, 3.0])}, {"a": torch.tensor([True, False])})
    {'a': tensor([2., 0.])}
    """
    masked: Any = _Straight.apply([masks[name] for name in weights], *weights.values())
    return dict(zip(weights, masked, strict=True))


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, masks: list[Tensor], *weights: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.set_materialize_grads(False)
        return tuple(torch._foreach_mul(weights, masks))  # pyright: ignore[reportPrivateImportUsage]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *grads
