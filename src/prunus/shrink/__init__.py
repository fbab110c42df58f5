"""Networks that are really smaller: filters and neurons that go, layers as two thinner ones."""

from prunus.shrink.filters import (
    Channels,
    choose_filters,
    filter_norms,
    find_channels,
    mask_filters,
    remove_filters,
    resized,
)
from prunus.shrink.lowrank import decompose, ranks_by_budget, ranks_by_share

__all__ = [
    "Channels",
    "choose_filters",
    "decompose",
    "filter_norms",
    "find_channels",
    "mask_filters",
    "ranks_by_budget",
    "ranks_by_share",
    "remove_filters",
    "resized",
]
