# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""The k-th largest of very many scores in one reading, and its mask in one more, or in two where many ties are cut.

A sample of every 1021st score says between which two values the k-th lies, twelve deviations wide. One reading counts
the scores above and on the two ends, and those between by their integer keys (`order`): a bracket of a hundredth of
normal scores spans some 100,000 keys, so the counts tell the k-th itself. Where it spans more, a bin holds several keys
and a second reading counts these. A sample that misled is noticed, and the caller searches in another way.

    k-th largest =  high                 if #(> high) < k <= #(>= high)
                    one of those between if #(>= high) < k <= #(> low)
                    low                  if #(> low) < k <= #(>= low)

At 805 million float32 scores a reading is 1.1 ms of an H100's memory and a mask 1.3 ms. Counting between the ends takes
an atomic for a hundredth of the scores, spread over copies of the histogram so that equal ones do not queue. Among so
many a few dozen equal the k-th, and rarely may all stay: writing the mask lists where they are, and those too many are
taken out again, by places.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunus.kernels.order import is_nan, key_of, read_keys, value_of, widen

LISTED = 1 << 16  # most equals whose places are listed: half a megabyte

_STRIDE = 1021  # a prime: matrices have widths that 1024 divides, and every column should be seen
_DEVIATIONS = 6
_BLOCK = 4096
_STEP, _STEPS = 1024, 32  # scores a program counts at once, and how many times: few programs end in few atomics
_BINS = 21  # bits: what a bracket's keys are told apart by in one reading; 16 million normal scores need a million bins
_ROOM = 1 << 22  # counters of all copies of the histogram: 16 MiB
_COPIES = 1024  # most of them: more programs do not run at once
_CHUNK = 1 << 26  # scores that come over from another device at once


class Kth(NamedTuple):
    """The k-th largest score, how many are larger, and how many equal it; or NaN, and how many of the scores are."""

    value: float
    above: int
    equal: int


def sample_of(score: Tensor) -> Tensor:
    """Every 1021st score, float32, one-dimensional."""
    return score.detach().reshape(-1)[::_STRIDE].float()


def kth_of(scores: Iterable[Tensor], sample: Tensor, k: int, total: int) -> Kth | None:
    """The k-th largest (k from 1) of all scores; None if the sample misled.

    scores: float32, bfloat16 or float16 of any shape, `total` entries together; read once, or twice where the sample
        leaves a wide bracket. sample: (samples,) float32, `sample_of` all of them, on the device that does
        the work. Waits for that device.
    """
    low, high = _bracket(sample, k, total)
    while True:
        shift = max(0, (high - low - 1).bit_length() - _BINS)  # keys in a bin: 2^shift
        nans, above, on_high, on_low, between, place, before, here = _counted(
            scores, low, high, shift, k, sample.device
        )
        if nans:
            return Kth(math.nan, nans, 0)
        rest = k - above - on_high  # from high down
        if above < k and rest <= 0:
            return Kth(value_of(high), above, on_high)
        if rest > between:
            return Kth(value_of(low), above + on_high + between, on_low) if rest <= between + on_low else None
        if above >= k:
            return None
        if not shift:
            return Kth(value_of(high - 1 - place), above + on_high + before, here)
        low, high = max(low, high - 1 - ((place + 1) << shift)), high - (place << shift)


def _counted(
    scores: Iterable[Tensor], low: int, high: int, shift: int, k: int, device: torch.device
) -> tuple[int, int, int, int, int, int, int, int]:
    """How many keys are those of NaN, above `high`, on it, on `low`, between; then the bin between that holds the k-th,
    from the top, how many are in those before it, and in it."""
    bins = ((high - low - 2) >> shift) + 1 if high > low + 1 else 1
    copies = min(_COPIES, max(1, _ROOM >> (bins - 1).bit_length()))
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    histogram = torch.zeros(copies, bins, dtype=torch.int32, device=device)
    for score in scores:
        for part in _nearby(score, device):
            programs = triton.cdiv(part.numel(), _STEP * _STEPS)
            if programs:
                with torch.cuda.device_of(part):  # programs start on the current device
                    _histogram[(programs,)](
                        part, counts, histogram, low, high, shift, bins, copies, part.numel(),
                        BLOCK=_STEP, STEPS=_STEPS, num_warps=4,
                    )  # fmt: skip
    each = histogram.sum(0)
    down = each.cumsum(0)
    rest = k - counts[0] - counts[1]
    place = torch.searchsorted(down, rest).clamp_(max=bins - 1)
    here = each.take(place)  # indexing by a tensor would wait for it
    found = torch.stack([down[-1], place, down.take(place) - here, here])
    above, on_high, on_low, nans, *others = torch.cat([counts, found]).tolist()
    return nans, above, on_high, on_low, *others


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


def keep_above(score: Tensor, threshold: float) -> Tensor:
    """Which scores are at least the threshold, a float32 number: bool, score's shape. Does not wait for the device.

    What is above `t` is at least `value_of(key_of(t) + 1)`.
    """
    flat = score.detach().reshape(-1)
    mask = torch.empty(flat.numel(), dtype=torch.bool, device=flat.device)
    blocks = triton.cdiv(flat.numel(), _BLOCK)
    if blocks:
        with torch.cuda.device_of(flat):
            _above[(blocks,)](flat, threshold, mask.view(torch.uint8), flat.numel(), BLOCK=_BLOCK, num_warps=4)
    return mask.view(score.shape)


