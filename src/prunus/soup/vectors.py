"""Averages by task vectors, and on the sphere: what one tensor of the members becomes.

    tau_i = theta_i - theta_0        theta_0: the pruned network that all members were retrained from

All keep the zeros that members and theta_0 share: tau is zero there, and so is every combination. Which tensors are
averaged so, and the choice by name, is in `averages`; the plain mean in `average`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from prunus.patterns import keep_largest_of_all

_PARALLEL = 0.9995  # cosine beyond which the sphere is taken for a line, as mergekit does


def ties(tensors: Sequence[Tensor], base: Tensor, density: float) -> Tensor:
    """TIES (Yadav et al. 2023, algorithm 1, lambda = 1), in float32 or better, of the shape of `base`.

        tau'_i = tau_i where it is among the largest |tau_i|, else 0            trim
        gamma  = sgn(sum_i tau'_i)                                              elect
        theta  = theta_0 + mean of the tau'_i that are not 0 and of sign gamma  merge

    density: the share that trimming keeps of the entries that moved, at least one; in the paper, and in mergekit, of
    all entries. Counts are exact, ties break by index. Where the signs cancel nothing is added.

    >>> ties([torch.tensor([2.0, -1.0]), torch.tensor([4.0, 3.0])], torch.zeros(2), 1.0)
    tensor([3., 3.])
    """
    moved = torch.stack([_trimmed(tau, density) for tau in _vectors(tensors, base)])
    return _elected(moved, base)


def dare(tensors: Sequence[Tensor], base: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """DARE (Yu et al. 2024, Eq. 1 to 3), the mean of task vectors thinned at random:

        theta = theta_0 + 1/m sum_i z_i * tau_i / density,   z_i ~ Bernoulli(density) each entry

    generator: on the CPU. The mean over draws is the plain mean of the members.

    >>> dare([torch.tensor([2.0]), torch.tensor([4.0])], torch.zeros(1), 1.0, torch.Generator())
    tensor([3.])
    """
    return _wide(base) + _thinned(tensors, base, density, generator).mean(0)


def dare_ties(tensors: Sequence[Tensor], base: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Task vectors thinned as by `dare`, joined by the signs that TIES elects (mergekit's dare_ties).

    >>> dare_ties([torch.tensor([2.0]), torch.tensor([-1.0])], torch.zeros(1), 1.0, torch.Generator())
    tensor([2.])
    """
    return _elected(_thinned(tensors, base, density, generator), base)


def slerp(tensors: Sequence[Tensor], t: float) -> Tensor:
    """Spherical interpolation of two tensors (Shoemake 1985), each taken as one vector:

        sin((1 - t) w) / sin w a + sin(t w) / sin w b,   w the angle between a and b

    and (1 - t) a + t b where they are nearly parallel, or one is zero.

    >>> slerp([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 0.5)
    tensor([0.7071, 0.7071])
    """
    a, b = map(_wide, tensors)
    norms = float(a.double().norm()) * float(b.double().norm())
    cosine = float((a.double() * b.double()).sum()) / norms if norms else 1.0
    if abs(cosine) > _PARALLEL:
        return torch.lerp(a, b, t)
    angle = math.acos(cosine)
    return (a * math.sin((1 - t) * angle) + b * math.sin(t * angle)) / math.sin(angle)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype.itemsize > 4 else tensor.float()


def _vectors(tensors: Sequence[Tensor], base: Tensor) -> list[Tensor]:
    """The task vectors, on the first member's device."""
    start = _wide(base).to(tensors[0].device)
    return [_wide(tensor).to(start.device) - start for tensor in tensors]


def _trimmed(tau: Tensor, density: float) -> Tensor:
    """The largest of the entries that moved, as many as the share says; the others are zero."""
    moved = int(tau.count_nonzero())
    kept = max(round(density * moved), min(1, moved))  # else a scalar stays what it was
    chosen = keep_largest_of_all({"": tau.abs().float().reshape(1, -1)}, kept)[""]
    return tau.masked_fill(~chosen.view(tau.shape), 0.0)


def _thinned(tensors: Sequence[Tensor], base: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """(members, ...) task vectors of which each entry stays with probability `density`, scaled up."""
    taus = _vectors(tensors, base)
    stays = [(torch.rand(tau.shape, generator=generator) < density).to(tau.device) for tau in taus]
    return torch.stack([tau * keep / density for tau, keep in zip(taus, stays, strict=True)])


def _elected(moved: Tensor, base: Tensor) -> Tensor:
    """theta_0 plus the mean of the entries that have the sign of their sum."""
    agrees = (moved.sign() == moved.sum(0).sign()) & (moved != 0)
    mean = (moved * agrees).sum(0) / agrees.sum(0).clamp(min=1)
    return _wide(base).to(mean.device) + mean
