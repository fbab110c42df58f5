# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""The k largest of every row, where rows are few and long (a layer's gradient is one of millions), without a sort.

A radix search: four readings count the four bytes of the scores' integer keys, each among the keys that agree with the
k-th in the bytes before. Every program of a reading finds those bytes again from the counts of the earlier readings,
so that nothing but the counts goes from one launch to the next and nothing waits for the host.

    u = key + 2^31;   byte_0 = the largest b with #(u >> 24 >= b) >= k,   k <- k - #(u >> 24 > b),   and so on

After four bytes the k-th key is known, and how many of its equals may stay; only if not all may, two more launches
count equals by block to take the first. 2.4 million scores are 9.4 MB: a reading takes 4 us, as a launch does.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunus.kernels.order import read_keys, widen

_BLOCK = 4096  # scores read at once
_STEPS = 4  # of them that a program reads: fewer programs add up counts
_READINGS = 4


def largest_of_long_rows(score: Tensor, kept: int, *, absolute: bool = False) -> tuple[Tensor, Tensor]:
    """The scores (problems, n) where they are among the `kept` largest of their row, 0 elsewhere; and the squares
    of what stays in each row added up, (problems,) float64.

    score: float32, float16 or bfloat16, no NaN; 1 <= kept <= n. With `absolute` |score| is compared. Of equal ones the
    first stay. Does not wait for the device, and leaves the same bits every time.
    """
    x = score if score.stride(1) == 1 else score.contiguous()
    problems, n = x.shape
    out = torch.empty((problems, n), dtype=x.dtype, device=x.device)
    counts = torch.zeros(_READINGS, problems, 256, dtype=torch.int32, device=x.device)
    programs = triton.cdiv(n, _BLOCK * _STEPS)
    blocks = triton.cdiv(n, _BLOCK)
    equal = torch.empty(problems, blocks, dtype=torch.int32, device=x.device)
    squares = torch.empty(problems, blocks, dtype=torch.float64, device=x.device)
    flags = {"ABSOLUTE": absolute, "BLOCK": _BLOCK}
    with torch.cuda.device_of(x):  # programs start on the current device
        for reading in range(_READINGS):
            _read[(programs, problems)](
                x, counts, n, x.stride(0), problems, kept, READING=reading, STEPS=_STEPS, **flags, num_warps=8
            )
        _equals[(blocks, problems)](x, counts, equal, n, x.stride(0), problems, kept, blocks, **flags, num_warps=4)
        before = equal.cumsum(1, dtype=torch.int32) - equal
        _write[(blocks, problems)](
            x, out, squares, counts, before, n, x.stride(0), problems, kept, blocks, **flags, num_warps=4
        )
    return out, squares.sum(1)


@triton.jit
def find_key(COUNTS, problem, problems, kept, READINGS: tl.constexpr):
    """The leading bytes of the k-th key, how many keys with these may stay, and how many there are."""
    prefix = tl.zeros((), tl.uint32)
    left = tl.zeros((), tl.int32) + kept
    there = tl.zeros((), tl.int32)
    for reading in tl.static_range(READINGS):
        byte = tl.arange(0, 256)
        count = tl.load(COUNTS + (reading * problems + problem) * 256 + byte)
        from_here = tl.sum(count, 0) - tl.cumsum(count, 0) + count  # keys whose byte is this or larger
        chosen = tl.max(tl.where(from_here >= left, byte, 0), 0)
        at = byte == chosen
        there = tl.sum(tl.where(at, count, 0), 0)
        left -= tl.sum(tl.where(at, from_here - count, 0), 0)
        prefix = (prefix << 8) | chosen.to(tl.uint32)
    return prefix, left, there


@triton.jit
def _keys(X, place, n, ABSOLUTE: tl.constexpr):
    """Unsigned keys in the scores' order."""
    key = read_keys(X, X, place, place, place < n, ABSOLUTE, False)
    return key.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def count_byte(key, belongs, total, other, READING: tl.constexpr, BLOCK: tl.constexpr):
    """`total` (256,) with the counts of the reading's byte of these keys, and `other`: how many zeros do not belong."""
    byte = ((key >> (24 - 8 * READING)) & 0xFF).to(tl.int32)
    total += tl.histogram(tl.where(belongs, byte, 0), 256)
    other += BLOCK - tl.sum(belongs.to(tl.int32), 0)
    return total, other


@triton.jit
def add_counts(COUNTS, total, other):
    """Add what a program counted by `count_byte` to the 256 counts of its row and reading."""
    each = tl.arange(0, 256)
    total -= tl.where(each == 0, other, 0)
    tl.atomic_add(COUNTS + each, total, mask=total > 0)


@triton.jit(do_not_specialize=["kept", "problems"])
def _read(
    X, COUNTS, n, stride, problems, kept,
    READING: tl.constexpr, STEPS: tl.constexpr, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(1)
    prefix, _left, _there = find_key(COUNTS, problem, problems, kept, READING)
    X += problem.to(tl.int64) * stride
    total = tl.zeros((256,), tl.int32)
    other = tl.zeros((), tl.int32)  # keys that were counted as byte 0 and do not belong
    for step in range(STEPS):
        place = (tl.program_id(0) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        key = _keys(X, place, n, ABSOLUTE)
        belongs = place < n
        if READING > 0:
            belongs = belongs & ((key >> (32 - 8 * READING)) == prefix)
        total, other = count_byte(key, belongs, total, other, READING, BLOCK)
    add_counts(COUNTS + (READING * problems + problem) * 256, total, other)


@triton.jit(do_not_specialize=["kept", "problems", "blocks"])
def _equals(X, COUNTS, EQUAL, n, stride, problems, kept, blocks, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr):
    """How many keys of each block equal the k-th; unless all of them stay, when nobody asks."""
    problem = tl.program_id(1)
    kth, left, there = find_key(COUNTS, problem, problems, kept, 4)
    count = tl.zeros((), tl.int32)
    if left < there:
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        key = _keys(X + problem.to(tl.int64) * stride, place, n, ABSOLUTE)
        count = tl.sum(((key == kth) & (place < n)).to(tl.int32), 0)
    tl.store(EQUAL + problem * blocks + tl.program_id(0), count)


@triton.jit(do_not_specialize=["kept", "problems", "blocks"])
def _write(
    X, OUT, SQUARES, COUNTS, BEFORE, n, stride, problems, kept, blocks, ABSOLUTE: tl.constexpr, BLOCK: tl.constexpr
):
    problem = tl.program_id(1)
    kth, left, there = find_key(COUNTS, problem, problems, kept, 4)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    X += problem.to(tl.int64) * stride
    live = place < n
    key = _keys(X, place, n, ABSOLUTE)
    stays = key >= kth
    if left < there:
        equal = key == kth
        first = tl.cumsum(equal.to(tl.int32), 0) + tl.load(BEFORE + problem * blocks + tl.program_id(0)) <= left
        stays = (key > kth) | (equal & first)
    x = tl.where(stays, tl.load(X + place, mask=live, other=0.0), 0.0)
    tl.store(OUT + problem.to(tl.int64) * n + place, x, mask=live)
    exact = widen(x).to(tl.float64)  # whose squares neither overflow nor vanish
    tl.store(SQUARES + problem * blocks + tl.program_id(0), tl.sum(exact * exact, 0))
