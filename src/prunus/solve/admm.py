"""Masks and weights together, by the alternating direction method of multipliers in one layer (Boza 2024).

    minimise  ||X (W - W0)^T||^2  with  W = Z,  Z sparse      (Z, U: the sparse copy and the scaled multipliers)

in the columns' own units, B_ij = W0_ij sqrt(G_jj), so that G has a unit diagonal, and with G + d I for G:

    Z = M * (W + U),   U += W - Z,   W = (B G + rho (Z - U)) (G + rho I)^-1 = B + rho (Z - U - B) (G + rho I)^-1

In the first iterations M is chosen anew from |W + U|, at a sparsity that rises as s - s (1 - t)^3, t in (0, 1]: weights
that go early may come back, and those that stay have moved meanwhile.

Ours: before the units are taken, a share of G's mean diagonal is added to it. In the units of an input that the
calibration hardly saw, moving its weight costs nothing, however far; with few tokens that ruined the model.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.machine import full_products
from prunus.patterns import Pattern
from prunus.score import Criterion, magnitude
from prunus.solve.quadratic import halved, invert_lower_, once_per_inputs, seen_gram, times, unit_gram

if TYPE_CHECKING:
    from prunus.layers import Layer


def admm(
    iterations: int = 20, choosing: int = 15, damping: float = 0.03, *, pull: float = 0.1, rho: float = 1.0
) -> Criterion:
    """ADMM pruning (Boza 2024, arXiv:2401.02938): mask and weights of a layer together, for its outputs.

    iterations: all but the last are one product (out, in) x (in, in). choosing: in so many of them, the first ones,
        the mask is chosen anew. damping: added to the diagonal of G, as a share of its mean. pull: d, added to the unit
        diagonal. rho: how strongly the dense and the sparse copy are tied.

    What it ends with is near least squares on its mask; `refit(admm())` goes all the way. Patterns that fix the share
    of zeros (N:M) have it from the first iteration on. All is float32, on CUDA in products of bfloat16 halves (never
    TF32); layers that share one `Inputs` share one inverse. A layer that saw no token is pruned by magnitude, with a
    warning. Its solve raises ValueError for a layer without a Gram matrix, for NaN or Inf, and as `pattern.mask`.

    >>> inputs = Inputs(2, gram=True)
    >>> inputs.add_(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    >>> layer = Layer("fc", torch.tensor([[1.0, 0.9]]), inputs)
    >>> refit(admm(), damping=0.0).solve(layer, Unstructured("row"), 1)[0]
    tensor([[1.4500, 0.0000]])
    """
    if not 1 <= operator.index(choosing) <= operator.index(iterations):
        raise ValueError(f"admm needs 1 <= choosing <= iterations; got choosing={choosing}, iterations={iterations}")
    if not all(0 <= each < float("inf") for each in (damping, pull, rho)) or rho == 0:
        raise ValueError(f"admm needs damping and pull >= 0 and rho > 0; got {damping}, {pull} and {rho}")
    inverted = once_per_inputs(lambda layer, inputs: _invert(*unit_gram(layer, inputs, damping), pull + rho))

    @torch.no_grad()
    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        inputs = seen_gram(layer, "admm")
        if inputs is None:
            return magnitude.solve(layer, pattern, kept)
        shape = (layer.weight.shape[0], layer.weight.shape[1])
        counts = _ramp(shape, kept, choosing, pattern.unit(shape, name=layer.name), fixed=pattern.sparsity is not None)
        with full_products():
            unit = inverted(layer, inputs).to(layer.weight.device)
            dense = layer.weight.float() * unit.scale
            pattern.mask(dense.abs(), kept, name=layer.name)  # what it refuses is refused before the work
            sparse, mask = _alternate(dense, unit, pattern, counts, iterations=iterations, rho=rho)
            weight = (sparse / unit.scale).to(layer.weight.dtype)
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"admm's weights of '{layer.name}' overflow {weight.dtype}: raise rho (now {rho:g}), or load the model "
                "in bfloat16 or float32"
            )
        return weight, mask

    return Criterion(solve, needs="gram", name="admm", nests=True)


@dataclass(frozen=True)
class _Unit:
    """The inverse of G + (d + rho) I (in, in) where G has a unit diagonal, and the units sqrt(G_jj) (in,)."""

    inverse: Tensor  # as by `halved`
    scale: Tensor

    def to(self, device: torch.device) -> _Unit:
        return _Unit(self.inverse.to(device), self.scale.to(device))


def _invert(unit: Tensor, scale: Tensor, added: float) -> _Unit:
    unit.diagonal().add_(added)
    lower = torch.linalg.cholesky(unit)
    invert_lower_(lower)
    return _Unit(halved(times(lower.T, halved(lower))), scale)


def _ramp(shape: tuple[int, int], kept: int, choosing: int, unit: int, *, fixed: bool) -> list[int]:
    """How many entries are kept in each iteration that chooses: s - s (1 - t)^3 of zeros, in whole units."""
    if fixed:
        return [kept] * choosing
    entries = shape[0] * shape[1]
    zeros = [(entries - kept) * (1 - (1 - step / choosing) ** 3) for step in range(1, choosing)]
    return [entries - int(each) // unit * unit for each in zeros] + [kept]


def _alternate(
    dense: Tensor, unit: _Unit, pattern: Pattern, counts: list[int], *, iterations: int, rho: float
) -> tuple[Tensor, Tensor]:
    """Z (out, in) in units of the columns, and its mask; nothing in here waits for the device."""
    weight, multipliers = dense.clone(), torch.zeros_like(dense)
    sparse = mask = dense
    for step in range(iterations):
        both = weight.add_(multipliers)  # W + U
        if step < len(counts):
            mask = pattern.choose(both.abs(), counts[step])
        sparse = torch.where(mask, both, 0.0)
        multipliers = both - sparse
        if step + 1 < iterations:
            weight = times(sparse - multipliers - dense, unit.inverse).mul_(rho).add_(dense)
    return sparse, mask
