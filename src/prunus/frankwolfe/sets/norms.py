"""The Lp norms, 1 <= p <= inf, as gauges.

    norm ||a||_p    best c = a^(q-1) / ||a||_q^(q-1), 1/p + 1/q = 1    reach n^max(0, 1/2 - 1/p)

For 1 < p < 2 the diameter of the ball is 2 r, reached along an axis; the formula 2 r n^(1/2 - 1/p), which holds from
p = 2 on and which published code uses for all p, gives less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_HALVINGS = 70  # of an interval, to below float64's rounding


@dataclass(frozen=True)
class Lp:
    """The gauge ||a||_p, 1 <= p <= inf. Raises ValueError for another p.

    >>> Lp(1).best(torch.tensor([[3.0, 4.0, 1.0]]))
    tensor([[0., 1., 0.]])
    """

    p: float

    def __post_init__(self) -> None:
        if not self.p >= 1:
            raise ValueError(f"Lp is a norm for p in [1, inf]; got p={self.p}")

    def at(self, n: int) -> Lp:
        return self

    def norm(self, a: Tensor) -> Tensor:
        if self.p in (1, 2, math.inf):
            return torch.linalg.vector_norm(a, self.p, dim=1)
        peak = _peak(a)
        return (a / peak).pow(self.p).sum(1).pow(1 / self.p) * peak[:, 0]

    def best(self, a: Tensor) -> Tensor:
        if self.p == 1:  # the first of the largest entries
            return torch.zeros_like(a).scatter_(1, a.argmax(1, keepdim=True), 1.0)
        if self.p == math.inf:
            return torch.ones_like(a)
        power = 1 / (self.p - 1)  # q - 1
        scaled = (a / _peak(a)).pow(power) if power != 1 else a / _peak(a)
        # The p-norm of a^(q-1) is ||a||_q^(q-1), because p (q - 1) = q.
        return scaled / Lp(self.p).norm(scaled)[:, None].clamp_min(torch.finfo(a.dtype).tiny)

    def project(self, a: Tensor, radius: Tensor) -> Tensor:
        """Closed for p = 2 and inf, by sorting for p = 1, else by bisection within bisection in float64 (slow)."""
        inside = self.norm(a)[:, None] <= radius[:, None]
        if self.p == math.inf:
            return torch.minimum(a, radius[:, None])
        if self.p == 2:
            found = a * (radius / self.norm(a).clamp_min(torch.finfo(a.dtype).tiny))[:, None]
        elif self.p == 1:
            found = _project_l1(a, radius)
        else:
            found = self._project_any(a.double(), radius.double()).to(a.dtype)
        return torch.where(inside, a, found)

    def reach(self, n: int) -> float:
        return n ** max(0.0, 0.5 - 1 / self.p)

    def rank(self, n: int) -> int | None:
        return 1 if self.p == 1 else None

    def _project_any(self, a: Tensor, radius: Tensor) -> Tensor:
        """c + m c^(p-1) = a for the multiplier m at which ||c||_p = radius; ||c||_p falls with m."""
        p, peak, n = self.p, _peak(a), a.shape[1]
        a, radius = a / peak, radius / peak[:, 0]
        # At the solution some c_i is at least radius n^(-1/p), and m = (a_i - c_i) / c_i^(p-1) <= c_i^(1-p).
        high = (radius.clamp_min(1e-300) * n ** (-1 / p)).pow(1 - p)[:, None]
        low = torch.zeros_like(high)
        c = a
        for _ in range(_HALVINGS):
            m = (low + high) / 2
            c = _solve(a, m, p)
            out = c.pow(p).sum(1, keepdim=True) > radius[:, None].pow(p)
            low, high = torch.where(out, m, low), torch.where(out, high, m)
        return _solve(a, high, p) * peak


def _solve(a: Tensor, m: Tensor, p: float) -> Tensor:
    """The c in [0, a] with c + m c^(p-1) = a."""
    low, high = torch.zeros_like(a), a.clone()
    for _ in range(_HALVINGS):
        c = (low + high) / 2
        above = c + m * c.pow(p - 1) > a
        low, high = torch.where(above, low, c), torch.where(above, c, high)
    return low


def _project_l1(a: Tensor, radius: Tensor) -> Tensor:
    """(a - t)+ with the t at which the sum is the radius; t from the sorted entries."""
    ordered = a.sort(1, descending=True).values
    count = torch.arange(1, a.shape[1] + 1, device=a.device, dtype=a.dtype)
    thresholds = (ordered.double().cumsum(1) - radius[:, None].double()) / count  # t if the first `count` stay
    last = (ordered > thresholds).sum(1, keepdim=True).clamp_min(1) - 1
    return (a.double() - thresholds.gather(1, last)).clamp_min(0).to(a.dtype)  # what stays may be tiny beside a


def _peak(a: Tensor) -> Tensor:
    """The largest entry of each row, (problems, 1), never zero: powers of a / peak neither overflow nor vanish."""
    return a.amax(1, keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