def keep_of_all(scores: Iterable[Tensor], kth: Kth, kept: int) -> list[Tensor]:
    """The masks of the `kept` largest of all scores, of equals the first, tensor after tensor; bool, in their shapes.

    kth: the kept-th largest of all, `equal` at most LISTED. Waits for the devices if some of the equals must go.
    """
    left = kept - kth.above
    if left == kth.equal:
        return [keep_above(score, kth.value) for score in scores]
    masks: list[Tensor] = []
    starts, lists = [0], dict[torch.device, tuple[Tensor, Tensor]]()
    for score in scores:
        flat = score.detach().reshape(-1)
        if flat.device not in lists:
            empty = torch.empty(kth.equal, dtype=torch.int64, device=flat.device)
            lists[flat.device] = empty, torch.zeros(1, dtype=torch.int32, device=flat.device)
        masks.append(_list_above(flat, kth.value, starts[-1], *lists[flat.device]).view(score.shape))
        starts.append(starts[-1] + flat.numel())
    found = torch.cat([places[: int(taken)].cpu() for places, taken in lists.values()])
    found = found.sort().values[left:]
    for mask, (start, end) in zip(masks, pairwise(starts), strict=True):
        inside = found[(found >= start) & (found < end)] - start
        if len(inside):
            mask.view(-1)[inside.to(mask.device)] = False
    return masks


def _list_above(flat: Tensor, threshold: float, start: int, places: Tensor, taken: Tensor) -> Tensor:
    """The mask as by `keep_above`; `start` + the places of the equals are added to the list, in any order."""
    mask = torch.empty(flat.numel(), dtype=torch.bool, device=flat.device)
    blocks = triton.cdiv(flat.numel(), _BLOCK)
    if blocks:
        with torch.cuda.device_of(flat):
            _above_listed[(blocks,)](
                flat, threshold, mask.view(torch.uint8), places, taken, start, len(places), flat.numel(),
                BLOCK=_BLOCK, num_warps=4,
            )  # fmt: skip
    return mask


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


def _bracket(sample: Tensor, k: int, total: int) -> tuple[int, int]:
    """The keys of two values between which the k-th largest most probably lies."""
    ordered = sample.sort(descending=True).values
    share = k / total
    spread = _DEVIATIONS * math.sqrt(len(ordered) * share * (1 - share)) + 8
    first, last = math.floor(len(ordered) * share - spread), math.ceil(len(ordered) * share + spread)
    infinity = ordered.new_full((), torch.inf)
    high = ordered[first] if first >= 0 else infinity
    low = ordered[last] if last < len(ordered) else -infinity
    ends = torch.stack([low, high]).tolist()
    return key_of(ends[0]), key_of(ends[1])


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


@triton.jit(do_not_specialize=["low", "high", "shift", "bins", "copies"])
def _histogram(
    X, COUNTS, HISTOGRAM, low, high, shift, bins, copies, numel, BLOCK: tl.constexpr, STEPS: tl.constexpr
):  # fmt: skip
    HISTOGRAM += (tl.program_id(0) % copies) * bins
    above = tl.zeros((BLOCK,), tl.int32)
    on_high = tl.zeros((BLOCK,), tl.int32)
    on_low = tl.zeros((BLOCK,), tl.int32)
    nan = tl.zeros((BLOCK,), tl.int32)
    for step in range(STEPS):
        place = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        key = read_keys(X, X, place, place, place < numel, False, False)
        above += (key > high).to(tl.int32)
        on_high += (key == high).to(tl.int32)
        on_low += (key == low).to(tl.int32)
        nan += (is_nan(key) & (place < numel)).to(tl.int32)
        down = (high - 1 - key).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)  # bins from the top
        tl.atomic_add(HISTOGRAM + down, 1, mask=(key > low) & (key < high), sem="relaxed")
    tl.atomic_add(COUNTS, tl.sum(above, 0).to(tl.int64), sem="relaxed")
    highs, lows, nans = tl.sum(on_high, 0), tl.sum(on_low, 0), tl.sum(nan, 0)
    if highs > 0:
        tl.atomic_add(COUNTS + 1, highs.to(tl.int64), sem="relaxed")
    if (lows > 0) & (low < high):
        tl.atomic_add(COUNTS + 2, lows.to(tl.int64), sem="relaxed")
    if nans > 0:
        tl.atomic_add(COUNTS + 3, nans.to(tl.int64), sem="relaxed")


@triton.jit
def _above(X, threshold, M, numel, BLOCK: tl.constexpr):
    x, place = _read(X, numel, BLOCK)
    tl.store(M + place, (x >= threshold).to(tl.uint8), mask=place < numel)


@triton.jit(do_not_specialize=["start", "room"])
def _above_listed(X, threshold, M, PLACES, TAKEN, start, room, numel, BLOCK: tl.constexpr):
    x, place = _read(X, numel, BLOCK)
    tl.store(M + place, (x >= threshold).to(tl.uint8), mask=place < numel)
    equal = (x == threshold).to(tl.int32)
    count = tl.sum(equal, 0)
    if count > 0:
        slot = tl.atomic_add(TAKEN, count, sem="relaxed") + tl.cumsum(equal, 0) - 1
        tl.store(PLACES + slot, place + start, mask=(equal != 0) & (slot < room))


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
