"""Learning-rate schedules as closed-form functions of the step: a multiplier of each group's own learning rate.

No recursion and no state: step t of T alone decides, so that a resumed run needs nothing but its step.
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["linear_warmup_decay"]


def linear_warmup_decay(steps: int, warmup_share: float = 0.1) -> Callable[[int], float]:
    """A multiplier that rises linearly to 1 in the first floor(warmup_share * steps) steps, then falls linearly to 0.

    With T = steps, W = floor(warmup_share * T), R = T - W:  m(t) = (t + 1) / W for t < W, else 1 - (t - W) / R.
    The first step is already 1 / W (not 0, which would waste it) and the last is 1 / R; from T on it is 0.
    Source: the schedule of PERP (10 % warm-up, linear decay), its first step mended.
    Raises: ValueError for steps < 1 or a share outside [0, 1).

    >>> [linear_warmup_decay(4, 0.5)(t) for t in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """
    if steps < 1:
        raise ValueError(f"A schedule needs at least 1 step; got {steps}.")
    if not 0 <= warmup_share < 1:
        raise ValueError(f"warmup_share is the share of warm-up steps, in [0, 1); got {warmup_share}.")
    warmup = int(warmup_share * steps)

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return max(0.0, 1 - (step - warmup) / (steps - warmup))

    return multiplier
