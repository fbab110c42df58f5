"""Columns of a matrix that go for good, and those that stay fitted to the dense outputs: least squares, in closed form.

    minimise E(W) = tr((W - W0) H (W - W0)^T),  H = G + lam I,  over W that is zero in the columns that go

    P = H^-1,   E of the next columns g to go:  tr(W_g (P_gg)^-1 W_g^T)    (of single weights: Hassibi and Stork 1993)
    W <- W - W_g (P_gg)^-1 P_g,     P <- P - P_,g (P_gg)^-1 P_g,

after which W is the minimum over the columns that stay: W_S = W0 H_,S (H_SS)^-1, by which it is computed at the end.
It is the quadratic of `solve.refit`, whose masks differ from row to row and need iterations.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.score import Criterion, warn_unseen

if TYPE_CHECKING:
    from prunus.layers import Layer
    from prunus.patterns import Pattern

__all__ = ["columns"]

_ROUNDS = 32  # columns that go at once are a 32nd of all that go: their E are taken as if each went alone


def columns(width: int = 1, damping: float = 0.01) -> Criterion:
    """A criterion by which whole columns go, `width` beside one another (a head's) together, and the rest is refitted.

    damping: lam, as a share of the mean diagonal of G. Float64 throughout. How many entries are kept says how many
    columns: the nearest number. Its solve raises ValueError for a layer without a Gram matrix and for NaN or Inf.

    >>> inputs = Inputs(2, gram=True)
    >>> inputs.add_(torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    >>> columns(damping=0.0).solve(Layer("fc", torch.tensor([[2.0, 1.0]]), inputs), Unstructured("layer"), 1)[0]
    tensor([[2.5000, 0.0000]])
    """

    @torch.no_grad()
    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        rows, size = layer.weight.shape
        stay = max(1, round(kept / rows / width))
        hessian, weight = _hessian(layer, damping), layer.weight.double()
        stays = _chosen(weight, hessian, width, stay).repeat_interleave(width)
        fitted = torch.zeros_like(weight)
        fitted[:, stays] = torch.linalg.solve(hessian[stays][:, stays], hessian[stays] @ weight.T).T
        return fitted.to(layer.weight.dtype), stays.expand(rows, size).clone()

    return Criterion(solve, needs="gram", name="columns")


def _hessian(layer: Layer, damping: float) -> Tensor:
    """H (in, in) float64 with mean diagonal near 1; the identity where no token came."""
    inputs, size = layer.inputs, layer.weight.shape[1]
    if inputs is None or inputs.gram is None:
        raise ValueError(f"columns needs the Gram matrix of '{layer.name}': calibrate with gram=True")
    if not inputs.tokens:
        warn_unseen(layer, "columns")
        return torch.eye(size, dtype=torch.float64, device=layer.weight.device)
    gram = inputs.gram.double().to(layer.weight.device)
    if not bool(gram.isfinite().all() and layer.weight.isfinite().all()):
        raise ValueError(f"'{layer.name}': its weight or what it receives holds NaN or Inf; calibrate in bfloat16")
    gram = gram / (float(gram.diagonal().mean()) or 1.0)  # 0 where all inputs were
    gram.diagonal().add_(damping)
    return gram


def _chosen(weight: Tensor, hessian: Tensor, width: int, stay: int) -> Tensor:
    """Which groups of columns stay, (groups,) bool."""
    left = torch.arange(weight.shape[1] // width, device=weight.device)
    stays = torch.ones(len(left), dtype=torch.bool, device=weight.device)
    at_once = max(1, (len(left) - stay) // _ROUNDS)
    inverse = torch.linalg.inv(hessian)
    while len(left) > stay:
        cost = _costs(weight, inverse, width)
        out = torch.zeros_like(left, dtype=torch.bool)
        out[cost.argsort(stable=True)[: min(at_once, len(left) - stay)]] = True
        stays[left[out]] = False
        gone, rest = out.repeat_interleave(width), ~out.repeat_interleave(width)
        share = torch.linalg.solve(inverse[gone][:, gone], inverse[gone][:, rest])  # (P_gg)^-1 P_g,
        weight = weight[:, rest] - weight[:, gone] @ share
        inverse = inverse[rest][:, rest] - inverse[rest][:, gone] @ share
        left = left[~out]
    return stays


def _costs(weight: Tensor, inverse: Tensor, width: int) -> Tensor:
    """E of each group of columns, (groups,), if it goes next."""
    groups = weight.shape[1] // width
    own = weight.view(-1, groups, width).transpose(0, 1)  # (groups, out, width)
    blocks = inverse.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    return (own @ torch.linalg.inv(blocks) * own).sum((1, 2))
