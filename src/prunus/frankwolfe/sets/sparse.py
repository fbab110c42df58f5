"""Two gauges whose extreme points have K nonzeros: the K-sparse polytope and the K-support norm.

KSparse     {||a||_1 <= K, ||a||_inf <= 1}                        extreme points: K entries of 1
KSupport    conv {||a||_0 <= K, ||a||_2 <= 1} (Argyriou et al. 2012)    extreme points: K entries of norm 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.frankwolfe.sets.protocol import count_of
from prunus.patterns import goes_to_kernels

_BLOCK = 1024  # entries
_HALVINGS = 90  # of an interval: enough for points a million times too far out


@dataclass(frozen=True)
class KSparse:
    """The gauge max(||a||_inf, ||a||_1 / K); K a count or a share (see `count_of`).

    >>> KSparse(2).best(torch.tensor([[3.0, 4.0, 1.0, 0.5]]))
    tensor([[1., 1., 0., 0.]])
    """

    k: int | float

    def __post_init__(self) -> None:
        count_of(self.k, 1)

    def at(self, n: int) -> KSparse:
        return KSparse(count_of(self.k, n))

    def norm(self, a: Tensor) -> Tensor:
        return torch.maximum(a.amax(1), a.sum(1) / count_of(self.k, a.shape[1]))

    def best(self, a: Tensor) -> Tensor:
        return largest(a, count_of(self.k, a.shape[1])).to(a.dtype)

    def project(self, a: Tensor, radius: Tensor) -> Tensor:
        """clip(a - t, 0, r) with the least t >= 0 at which the sum is at most r K; bisection, then t in closed form."""
        values, cap = a.double(), radius[:, None].double()
        total = cap * count_of(self.k, a.shape[1])
        low, high = torch.zeros_like(cap), values.amax(1, keepdim=True)
        for _ in range(_HALVINGS):
            t = (low + high) / 2
            over = _between(values - t, cap).sum(1, keepdim=True) > total
            low, high = torch.where(over, t, low), torch.where(over, high, t)
        left = values - high
        free, full = (left > 0) & (left < cap), (left >= cap).sum(1, keepdim=True)
        exact = ((values * free).sum(1, keepdim=True) + full * cap - total) / free.sum(1, keepdim=True).clamp_min(1)
        # The closed form holds on the segment that bisection found; without free entries any t there will do.
        t = torch.where(free.any(1, keepdim=True), exact, high)
        needless = _between(values, cap).sum(1, keepdim=True) <= total
        return _between(values - torch.where(needless, torch.zeros_like(t), t), cap).to(a.dtype)

    def reach(self, n: int) -> float:
        return count_of(self.k, n) ** 0.5

    def rank(self, n: int) -> int | None:
        return count_of(self.k, n)


@dataclass(frozen=True)
class KSupport:
    """The K-support norm; K = 1 is the L1 norm, K = n the L2 norm; K a count or a share (see `count_of`).

    With a sorted descending, S_j = sum of the entries from rank j on, and the one rho in 0..K-1 for which
    a_(K-rho-1) > S_(K-rho) / (rho+1) >= a_(K-rho), where a_0 = inf:
    norm = sqrt( sum_(i < K-rho) a_i^2 + S_(K-rho)^2 / (rho+1) )        (Argyriou et al. 2012, Prop. 2.1)

    >>> [round(KSupport(k).norm(torch.tensor([[3.0, 4.0, 1.0, 0.5]])).item(), 4) for k in (1, 2, 3, 4)]
    [8.5, 6.0104, 5.2202, 5.1235]
    """

    k: int | float

    def __post_init__(self) -> None:
        count_of(self.k, 1)

    def at(self, n: int) -> KSupport:
        return KSupport(count_of(self.k, n))

    def norm(self, a: Tensor) -> Tensor:
        """Only the K largest are sorted; the others enter through their sum. Sums are in float64."""
        n, values = a.shape[1], a.double()
        k = count_of(self.k, n)
        top = values.topk(k, dim=1).values  # descending
        rest = values.sum(1, keepdim=True) - top.sum(1, keepdim=True)
        tails = top.flip(1).cumsum(1) + rest.clamp_min(0)  # [:, rho]: S_(k-rho)
        count = torch.arange(1, k + 1, device=a.device, dtype=values.dtype)  # rho + 1
        means = tails / count
        # "a_(k-rho-1) > mean" first holds at the right rho; at rho = k-1 always, since a_0 is infinite.
        above = torch.cat([top.flip(1)[:, 1:] > means[:, :-1], torch.ones_like(means[:, :1], dtype=torch.bool)], 1)
        rho = above.to(torch.uint8).argmax(1, keepdim=True)  # the first True
        heads = top.square().cumsum(1)
        place = k - rho - 2  # the last of the k-rho-1 entries that stand alone
        head = torch.where(place >= 0, heads.gather(1, place.clamp_min(0)), torch.zeros_like(rest))
        tail = tails.gather(1, rho)
        return (head + tail.square() / (rho + 1)).sqrt()[:, 0].to(a.dtype)

    def best(self, a: Tensor) -> Tensor:
        return self.signed_best(a)

    def signed_best(self, x: Tensor) -> Tensor:
        """`best` of |x| with the signs of x, (problems, n): two passes over x, or on a GPU six short readings of it."""
        k, tiny = count_of(self.k, x.shape[1]), torch.finfo(x.dtype).tiny  # 1 / tiny is finite
        if goes_to_kernels(x):
            from prunus.kernels import largest_of_long_rows

            kept, squares = largest_of_long_rows(x, k, absolute=True)
            return kept.mul_(1 / squares.sqrt().to(x.dtype).clamp_min(tiny)[:, None])
        a = x.abs()
        top = a.topk(k, dim=1, sorted=False).values
        peak = top.amax(1, keepdim=True).clamp_min(tiny)
        # The chosen entries are these values, whichever of equal ones are chosen.
        length = torch.linalg.vector_norm(top / peak, dim=1, keepdim=True).clamp_min(1.0)  # less only for zeros
        return (x * _mask_of(a, top)).mul_(1 / peak / length)

    def project(self, a: Tensor, radius: Tensor) -> Tensor:
        """By bisection on the multiplier m, and within it on b.

        The squared norm is min over 0 <= w <= 1, sum w <= K of sum c_i^2 / w_i. Minimising |c - a|^2 + m sum c^2 / w
        gives c = a w / (w + m) with w = clip(a b - m, 0, 1) and b such that sum w = K.
        """
        k, peak = count_of(self.k, a.shape[1]), a.amax(1, keepdim=True).double()
        peak = peak.clamp_min(torch.finfo(torch.float64).tiny)
        values, limit = a.double() / peak, radius[:, None].double() / peak
        start = self.norm(values)[:, None]
        low, high = torch.zeros_like(start), (start / limit).clamp_min(1.0)  # (a b - m) of norm at most |a| / (1 + m)
        for _ in range(_HALVINGS):
            m = (low + high) / 2
            w = _weights(values, m, k)
            squared = (values.square() * w / (w + m).square()).sum(1, keepdim=True)
            over = squared > limit.square()
            low, high = torch.where(over, m, low), torch.where(over, high, m)
        w = _weights(values, high, k)
        found = values * w / (w + high) * peak
        return torch.where(start <= limit, a, found.to(a.dtype))

    def reach(self, n: int) -> float:
        return 1.0

    def rank(self, n: int) -> int | None:
        return count_of(self.k, n)


def largest(a: Tensor, k: int) -> Tensor:
    """The mask of exactly k entries in each row, the largest; of equal ones the first.

    a: (problems, n), 1 <= k <= n, no NaN. Returns bool of that shape; nothing waits for the device.

    >>> largest(torch.tensor([[1.0, 2.0, 2.0, 2.0]]), 2)
    tensor([[False,  True,  True, False]])
    """
    return _mask_of(a, a.topk(min(k, a.shape[1]), dim=1, sorted=False).values)


def _mask_of(a: Tensor, top: Tensor) -> Tensor:
    """The mask of the largest entries of each row, whose values are `top`; of equal ones the first."""
    k = top.shape[1]
    if k >= a.shape[1]:
        return torch.ones_like(a, dtype=torch.bool)
    threshold = top.amin(1, keepdim=True)
    above, equal = a > threshold, a == threshold
    wanted = k - above.sum(1, keepdim=True, dtype=torch.int32)
    return above.logical_or_(_first(equal, wanted))


def _first(equal: Tensor, wanted: Tensor) -> Tensor:
    """The first `wanted` (problems, 1) of the entries of each row that are True.

    Counted in blocks: a GPU sums along a row with one block of threads, milliseconds for 2.4 million entries.
    """
    n = equal.shape[1]
    if n <= _BLOCK:
        return equal & (equal.cumsum(1, dtype=torch.int32) <= wanted)
    blocks = torch.nn.functional.pad(equal, (0, -n % _BLOCK)).unflatten(1, (-1, _BLOCK))
    counts = blocks.sum(2, dtype=torch.int32)
    left = wanted + counts - counts.cumsum(1, dtype=torch.int32)  # for each block
    return (blocks & (blocks.cumsum(2, dtype=torch.int32) <= left[:, :, None])).flatten(1)[:, :n]


def _weights(a: Tensor, m: Tensor, k: int) -> Tensor:
    """clip(a b - m, 0, 1) with the b at which its sum is k, or as large as it gets.

    The sum is piecewise linear in b, with kinks where a_i b is m or 1 + m: it is counted at all of them from prefix
    sums of the sorted a, and the b sought lies on a line between two.
    """
    ordered = a.sort(1).values
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    safe = torch.where(a > 0, a, torch.inf)  # a zero has no kink
    kinks = torch.cat([m / safe, (1 + m) / safe], 1).sort(1).values
    zero = torch.searchsorted(ordered, m / kinks.clamp_min(1e-300))  # how many entries are below
    full = torch.searchsorted(ordered, (1 + m) / kinks.clamp_min(1e-300))
    middle = sums.gather(1, full) - sums.gather(1, zero)
    total = kinks * middle - m * (full - zero) + (a.shape[1] - full)
    right = (total < k).sum(1, keepdim=True).clamp(1, kinks.shape[1] - 1)
    left = right - 1
    step = (k - total.gather(1, left)) / (total.gather(1, right) - total.gather(1, left)).clamp_min(1e-300)
    b = kinks.gather(1, left) + step.clamp(0, 1) * (kinks.gather(1, right) - kinks.gather(1, left))
    return (a * b - m).clamp(0, 1)


def _between(values: Tensor, cap: Tensor) -> Tensor:
    return torch.minimum(values.clamp_min(0), cap)
