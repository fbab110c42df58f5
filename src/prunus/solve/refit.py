"""Least-squares weights on a mask that is chosen already: conjugate gradients for all rows of a layer at once.

    minimise E(W) = tr((W - W0) (G + lam I) (W - W0)^T) over W = M * W

    R = ((W0 - W) G) * M,  P = R;   repeat:  Q = (P G) * M,  a = <R, R> / <P, Q>,  W += a P,  R -= a Q,
                                             b = <R, R> new / old,  P = R + b P      (a and b for each row)

in the columns' own units, w_j sqrt(G_jj), which equals preconditioning by the diagonal of G. Every iteration lowers the
E of every row.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.machine import full_products
from prunus.patterns import Pattern
from prunus.score import Criterion, Score, criterion_of, wanda
from prunus.solve.quadratic import halved, row_errors, row_slices, scaled_gram, seen_gram, times, unit_gram

if TYPE_CHECKING:
    from prunus.layers import Layer

_CHUNK = 1 << 26  # entries worked on at once: five temporaries of 256 MB


def refit(of: Criterion | Score = wanda, iterations: int = 20, damping: float = 0.03) -> Criterion:
    """A criterion with the mask of another, and on it the weights whose outputs are nearest to the dense layer's.

    of: the criterion that chooses; any. iterations: of conjugate gradients, each one product (out, in) x (in, in).
    damping: lam, as a share of the mean diagonal of G; it holds weights near the dense ones where tokens say little.

    Products are float32 (on CUDA of bfloat16 halves, never TF32), results compared in float64 after rounding to the
    weight's dtype: no row's E exceeds what `of` left, which stays where nothing better was found. A layer that saw no
    token stays as `of` left it. Its solve raises ValueError for a layer without a Gram matrix, for NaN or Inf, and as
    that of `of`.

    >>> inputs = Inputs(2, gram=True)
    >>> inputs.add_(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    >>> refit(damping=0.0).solve(Layer("fc", torch.tensor([[2.0, 1.0]]), inputs), Unstructured("row"), 1)[0]
    tensor([[2.5000, 0.0000]])
    """
    if operator.index(iterations) < 1:
        raise ValueError(f"refit needs iterations >= 1; got {iterations}")
    if not 0 <= damping < float("inf"):
        raise ValueError(f"refit needs damping >= 0; got {damping}")
    asked = criterion_of(of)

    @torch.no_grad()
    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        weight, mask = asked.solve(layer, pattern, kept)
        inputs = seen_gram(layer, "refit")
        if inputs is None:
            return weight, mask
        dense, gram = layer.weight, scaled_gram(layer, inputs, damping)
        unit, scale = unit_gram(layer, inputs, damping)
        with full_products():
            parts = [
                _least_squares(dense[rows], weight[rows], mask[rows], unit, scale, gram=gram, iterations=iterations)
                for rows in row_slices(weight, _CHUNK)
            ]
        return torch.cat(parts), mask

    return Criterion(solve, needs="gram", compare=asked.compare, name=f"{asked.name} with refit", nests=asked.stays)


def _least_squares(
    dense: Tensor, start: Tensor, mask: Tensor, unit: Tensor, scale: Tensor, *, gram: Tensor, iterations: int
) -> Tensor:
    """The weight (rows, in) in the dtype of `start`, which stays in rows that nothing improves.

    gram: the damped Gram matrix; unit: the same in the columns' units, whose rounding may leave it indefinite.
    """
    change = (dense.float() - start.float()) * scale
    weight = start.float() * scale
    factor = halved(unit)
    residual = times(change, factor).mul_(mask)
    direction = residual.clone()
    squares = residual.square().sum(1, keepdim=True)
    for _ in range(iterations):
        product = times(direction, factor).mul_(mask)
        step = _ratio(squares, (direction * product).sum(1, keepdim=True))
        weight.addcmul_(step, direction)
        residual.addcmul_(step, product, value=-1)
        before, squares = squares, residual.square().sum(1, keepdim=True)
        direction.mul_(_ratio(squares, before)).add_(residual)
    fitted = torch.where(mask, weight / scale, 0.0).to(start.dtype)
    errors = (row_errors(dense.double() - each.double(), gram) for each in (fitted, start))
    return torch.where(torch.lt(*errors)[:, None], fitted, start)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below; 0 where a row is at its optimum."""
    return torch.where(below > 0, above / below, 0.0)
