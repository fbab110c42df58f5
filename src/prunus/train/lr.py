"""Learning-rate schedules as closed-form functions of the step: a multiplier of each group's own learning rate.

No recursion and no state: step t of T alone decides, so that a resumed run needs nothing but its step.

    training     constant, multistep, exponential, linear, cosine, wsd, one_cycle, linear_warmup_decay
    retraining   ft, lrw, slr, clr, llr, allr: given the `Original` schedule of the dense run, in units of its peak M

A new one is a function that returns a `Multiplier`, and one `__all__` entry: recipes find it there. Its first argument
is `steps` (training) or `original` (retraining); what a run knows (`warmup`, `epoch`, a phase's signals) it takes under
these names, if it wants it.

With T steps, W of warm-up, R = T - W and u = t - W, every warm-up reaches its top in its last step and wastes none: its
first step is already 1 / W along. Schedulers of other libraries often begin with a step of learning rate zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = [
    "Multiplier",
    "Original",
    "allr",
    "clr",
    "constant",
    "cosine",
    "exponential",
    "ft",
    "linear",
    "linear_warmup_decay",
    "llr",
    "lrw",
    "multistep",
    "one_cycle",
    "risen",
    "scheduler",
    "slr",
    "warmup_steps",
    "wsd",
]

Multiplier = Callable[[int], float]


@dataclass(frozen=True)
class Original:
    """What the dense run's learning rate did: one value per optimizer step, the first `warmup` of them its warm-up.

    Raises ValueError for no steps, values that are not finite or negative, a peak of 0, or nothing after the warm-up.

    >>> original = Original.of([0.1, 0.2, 0.2, 0.02], warmup=1)
    >>> original.peak, original.least, original.runs()
    (0.2, 0.02, [(0.1, 1), (0.2, 2), (0.02, 1)])
    """

    lrs: tuple[float, ...]
    warmup: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < len(self.lrs):
            raise ValueError(
                f"An original schedule needs steps after its warm-up; got {len(self.lrs)} steps, warmup={self.warmup}."
            )
        for step, value in enumerate(self.lrs):
            if not 0 <= value < math.inf:
                raise ValueError(f"The learning rate of step {step} is {value}: pass what the dense run recorded.")
        if self.peak == 0:
            raise ValueError("The original schedule is 0 in every step: pass what the dense run recorded.")

    @classmethod
    def of(cls, lrs: Iterable[float], warmup: int = 0) -> Original:
        """The schedule of a recorded run, as `Trace.lrs` holds it."""
        return cls(tuple(float(value) for value in lrs), warmup)

    @classmethod
    def from_runs(cls, runs: Iterable[Sequence[float]], warmup: int = 0) -> Original:
        """The schedule that `runs` compressed: pairs of a value and how many steps it lasted."""
        return cls.of((value for value, length in runs for _ in range(int(length))), warmup)

    def runs(self) -> list[tuple[float, int]]:
        """Pairs of a value and how many steps it lasted: short for stepped schedules, and exact in JSON."""
        return [(value, sum(1 for _ in group)) for value, group in groupby(self.lrs)]

    @property
    def steps(self) -> int:
        """T0, the optimizer steps of the dense run."""
        return len(self.lrs)

    @property
    def peak(self) -> float:
        """M, the largest learning rate."""
        return max(self.lrs)

    @property
    def least(self) -> float:
        """m, the smallest learning rate after the warm-up."""
        return min(self.lrs[self.warmup :])


def constant(steps: int, warmup: int = 0) -> Multiplier:
    """1 after a linear warm-up of `warmup` steps:  m(t) = min(1, (t + 1) / W).

    Raises ValueError, as do all schedules here, for steps < 1 or a warm-up outside [0, steps).

    >>> [constant(4, warmup=2)(t) for t in range(4)]
    [0.5, 1.0, 1.0, 1.0]
    """
    _check(steps, warmup)
    return _after(warmup, _straight, lambda u: 1.0)


def multistep(
    steps: int, milestones: Sequence[float], gamma: float = 0.1, warmup: int = 0, epoch: int = 1
) -> Multiplier:
    """gamma to the number of milestones passed:  m(t) = min(1, (t + 1) / W) * gamma^#{i: milestones_i <= t}.

    Milestones are counted from the start, warm-up included, in epochs of `epoch` steps (left out: in steps). Raises
    ValueError for one that is not above 0.

    >>> [multistep(4, [2, 3], gamma=0.5)(t) for t in range(4)]
    [1.0, 1.0, 0.5, 0.25]
    """
    _check(steps, warmup)
    if not all(each > 0 for each in milestones):
        raise ValueError(f"milestones are above 0; got {list(milestones)}")
    places = tuple(max(1, round(each * epoch)) for each in milestones)

    def multiplier(step: int) -> float:
        rise = (step + 1) / warmup if step < warmup else 1.0
        return rise * gamma ** sum(place <= step for place in places)

    return multiplier


def exponential(steps: int, gamma: float, warmup: int = 0, epoch: int = 1) -> Multiplier:
    """gamma^(u / epoch), gamma being the factor of `epoch` steps, after a linear warm-up.

    Raises ValueError for a factor that is not above 0.

    >>> [exponential(3, gamma=0.5)(t) for t in range(3)]
    [1.0, 0.5, 0.25]
    """
    _check(steps, warmup)
    if not gamma > 0:
        raise ValueError(f"gamma is a factor above 0; got {gamma}")
    factor = gamma ** (1 / epoch)
    return _after(warmup, _straight, lambda u: factor**u)


def linear(steps: int, end: float = 0.0, warmup: int = 0) -> Multiplier:
    """1 - (1 - end) * u / R after a linear warm-up: `end` would be reached in step T, the one after the last.

    Raises ValueError for an end outside [0, 1], as do `cosine` and `wsd`.

    >>> [linear(4)(t) for t in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    _check(steps, warmup)
    return _after(warmup, _straight, _falling(steps - warmup, end))


def cosine(steps: int, end: float = 0.0, warmup: int = 0) -> Multiplier:
    """end + (1 - end) * (1 + cos(pi * u / R)) / 2 after a linear warm-up; `end` would be reached in step T.

    >>> [round(cosine(4)(t), 3) for t in range(4)]
    [1.0, 0.854, 0.5, 0.146]
    """
    _check(steps, warmup)
    return _after(warmup, _straight, _half_wave(steps - warmup, end))


def wsd(steps: int, decay: float = 0.2, end: float = 0.0, warmup: int = 0) -> Multiplier:
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): 1 until the last share `decay` of the steps, then a line.

        m(t) = 1 for t < T - D,   1 - (1 - end) * (t - T + D) / D   after that,   D = max(1, round(decay * T))

    The line is Haegele et al. 2024's; MiniCPM falls exponentially. `end` would be reached in step T. Where the warm-up
    leaves fewer steps than D, it falls through those. Raises ValueError for a decay outside (0, 1].

    >>> [wsd(5, decay=0.4)(t) for t in range(5)]
    [1.0, 1.0, 1.0, 1.0, 0.5]
    """
    _check(steps, warmup)
    if not 0 < decay <= 1:
        raise ValueError(f"decay is the share of the steps in which the rate falls, in (0, 1]; got {decay}")
    falling = min(max(1, round(decay * steps)), steps - warmup)
    stable, fall = steps - warmup - falling, _falling(falling, end)
    return _after(warmup, _straight, lambda u: fall(max(0, u - stable)))


def one_cycle(steps: int, peak_share: float = 0.3) -> Multiplier:
    """Linearly up to 1 in the first floor(peak_share * steps) steps, then linearly down to 0 (Smith & Topin 2019).

    It rises by itself, so it takes no warm-up. The third phase of the paper, further down, is left out.

    >>> [one_cycle(4, 0.5)(t) for t in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    return linear_warmup_decay(steps, peak_share)


def linear_warmup_decay(steps: int, warmup_share: float = 0.1) -> Multiplier:
    """A multiplier that rises linearly to 1 in the first floor(warmup_share * steps) steps, then falls linearly to 0.

    With T = steps, W = floor(warmup_share * T), R = T - W:  m(t) = (t + 1) / W for t < W, else 1 - (t - W) / R.
    The first step is already 1 / W (not 0, which would waste it) and the last is 1 / R; from T on it is 0.
    Source: the schedule of PERP (10 % warm-up, linear decay), its first step mended.
    Raises: ValueError for steps < 1 or a share outside [0, 1).

    >>> [linear_warmup_decay(4, 0.5)(t) for t in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    return linear(steps, warmup=warmup_steps(steps, warmup_share))


def ft(original: Original, steps: int) -> Multiplier:
    """Fine-tuning (Han et al. 2015): the least original value throughout, m / M.

    After a dense run that fell linearly to 0 that is M / T0: almost nothing.

    >>> ft(Original.of([1.0, 1.0, 0.5]), 2)(0)
    0.5
    """
    _check(steps, 0)
    value = original.least / original.peak
    return lambda step: value


def lrw(original: Original, steps: int) -> Multiplier:
    """Learning-rate rewinding (Renda et al. 2020): the last `steps` original values again, eta_{T0 - T + t} / M.

    t counts from 0. For T > T0, which the paper leaves open, the first value is held for the T - T0 steps before.

    >>> [lrw(Original.of([1.0, 0.5, 0.25]), 2)(t) for t in range(2)]
    [0.5, 0.25]
    """
    _check(steps, 0)
    lrs, peak, skipped = original.lrs, original.peak, original.steps - steps
    return lambda step: lrs[min(max(skipped + step, 0), len(lrs) - 1)] / peak


def slr(original: Original, steps: int, warmup: float = 0.1) -> Multiplier:
    """Scaled learning-rate restarting (Le & Hua 2021): the whole original schedule, compressed or stretched to R steps.

        m(t) = eta'_{floor(u * T0 / R)} / M,   eta' the original values with M in place of their warm-up

    First comes a cosine warm-up to M over a share `warmup` of the steps, as in `llr`.

    >>> [slr(Original.of([1.0, 1.0, 0.5, 0.25]), 2, warmup=0)(t) for t in range(2)]
    [1.0, 0.5]
    """
    rise = warmup_steps(steps, warmup)
    peak, rest = original.peak, steps - rise
    shares = (1.0,) * original.warmup + tuple(value / peak for value in original.lrs[original.warmup :])
    return _after(rise, _wave, lambda u: shares[min(u * len(shares) // rest, len(shares) - 1)])


def clr(original: Original, steps: int, warmup: float = 0.1) -> Multiplier:
    """Cyclic learning-rate restarting (Le & Hua 2021): a cosine from M to m.

        m(t) = (m + (M - m) * (1 + cos(pi * u / R)) / 2) / M

    First comes a cosine warm-up to M over a share `warmup` of the steps, as in `llr`.

    >>> [clr(Original.of([1.0, 0.5]), 2, warmup=0)(t) for t in range(2)]
    [1.0, 0.75]
    """
    rise = warmup_steps(steps, warmup)
    return _after(rise, _wave, _half_wave(steps - rise, original.least / original.peak))


def llr(original: Original, steps: int, warmup: float = 0.1) -> Multiplier:
    """Linear learning-rate restarting (Zimmer et al. 2023): from M linearly to 0,  m(t) = 1 - u / R.

    First comes a cosine warm-up over W = floor(warmup * T) steps: m(t) = (1 - cos(pi * (t + 1) / W)) / 2 for t < W. The
    authors' code has t in place of t + 1, so that its first step does nothing. Of `original` only the peak matters.

    >>> [round(llr(Original.of([0.1]), 4, warmup=0.5)(t), 3) for t in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    return allr(original, steps, distance=1.0, share=1.0, warmup=warmup)


def allr(original: Original, steps: int, *, distance: float, share: float, warmup: float = 0.1) -> Multiplier:
    """Adaptive linear learning-rate restarting (Zimmer et al. 2023): `llr` from a lower start where less was lost.

        a = M * min(1, max(d1, d2)),   m(t) = a / M * (1 - u / R)

    distance: d1, what pruning took away (`soup.distance`). share: d2, this phase's steps by those of the dense run.
    Both are at least 0; what exceeds 1 counts as 1. Raises ValueError for a negative or missing (NaN) signal.

    >>> [allr(Original.of([0.1]), 4, distance=0.5, share=0.1, warmup=0)(t) for t in range(4)]
    [0.5, 0.375, 0.25, 0.125]
    """
    if not distance >= 0 or not share >= 0:
        raise ValueError(f"ALLR's signals are at least 0; got distance={distance}, share={share}.")
    rise, start = warmup_steps(steps, warmup), min(1.0, max(distance, share))
    fall = _falling(steps - rise, 0.0)
    return _after(rise, lambda x: start * _wave(x), lambda u: start * fall(u))


def risen(multiplier: Multiplier, steps: int) -> int:
    """In how many first steps a schedule rises, the last of them at its top; 0 for one that begins there.

    >>> risen(one_cycle(10, 0.3), 10), risen(cosine(10), 10)
    (3, 0)
    """
    falls = (step for step in range(steps - 1) if multiplier(step + 1) <= multiplier(step))
    last = next(falls, steps - 1)
    return last + 1 if last else 0


def warmup_steps(steps: int, share: float) -> int:
    """floor(share * steps), where binary fractions miss an integer (0.29 * 100) that integer.

    >>> warmup_steps(100, 0.29)
    29
    """
    _check(steps, 0)
    if not 0 <= share < 1:
        raise ValueError(f"warmup_share is the share of warm-up steps, in [0, 1); got {share}.")
    return min(steps - 1, math.floor(share * steps + 1e-9))


def scheduler(optimizer: Optimizer, multiplier: Multiplier) -> LambdaLR:
    """An ordinary PyTorch scheduler: each group's learning rate, as it is now, times multiplier(step).

    For a retraining schedule that learning rate must be the dense run's peak. Its state is the step.

    >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    >>> scheduler(optimizer, linear(4)).get_last_lr()
    [0.1]
    """
    for group in optimizer.param_groups:
        group.pop("initial_lr", None)  # what an earlier scheduler began at, which torch would take
    return LambdaLR(optimizer, multiplier)


def _after(warmup: int, rise: Callable[[float], float], rest: Callable[[int], float]) -> Multiplier:
    """`rise` of 1/W..1 in the warm-up, then `rest` of u = 0, 1, ..."""
    return lambda step: rise((step + 1) / warmup) if step < warmup else rest(step - warmup)


def _straight(x: float) -> float:
    return x


def _wave(x: float) -> float:
    return (1 - math.cos(math.pi * x)) / 2


def _falling(rest: int, end: float) -> Callable[[int], float]:
    _check_end(end)
    return lambda u: max(end, 1 - (1 - end) * u / rest) if u < rest else end


def _half_wave(rest: int, end: float) -> Callable[[int], float]:
    _check_end(end)
    return lambda u: end + (1 - end) * (1 + math.cos(math.pi * u / rest)) / 2 if u < rest else end


def _check_end(end: float) -> None:
    if not 0 <= end <= 1:
        raise ValueError(f"end is the share of the peak that the rate falls to, in [0, 1]; got {end}")


def _check(steps: int, warmup: int) -> None:
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step; got {steps}.")
    if not 0 <= warmup < steps:
        raise ValueError(f"The warm-up must leave steps after it; got {warmup} of {steps} steps.")
