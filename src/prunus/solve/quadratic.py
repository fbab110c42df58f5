"""The quadratic that every solver here lowers, and what it takes to look at it: the Gram matrix of a layer's inputs.

    E(W) = tr((W - W0) G (W - W0)^T) = ||X (W - W0)^T||^2,   G = X^T X

Rows are independent: each has its own share of E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prunus.score import warn_unseen

if TYPE_CHECKING:
    from prunus.layers import Inputs, Layer

_ROWS = 1 << 22  # entries whose error is computed at once in float64: 32 MiB a temporary
_REMEMBERED = 2  # factorisations kept: q, k, v, out, up share one in parallel blocks; a hundred experts do not add up

Made = TypeVar("Made")


def seen_gram(layer: Layer, solver: str) -> Inputs | None:
    """What a solver of this name knows of the layer's inputs, with their Gram matrix; None after a warning if unseen.

    Raises ValueError for a layer without a Gram matrix, and for a weight that holds NaN or Inf.
    """
    if layer.inputs is None or (layer.inputs.gram is None and layer.inputs.tokens > 0):
        raise ValueError(f"{solver} needs the Gram matrix of '{layer.name}': calibrate with gram=True")
    if layer.inputs.tokens == 0:
        warn_unseen(layer, solver)
        return None
    if not bool(layer.weight.isfinite().all()):
        raise ValueError(f"weight of '{layer.name}' holds NaN or Inf: the checkpoint is damaged")
    return layer.inputs


def finite_gram(layer: Layer, inputs: Inputs) -> Tensor:
    """The Gram matrix (in, in) float32. Raises ValueError for one that holds NaN or Inf."""
    assert inputs.gram is not None
    if not bool(inputs.gram.isfinite().all()):
        raise ValueError(f"the Gram matrix of '{layer.name}' holds NaN or Inf: calibrate in bfloat16 or float32")
    return inputs.gram


def scaled_gram(layer: Layer, inputs: Inputs, damping: float = 0.0) -> Tensor:
    """The Gram matrix with mean diagonal near 1, on the weight's device. damping: share of that added to the diagonal.

    A power of two as scale loses no bit, and changes no mask.
    """
    gram = finite_gram(layer, inputs)
    mean = float(gram.diagonal().mean(dtype=torch.float64))
    scaled = gram * 2.0 ** min(-math.frexp(mean)[1], 126)
    if damping:
        scaled.diagonal().add_(damping * scaled.diagonal().mean())
    return scaled.to(layer.weight.device)


def unit_gram(layer: Layer, inputs: Inputs, damping: float) -> tuple[Tensor, Tensor]:
    """The damped Gram matrix in units in which its diagonal is 1, and the units sqrt(G_jj) (in,): 1 where G_jj is 0."""
    gram = scaled_gram(layer, inputs, damping)
    own = gram.diagonal()
    scale = torch.where(own > 0, own.sqrt(), 1.0)
    return gram.div_(scale).div_(scale[:, None]), scale


def row_errors(change: Tensor, gram: Tensor) -> Tensor:
    """d G d^T of every row d of a change of the weight, (out,) float64: nothing is lost to rounding in a comparison."""
    exact = gram.double()
    parts = [(rows @ exact).mul_(rows).sum(1) for rows in (change[part].double() for part in row_slices(change, _ROWS))]
    return torch.cat(parts) if parts else change.new_zeros(0, dtype=torch.float64)


def row_slices(matrix: Tensor, entries: int) -> Iterator[slice]:
    """Consecutive rows with about `entries` entries together."""
    step = max(1, entries // max(1, matrix.shape[1]))
    return (slice(start, start + step) for start in range(0, len(matrix), step))


def once_per_inputs(make: Callable[[Layer, Inputs], Made]) -> Callable[[Layer, Inputs], Made]:
    """`make`, called once for layers that share their inputs (q, k and v; gate and up), which are not kept alive."""
    made: WeakKeyDictionary[Inputs, tuple[int, Made]] = WeakKeyDictionary()

    def look(layer: Layer, inputs: Inputs) -> Made:
        known = made.get(inputs)
        if known is None or known[0] != inputs.tokens:
            known = made[inputs] = inputs.tokens, make(layer, inputs)
            if len(made) > _REMEMBERED:
                del made[next(iter(made))]
        return known[1]

    return look
