"""When a method prunes, and how much: the cubic schedule of gradual pruning, in steps of a run."""

from __future__ import annotations

import math


def cubic(sparsity: float, steps: int, *, every: float, start: float = 0.0, stop: float = 1.0) -> dict[int, float]:
    """Steps done -> the sparsity from then on, rising fast at first and ever slower, to exactly `sparsity` = S.

        s_k = S - S * (1 - k / n)^3   after the share start + k * every of all steps, k = 1..n

    every, start, stop: shares of the training; n = floor((stop - start) / every), so the last is not after `stop`.
    Source: Zhu & Gupta 2017, with initial sparsity 0. Raises ValueError for shares that leave no pruning.

    >>> [round(s, 4) for s in cubic(0.9, 100, every=0.1, stop=0.3).values()]
    [0.6333, 0.8667, 0.9]
    """
    if not (0 <= start < stop <= 1 and every > 0):
        raise ValueError(
            f"pruning goes from start to stop, 0 <= start < stop <= 1, by every > 0; got {start=}, {stop=}, {every=}"
        )
    prunings = math.floor((stop - start) / every + 1e-9)
    if prunings < 1:
        raise ValueError(
            f"no pruning fits between {start=} and {stop=} at {every=}; make every at most {stop - start:g}"
        )
    shares = [(start + k * every, k / prunings) for k in range(1, prunings + 1)]
    return {min(steps, max(1, round(steps * share))): sparsity - sparsity * (1 - done) ** 3 for share, done in shares}


def sparsity_after(events: dict[int, float], done: int) -> float:
    """The sparsity in force after `done` steps: that of the last event, 0 before the first.

    >>> sparsity_after({5: 0.5, 10: 0.9}, 7)
    0.5
    """
    return max((sparsity for step, sparsity in events.items() if step <= done), default=0.0)
