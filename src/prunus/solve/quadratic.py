"""The quadratic that every solver here lowers, and what it takes to look at it: the Gram matrix of a layer's inputs.

    E(W) = tr((W - W0) G (W - W0)^T) = ||X (W - W0)^T||^2,   G = X^T X

Rows are independent: each has its own share of E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prunus.score import warn_unseen

if TYPE_CHECKING:
    from prunus.layers import Inputs, Layer

_ROWS = 1 << 22  # entries whose error is computed at once in float64: 32 MiB a temporary
_DIRECT = 1024  # columns of a triangular matrix that are inverted by substitution; more are by matrix products
_UNSEEN = 2.0**-20  # of sqrt(mean G_jj), which is near 1; a power of two loses no bit of a weight
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
    """The damped Gram matrix in units where its diagonal is 1, and the units (in,): sqrt(G_jj), or _UNSEEN for 0.

    Weights of an input that was always zero are then the least of all, and among themselves as large as they are.
    """
    gram = scaled_gram(layer, inputs, damping)
    own = gram.diagonal()
    scale = torch.where(own > 0, own.sqrt(), _UNSEEN)
    return gram.div_(scale).div_(scale[:, None]), scale


def halved(matrix: Tensor) -> Tensor:
    """What `times` multiplies by: elsewhere than on CUDA the float32 matrix (n, m) itself, there its bfloat16 halves.

    They stand thrice, (3 n, m): high, low, high, where high + low is the matrix but for 2^-17 of an entry.
    """
    return _thrice(matrix) if matrix.is_cuda else matrix


def _thrice(matrix: Tensor) -> Tensor:
    high, low = _halves(matrix)
    return torch.cat([high, low, high])


def times(x: Tensor, matrix: Tensor) -> Tensor:
    """x @ matrix in float32, x: (rows, n) float32; matrix: as by `halved`.

        x M = x_high M_high + x_high M_low + x_low M_high            (x_low M_low is 2^-16 of it and left out)

    One product on tensor cores, which takes a quarter of the time that a float32 one does on an H100. TF32 would be
    quicker by little, and 50 times as coarse.
    """
    if matrix.dtype == x.dtype:
        return x @ matrix
    high, low = _halves(x)
    wide = torch.cat([high, high, low], 1)
    return torch.mm(wide, matrix, out_dtype=torch.float32) if x.is_cuda else wide.float() @ matrix.float()


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def invert_lower_(L: Tensor) -> None:
    """A lower triangular matrix becomes its inverse: by halves, and for the corner by matrix products.

        [A 0; C B]^-1 = [A^-1 0; -B^-1 C A^-1 B^-1]

    0.19 n^3 multiply-adds, in products of large matrices; substitution with the identity takes 0.5 n^3.
    """
    n = len(L)
    if n <= _DIRECT:
        identity = torch.eye(n, dtype=L.dtype, device=L.device)
        L.copy_(torch.linalg.solve_triangular(L, identity, upper=False))
        return
    half = n // 2
    above, below, corner = L[:half, :half], L[half:, half:], L[half:, :half]
    invert_lower_(above)
    invert_lower_(below)
    left = torch.empty_like(corner)
    for start, stop in _parts(half):  # C A^-1, without the zeros above A^-1's diagonal
        torch.mm(corner[:, start:], above[start:, start:stop], out=left[:, start:stop])
    for start, stop in _parts(n - half):  # B^-1 (C A^-1), without the zeros beyond B^-1's
        torch.mm(below[start:stop, :stop], left[:stop], out=corner[start:stop])
    corner.neg_()


def _parts(n: int) -> Iterable[tuple[int, int]]:
    """An eighth of n at a time, but at least _DIRECT."""
    return pairwise([*range(0, n, max(_DIRECT, -(-n // 8))), n])


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
