"""What a model's sizes alone say of what can go, before anything runs."""

from __future__ import annotations

from typing import Any

from prunus.shrink.experts import experts_left
from prunus.shrink.language import blocks_without, pairs_left

__all__ = ["check_shares"]


def check_shares(model: Any, *, blocks: int = 0, experts: float = 0.0, heads: float = 0.0) -> None:
    """Raise ValueError for blocks and shares of experts and heads that cannot go; the model may be empty.

    >>> check_shares(model, blocks=0)
    """
    blocks_without(model, blocks)
    if experts:
        experts_left(model, experts)
    if heads:
        pairs_left(model.config, heads)
