# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""The k-th largest of very many scores in two readings, and the mask of a threshold with its ties in two more.

A sample of every 1021st score says between which two values the k-th lies, six deviations wide. One reading counts the
scores above and on the two ends and collects those between them, one or two in a hundred; the k-th is among these, by
an ordinary sort. The counts prove it: a sample that misled is noticed, and the caller searches in another way.

    k-th largest =  high                 if #(> high) < k <= #(>= high)
                    one of those between if #(>= high) < k <= #(> low)
                    low                  if #(> low) < k <= #(>= low)

Nothing of the scores' size is allocated but the mask: the sample is a thousandth, what is collected mostly less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunus.kernels.order import widen

__all__ = ["count_of", "keep_first", "kth_of", "sample_of"]

_STRIDE = 1021  # a prime: matrices have widths that 1024 divides, and every column should be seen
_DEVIATIONS = 6
_BLOCK = 4096
_CHUNK = 1 << 26  # scores that come over from another device at once


def sample_of(score: Tensor) -> Tensor:
    """Every 1021st score, float32, one-dimensional."""
    return score.detach().reshape(-1)[::_STRIDE].float()


def kth_of(scores: Iterable[Tensor], sample: Tensor, k: int, total: int) -> Tensor | None:
    """The k-th largest (k from 1) of all scores, () float32; None if the sample misled.

    scores: float32, bfloat16 or float16 of any shape, without NaN, `total` entries together, each read once.
    sample: (samples,) float32, `sample_of` all of them, on the device that does the work. Waits for that device.
    """
    low, high, between = _bracket(sample, k, total)
    ends = torch.stack([low, high])
    counts = torch.zeros(4, dtype=torch.int64, device=sample.device)  # above high, on high, on low, between
    found = torch.empty(min(total, 2 * between + _BLOCK), device=sample.device)
    for score in scores:
        for part in _nearby(score, sample.device):
            blocks = triton.cdiv(part.numel(), _BLOCK)
            outside = torch.empty(3, blocks, dtype=torch.int32, device=sample.device)
            if blocks:
                with torch.cuda.device_of(part):  # programs start on the current device
                    _collect[(blocks,)](
                        part, ends, outside, counts[3:], found, part.numel(), blocks, found.numel(),
                        BLOCK=_BLOCK, num_warps=4,
                    )  # fmt: skip
            counts[:3] += outside.sum(1)
    above, on_high, on_low, inside = counts.tolist()
    if above < k <= above + on_high:
        return high
    if above + on_high < k <= above + on_high + inside and inside <= found.numel():
        return found[:inside].sort(descending=True).values[k - above - on_high - 1]
    if above + on_high + inside < k <= above + on_high + inside + on_low:
        return low
    return None


def count_of(score: Tensor, threshold: Tensor) -> Tensor:
    """How many scores are above the threshold and how many equal it, (2, blocks) int32, by blocks of 4096.

    score: any shape. threshold: () or (1,) float32 on its device. Does not wait for the device.
    """
    flat = score.detach().reshape(-1)
    blocks = triton.cdiv(flat.numel(), _BLOCK)
    counts = torch.empty(2, blocks, dtype=torch.int32, device=flat.device)
    if blocks:
        with torch.cuda.device_of(flat):
            _count[(blocks,)](flat, threshold, counts, flat.numel(), blocks, BLOCK=_BLOCK, num_warps=4)
    return counts


def keep_first(score: Tensor, threshold: Tensor, kept: int) -> Tensor:
    """The mask, bool, score's shape: what is above the threshold, and of its equals the first, `kept` in all.

    threshold: () or (1,) float32, the kept-th largest. Does not wait for the device.
    """
    flat = score.detach().reshape(-1)
    mask = torch.empty(flat.numel(), dtype=torch.bool, device=flat.device)
    counts = count_of(flat, threshold)
    above, equal = counts[0], counts[1]
    left = kept - above.sum() - (equal.cumsum(0) - equal)  # equals that may stay from this block on
    if len(left):
        with torch.cuda.device_of(flat):
            _keep[(len(left),)](
                flat, threshold, left, equal, mask.view(torch.uint8), flat.numel(), BLOCK=_BLOCK, num_warps=4
            )
    return mask.view(score.shape)


def _bracket(sample: Tensor, k: int, total: int) -> tuple[Tensor, Tensor, int]:
    """Two values between which the k-th largest most probably lies, () each, and how many scores to expect there."""
    ordered = sample.sort(descending=True).values
    share = k / total
    spread = _DEVIATIONS * math.sqrt(len(ordered) * share * (1 - share)) + 8
    first, last = math.floor(len(ordered) * share - spread), math.ceil(len(ordered) * share + spread)
    infinity = ordered.new_full((), torch.inf)
    high = ordered[first] if first >= 0 else infinity
    low = ordered[last] if last < len(ordered) else -infinity
    return low, high, math.ceil(2 * spread) * _STRIDE


def _nearby(score: Tensor, device: torch.device) -> Iterable[Tensor]:
    """The scores, one-dimensional, on the device, in parts where they have to be brought there."""
    flat = score.detach().reshape(-1)
    return [flat] if flat.device == device else (part.to(device) for part in flat.split(_CHUNK))


@triton.jit
def _read(X, numel, BLOCK: tl.constexpr):
    """The float32 scores of this program's block, NaN (which equals nothing) past the end; their places."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = widen(tl.load(X + place, mask=place < numel, other=0.0))
    return tl.where(place < numel, x, float("nan")), place


@triton.jit
def _collect(X, ENDS, OUTSIDE, TAKEN, FOUND, numel, blocks, room, BLOCK: tl.constexpr):
    x, _place = _read(X, numel, BLOCK)
    low, high = tl.load(ENDS), tl.load(ENDS + 1)
    OUTSIDE += tl.program_id(0)
    tl.store(OUTSIDE, tl.sum((x > high).to(tl.int32), 0))
    tl.store(OUTSIDE + blocks, tl.sum((x == high).to(tl.int32), 0))
    tl.store(OUTSIDE + 2 * blocks, tl.sum((x == low).to(tl.int32), 0))
    inside = (x > low) & (x < high)
    count = tl.sum(inside.to(tl.int32), 0)
    if count > 0:
        first = tl.atomic_add(TAKEN, count.to(tl.int64))  # in whatever order: they are sorted later
        target = tl.cumsum(inside.to(tl.int32), 0) - 1
        tl.store(FOUND + first + target, x, mask=inside & (target < tl.minimum(room - first, BLOCK).to(tl.int32)))


@triton.jit
def _count(X, T, COUNTS, numel, blocks, BLOCK: tl.constexpr):
    x, _place = _read(X, numel, BLOCK)
    threshold = tl.load(T)
    tl.store(COUNTS + tl.program_id(0), tl.sum((x > threshold).to(tl.int32), 0))
    tl.store(COUNTS + blocks + tl.program_id(0), tl.sum((x == threshold).to(tl.int32), 0))


@triton.jit
def _keep(X, T, LEFT, EQUAL, M, numel, BLOCK: tl.constexpr):
    x, place = _read(X, numel, BLOCK)
    threshold = tl.load(T)
    left = tl.load(LEFT + tl.program_id(0))
    if left >= tl.load(EQUAL + tl.program_id(0)):
        tl.store(M + place, (x >= threshold).to(tl.uint8), mask=place < numel)
    else:
        equal = x == threshold
        first = tl.cumsum(equal.to(tl.int32), 0) <= left
        tl.store(M + place, ((x > threshold) | (equal & first)).to(tl.uint8), mask=place < numel)
