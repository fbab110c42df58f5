"""Masks and weights together, by the alternating direction method of multipliers in one layer: ADMM and ALPS.

    minimise  ||X (W - W0)^T||^2  with  W = Z,  Z sparse      (Z, U: the sparse copy and the scaled multipliers)

in the columns' own units, B_ij = W0_ij sqrt(G_jj), so that G has a unit diagonal, and with G + d I for G:

    Z = M * (W + U),   U += W - Z,   W = (B G + rho (Z - U)) (G + rho I)^-1 = B + rho (Z - U - B) (G + rho I)^-1

M is chosen anew from |W + U|: weights that go early may come back, and those that stay have moved meanwhile. `admm`
(Boza 2024) does so in the first iterations, at a sparsity that rises as s - s (1 - t)^3, t in (0, 1]; `alps` (Meng et
al. 2024) in all of them at the whole sparsity, while rho rises, so that the mask is free at first and settles.

Ours, of `admm`: before the units are taken, a share of G's mean diagonal is added to it. In the units of an input that
the calibration hardly saw, moving its weight costs nothing, however far; with few tokens that ruined the model.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.machine import full_products
from prunus.patterns import Pattern
from prunus.score import Criterion, magnitude
from prunus.solve.quadratic import halved, invert_lower_, once_per_inputs, seen_gram, times, unit_gram

if TYPE_CHECKING:
    from prunus.layers import Inputs, Layer


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

    def units(layer: Layer, inputs: Inputs) -> tuple[Tensor, Tensor]:
        unit = inverted(layer, inputs).to(layer.weight.device)
        return unit.inverse, unit.scale

    def settle(dense: Tensor, inverse: Tensor, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        shape = (dense.shape[0], dense.shape[1])
        counts = _ramp(shape, kept, choosing, pattern.unit(shape), fixed=pattern.sparsity is not None)
        return _alternate(dense, inverse, pattern, counts, iterations=iterations, rho=rho)

    return _criterion("admm", rho, units, settle)


def alps(
    iterations: int = 60, stages: int = 12, damping: float = 0.01, *, rho: tuple[float, float] = (0.1, 5.0)
) -> Criterion:
    """ALPS (Meng et al. 2024, arXiv:2406.07831): ADMM whose dense and sparse copies are tied ever more strongly.

    iterations: choices of the mask, between any two of them one product (out, in) x (in, in). rho: how strongly the
        copies are tied in the first and in the last of `stages`, each of which takes one inverse (in, in); in between
        it rises by the same factor. damping: added to the diagonal of G, as a share of its mean.

    The paper raises rho by how much of the mask has changed, in up to 300 iterations, and ends with conjugate gradients
    on the mask: `refit(alps())`. Here rho is a closed form of the iteration, so that nothing waits for the device.
    Precision, patterns, unseen layers and errors are those of `admm`; inverses are not shared between layers, because
    `stages` of them would have to be held.

    >>> inputs = Inputs(2, gram=True)
    >>> inputs.add_(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    >>> layer = Layer("fc", torch.tensor([[2.0, 1.0]]), inputs)
    >>> refit(alps(), damping=0.0).solve(layer, Unstructured("row"), 1)[0]
    tensor([[2.5000, 0.0000]])
    """
    if not 1 <= operator.index(stages) < operator.index(iterations):
        raise ValueError(f"alps needs 1 <= stages < iterations; got stages={stages}, iterations={iterations}")
    low, high = rho
    if not (0 <= damping < float("inf") and 0 < low <= high < float("inf")):
        raise ValueError(f"alps needs damping >= 0 and a rho that rises from above 0; got {damping} and {rho}")
    rhos = [low * (high / low) ** (stage / max(1, stages - 1)) for stage in range(stages)]

    steps = [rhos[step * stages // (iterations - 1)] for step in range(iterations - 1)]

    def settle(dense: Tensor, gram: Tensor, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        return _tighten(dense, gram, pattern, kept, steps)

    return _criterion("alps", high, lambda layer, inputs: unit_gram(layer, inputs, damping), settle)


def _criterion(
    name: str,
    rho: float,
    units: Callable[[Layer, Inputs], tuple[Tensor, Tensor]],
    settle: Callable[[Tensor, Tensor, Pattern, int], tuple[Tensor, Tensor]],
) -> Criterion:
    """What goes by a matrix (in, in) in the units (in,) of the columns, both by `units`.

    settle: (dense weight in these units, matrix, pattern, kept) -> sparse weight in them, mask. rho: for errors.
    """

    @torch.no_grad()
    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        inputs = seen_gram(layer, name)
        if inputs is None:
            return magnitude.solve(layer, pattern, kept)
        with full_products():
            matrix, scale = units(layer, inputs)
            dense = layer.weight.float() * scale
            pattern.mask(dense.abs(), kept, name=layer.name)  # what it refuses is refused before the work
            sparse, mask = settle(dense, matrix, pattern, kept)
            weight = (sparse / scale).to(layer.weight.dtype)
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"{name}'s weights of '{layer.name}' overflow {weight.dtype}: raise rho (now {rho:g}), or load the "
                "model in bfloat16 or float32"
            )
        return weight, mask

    return Criterion(solve, needs="gram", name=name, nests=True)


@dataclass(frozen=True)
class _Unit:
    """The inverse of G + (d + rho) I (in, in) where G has a unit diagonal, and the units sqrt(G_jj) (in,)."""

    inverse: Tensor  # as by `halved`
    scale: Tensor

    def to(self, device: torch.device) -> _Unit:
        return _Unit(self.inverse.to(device), self.scale.to(device))


def _invert(unit: Tensor, scale: Tensor, added: float) -> _Unit:
    return _Unit(_inverse(unit, added), scale)


def _inverse(matrix: Tensor, added: float) -> Tensor:
    """(matrix + added I)^-1 as by `halved`; the matrix is overwritten by that sum."""
    matrix.diagonal().add_(added)
    lower = torch.linalg.cholesky(matrix)
    invert_lower_(lower)
    return halved(times(lower.T, halved(lower)))


def _ramp(shape: tuple[int, int], kept: int, choosing: int, unit: int, *, fixed: bool) -> list[int]:
    """How many entries are kept in each iteration that chooses: s - s (1 - t)^3 of zeros, in whole units."""
    if fixed:
        return [kept] * choosing
    entries = shape[0] * shape[1]
    zeros = [(entries - kept) * (1 - (1 - step / choosing) ** 3) for step in range(1, choosing)]
    return [entries - int(each) // unit * unit for each in zeros] + [kept]


def _alternate(
    dense: Tensor, inverse: Tensor, pattern: Pattern, counts: list[int], *, iterations: int, rho: float
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
            weight = times(sparse - multipliers - dense, inverse).mul_(rho).add_(dense)
    return sparse, mask


def _tighten(dense: Tensor, gram: Tensor, pattern: Pattern, kept: int, rhos: list[float]) -> tuple[Tensor, Tensor]:
    """Z (out, in) in units of the columns, and its mask: a product with each rho, and a mask before it and after it.

    gram: in those units, and overwritten. U is in units of rho; nothing in here waits for the device.
    """
    both, added, tied = dense, 0.0, rhos[0]
    mask = pattern.choose(both.abs(), kept)
    sparse = torch.where(mask, both, 0.0)
    for rho, steps in groupby(rhos):
        inverse = _inverse(gram, rho - added)
        multipliers = (both - sparse) * (tied / rho)
        added = tied = rho
        for _ in steps:
            both = times(sparse - multipliers - dense, inverse).mul_(rho).add_(dense).add_(multipliers)
            mask = pattern.choose(both.abs(), kept)
            sparse = torch.where(mask, both, 0.0)
            multipliers = both - sparse
    return sparse, mask
