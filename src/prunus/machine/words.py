"""Counts in words."""

from __future__ import annotations


def counted(count: float, noun: str, digits: str = "") -> str:
    """A count and what is counted, one or several; digits: how the count is written, as in a format.

    >>> counted(1, "step"), counted(2000, "step", ","), counted(1.0, "epoch", ".3g")
    ('1 step', '2,000 steps', '1 epoch')
    """
    return f"{count:{digits}} {noun}{'' if count == 1 else 's'}"
