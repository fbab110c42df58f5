"""A feasible set: all tensors whose gauge is at most the radius. Constructors of those that the papers use are below.

| set | norm of x | extreme points (r = 1) | L2 diameter |
|---|---|---|---|
| `lp(p)` | ‖x‖_p | p = 1: one entry | 2 r n^max(0, 1/2 - 1/p) |
| `k_sparse(K)` | max(‖x‖_∞, ‖x‖_1 / K) | K entries of ±1 | 2 r √K |
| `k_support(K)` | the K-support norm | K entries, ‖x‖_2 = 1 | 2 r |
| `group_k_support(K)` | the same of group norms | K groups, ‖x‖_2 = 1 | 2 r |
| `nuclear()` | sum of singular values | rank 1 | 2 r |
| `spectral_k_sparse(K)` | max(σ_1, sum σ / K) | K singular values of 1 | 2 r √K |
| `spectral_k_support(K)` | the K-support norm of σ | rank K, ‖x‖_F = 1 | 2 r |

Any gauge goes with any way of seeing: `Ball(Lp(1), Groups(), 3.0)` is the group-lasso ball.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunus.frankwolfe.sets.group import Entries, Groups, Labels, Tied
from prunus.frankwolfe.sets.norms import Lp
from prunus.frankwolfe.sets.protocol import Gauge, Seen
from prunus.frankwolfe.sets.sparse import KSparse, KSupport
from prunus.frankwolfe.sets.spectral import Spectrum
from prunus.frankwolfe.sets.subspace import Triple

RebuildAll = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Ball:
    """{x: gauge(seen(x)) <= radius}. Raises ValueError for a radius that is not positive and finite.

    A point x is one tensor, or a list of tensors that are constrained jointly, as one long vector (or as the blocks of
    one block-diagonal matrix). Weights of more than two dimensions are matrices (out, rest). Computed in float32, or
    float64 for float64; results have the point's dtype, device and shapes.

    >>> k_support(2, radius=2.0).lmo(torch.tensor([3.0, -4.0, 1.0, 0.5])).round(decimals=4)
    tensor([-1.2000,  1.6000,  0.0000,  0.0000])
    """

    gauge: Gauge
    seen: Seen | Tied
    radius: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.radius < math.inf:
            raise ValueError(f"A feasible set has a radius above 0, and finite; got {self.radius}")

    @torch.no_grad()
    def norm(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """The gauge of x, a scalar float32 on its device: x is in the set where it is at most `radius`."""
        parts = self._parts(x)
        return self._gauge(parts).norm(self._split(parts)[0])[0]

    @torch.no_grad()
    def lmo(self, gradient: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """A point v of the set with the least <gradient, v>: the linear minimisation oracle, exact.

        <gradient, v> = -radius * (dual norm of the gradient). Of equal entries the first are taken; v is 0 where the
        gradient is.
        """
        found = self.extreme(self._parts(gradient))
        return _like(gradient, [part.mul(-self.radius).add_(0.0) for part in found])  # + 0: no negative zeros

    def diameter(self, *shapes: Sequence[int]) -> float:
        """The largest L2 distance of two points with tensors of these shapes."""
        return 2 * self.radius * self.gauge.reach(self._count([self.seen.key(tuple(shape)) for shape in shapes]))

    def of_diameter(self, diameter: float, *shapes: Sequence[int]) -> Ball:
        """The same set with the radius at which its L2 diameter, for tensors of these shapes, is `diameter`.

        >>> k_sparse(4).of_diameter(8.0, (10, 3)).radius
        2.0
        """
        return replace(self, radius=diameter / replace(self, radius=1.0).diameter(*shapes))

    @torch.no_grad()
    def start(self, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """A feasible point to start from: x, scaled down until its norm is the radius if it was larger."""
        factor = (self.radius / self.norm(x).clamp_min(1e-30)).clamp_max(1.0)
        return _like(x, [part * factor for part in ([x] if isinstance(x, Tensor) else x)])

    @torch.no_grad()
    def project(self, x: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """The point of the set that is nearest to x in the Euclidean norm."""
        parts = self._parts(x)
        profile, rebuild = self._split(parts)
        return _like(x, rebuild(self._gauge(parts).project(profile, torch.full_like(profile[:, 0], self.radius))))

    # For the optimizer: several problems at once, and singular vectors followed from step to step.

    def extreme(self, parts: Sequence[Tensor], leading: Sequence[Triple] | None = None) -> list[Tensor]:
        """For each problem the point of norm at most 1 (whatever the radius) with the largest inner product.

        parts: float (problems, rows, columns) each, rows and columns as `seen.key` says; the parts of one problem are
        constrained jointly. leading: for each part its leading singular values and vectors, in place of a decomposition
        (see `widths`).
        """
        gauge = self._gauge(parts)
        if isinstance(gauge, KSupport) and isinstance(self.seen, Entries) and len(parts) == 1:
            # The same as below, without a detour over signs and profiles.
            return [gauge.signed_best(parts[0].flatten(1)).view_as(parts[0])]
        profile, rebuild = self._split(parts, leading)
        found = rebuild(gauge.best(profile))
        if leading is not None or not isinstance(self.seen, Spectrum):
            return found
        # A matrix of zeros has singular vectors all the same.
        return [each * (part != 0).any(2, True).any(1, True) for each, part in zip(found, parts, strict=True)]

    def widths(self, keys: Sequence[tuple[int, int]]) -> list[int] | None:
        """How many leading singular vectors of each part `extreme` needs; None if it needs none, or all."""
        rank = self.gauge.rank(self._count(keys)) if isinstance(self.seen, Spectrum) else None
        return None if rank is None else [min(rank, *key) for key in keys]

    def _parts(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        tensors = [x] if isinstance(x, Tensor) else list(x)
        if not tensors:
            raise ValueError("A point of a feasible set has at least one tensor")
        exact = torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32
        return [tensor.to(exact).reshape(1, *self.seen.key(tuple(tensor.shape))) for tensor in tensors]

    def _split(self, parts: Sequence[Tensor], leading: Sequence[Triple] | None = None) -> tuple[Tensor, RebuildAll]:
        """The profile of a point of several parts: theirs, one behind the other, unless they share groups."""
        if isinstance(self.seen, Tied):
            return self.seen.split(parts)
        if leading is not None and isinstance(self.seen, Spectrum):
            found = [self.seen.split_leading(each) for each in leading]
        else:
            found = [self.seen.split(part) for part in parts]
        profiles = [profile for profile, _ in found]
        sizes = [profile.shape[1] for profile in profiles]

        def rebuild(new: Tensor) -> list[Tensor]:
            return [each(part) for (_, each), part in zip(found, new.split(sizes, 1), strict=True)]

        return torch.cat(profiles, 1) if len(profiles) > 1 else profiles[0], rebuild

    def _gauge(self, parts: Sequence[Tensor]) -> Gauge:
        return self.gauge.at(self._count([(part.shape[1], part.shape[2]) for part in parts]))

    def _count(self, keys: Sequence[tuple[int, int]]) -> int:
        return self.seen.count(keys) if isinstance(self.seen, Tied) else sum(self.seen.count(*key) for key in keys)


def lp(p: float, radius: float = 1.0) -> Ball:
    """The ball of the Lp norm, p in [1, inf].

    >>> lp(float("inf"), radius=2.0).lmo(torch.tensor([3.0, -4.0, 0.0]))
    tensor([-2.,  2.,  0.])
    """
    return Ball(Lp(p), Entries(), radius)


def k_sparse(k: int | float, radius: float = 1.0) -> Ball:
    """The K-sparse polytope, B_1(r K) and B_inf(r) intersected; K a count or a share of the entries.

    >>> k_sparse(2, radius=2.0).lmo(torch.tensor([3.0, -4.0, 1.0, 0.5]))
    tensor([-2.,  2.,  0.,  0.])
    """
    return Ball(KSparse(k), Entries(), radius)


def k_support(k: int | float, radius: float = 1.0) -> Ball:
    """The K-support norm ball (Argyriou et al. 2012); K a count or a share of the entries.

    >>> k_support(1).norm(torch.tensor([3.0, -4.0, 1.0, 0.5]))
    tensor(8.5000)
    """
    return Ball(KSupport(k), Entries(), radius)


def group_k_support(k: int | float, radius: float = 1.0, groups: Groups | Labels | Tied | None = None) -> Ball:
    """The K-support norm ball of group norms; K a count or a share of the groups; groups: default whole filters.

    `Tied()` makes groups of the neurons of a gated MLP; its three matrices are then one point.

    >>> group_k_support(1, radius=5.0).lmo(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    tensor([[-3., -4.],
            [ 0.,  0.]])
    """
    return Ball(KSupport(k), groups or Groups(), radius)


def nuclear(radius: float = 1.0) -> Ball:
    """The nuclear norm ball.

    >>> nuclear(radius=3.0).norm(torch.diag(torch.tensor([2.0, 1.0])))
    tensor(3.)
    """
    return Ball(Lp(1), Spectrum(), radius)


def spectral_k_sparse(k: int | float, radius: float = 1.0) -> Ball:
    """The K-sparse polytope of the singular values; K a count or a share of the smaller dimension.

    >>> spectral_k_sparse(2).diameter((4, 9))
    2.8284271247461903
    """
    return Ball(KSparse(k), Spectrum(), radius)


def spectral_k_support(k: int | float, radius: float = 1.0) -> Ball:
    """The K-support norm ball of the singular values; K a count or a share of the smaller dimension.

    >>> spectral_k_support(1).norm(torch.diag(torch.tensor([2.0, 1.0])))
    tensor(3.)
    """
    return Ball(KSupport(k), Spectrum(), radius)


def _like(x: Tensor | Sequence[Tensor], found: list[Tensor]) -> Tensor | list[Tensor]:
    """What was found, in the shapes and dtypes of x."""
    if isinstance(x, Tensor):
        return found[0].view(x.shape).to(x.dtype)
    return [part.reshape(each.shape).to(each.dtype) for part, each in zip(found, x, strict=True)]
