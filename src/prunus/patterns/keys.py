"""The k-th largest of many scores by their integer keys, in plain operations: bit by bit, or by two histograms.

A float's bits, read as an integer, are in the floats' order once those of negative ones, but for the sign, are turned
round. Bits are fixed from the top by counting; or the upper and then the lower 16 are counted all at once, which needs
one reading each of scores that come tensor by tensor. What chooses between these and other ways is in `selection`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

__all__ = ["CHUNK", "check_rank", "flat_chunks", "high_histogram", "kth_by_bits", "refine"]

CHUNK = 1 << 22  # entries worked on at once: bounds the temporaries (12 bytes an entry) to about 50 MB


def kth_by_bits(flat: Tensor, k: int) -> Tensor:
    """The k-th largest by fixing one bit of its integer key after the other, from the top.

    On CUDA kthvalue gives one long row to a single block; this reads the keys 32 times with the whole device.
    """
    keys, bits = _keys(flat)
    found = torch.full((), -(1 << (bits - 1)), dtype=keys.dtype, device=keys.device)
    for bit in reversed(range(bits)):
        flip = 1 << bit if bit < bits - 1 else -(1 << (bits - 1))
        trial = found ^ flip
        found = torch.where((keys >= trial).sum() >= k, trial, found)
    return _unkey(found)


def high_histogram(score: Tensor) -> Tensor:
    """Counts of the upper 16 key bits of a tensor, (65536,) int64 on the CPU."""
    histogram = torch.zeros(65536, dtype=torch.int64)
    for part in flat_chunks(score):
        high = (_keys(part)[0] >> 16) + 32768
        histogram += torch.bincount(high, minlength=65536).cpu()
    return histogram


def refine(scores: Mapping[str, Tensor], k: int, histogram: Tensor) -> float:
    """The k-th largest of all, where the `high_histogram` of all is known."""
    check_rank(k, int(histogram.sum()))
    high, above = _bin_of(histogram, k)
    low = torch.zeros(65536, dtype=torch.int64)
    for score in scores.values():
        for part in flat_chunks(score):
            keys = _keys(part)[0]
            inside = keys[(keys >> 16) + 32768 == high] & 0xFFFF
            low += torch.bincount(inside, minlength=65536).cpu()
    key = ((high - 32768) << 16) | _bin_of(low, k - above)[0]
    return float(_unkey(torch.tensor(key, dtype=torch.int32)))


def check_rank(k: int, total: int) -> None:
    """Raise ValueError unless k is in 1..total."""
    if not 1 <= operator.index(k) <= total:
        raise ValueError(f"there is no {k}-th largest of {total} entries")


def _keys(flat: Tensor) -> tuple[Tensor, int]:
    """Integers in the order of the floats, and their width in bits. -0 gets a key below +0: compare by value after."""
    if flat.dtype == torch.float64:
        raw = flat.view(torch.int64)
        return raw ^ ((raw >> 63) & 0x7FFFFFFFFFFFFFFF), 64
    raw = flat.float().view(torch.int32)
    return raw ^ ((raw >> 31) & 0x7FFFFFFF), 32


def _unkey(key: Tensor) -> Tensor:
    if key.dtype == torch.int64:
        return (key ^ ((key >> 63) & 0x7FFFFFFFFFFFFFFF)).view(torch.float64)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).view(torch.float32)


def _bin_of(histogram: Tensor, k: int) -> tuple[int, int]:
    """The bin that holds the k-th largest, and how many entries lie in higher bins."""
    from_top = histogram.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, torch.tensor(k)))
    above = int(from_top[place - 1]) if place else 0
    return len(histogram) - 1 - place, above


def flat_chunks(score: Tensor) -> Iterator[Tensor]:
    """Its entries in float32, some at a time."""
    for part in score.detach().reshape(-1).split(CHUNK):
        yield part.float()  # a threshold of another dtype must not be rounded to a tensor's own
