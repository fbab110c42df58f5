# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false, reportAttributeAccessIssue=false
"""Frank-Wolfe moves of many tensors at once, each in a set of its own whose vertices have K entries.

    x <- x + s (v - x),   v = -r m_S / ||m_S||  (K-support; K = n: the L2 ball)   or   -r sign(m_S)  (K-sparse),
    S: the K largest |m|, the first of equal ones

Seven launches for however many tensors of whatever sizes, which are read where they lie (a table has their addresses):
four readings find the K-th key as in `long_rows`; a fifth adds up the squares above it and counts its equals; then
what a tensor needs, one program each, and the move. Momentum is read six times, parameters once, and nothing else but
them is written at full size. Nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunus.kernels.long_rows import add_counts, count_byte, find_key

_BLOCK = 4096  # entries read at once
_STEPS = 4  # of them that a program reads
_READINGS = 4
_TINY = 1.1754943508222875e-38  # of float32: 1 / tiny is finite


@dataclass(frozen=True)
class Moves:
    """Where the tensors lie and how programs divide them.

    table: (5, tensors) int64: addresses of parameters and momentum, entries, K, whether a vertex has but one size;
    first: (tensors + 1,) int32, the first program of each tensor; owner: (programs,) int32, whose tensor it is.
    """

    table: Tensor
    first: Tensor
    owner: Tensor
    aligned: bool


def plan_moves(
    parameters: Sequence[Tensor], moments: Sequence[Tensor], kept: Sequence[int], signs: Sequence[bool]
) -> Moves:
    """The plan of moves along these moments, float32, laid out as the parameters and without gaps; 1 <= kept <= n.

    Good as long as the tensors stay where they are. Waits for the device.
    """
    sizes = [parameter.numel() for parameter in parameters]
    programs = [triton.cdiv(size, _BLOCK * _STEPS) for size in sizes]
    first = [0]
    for each in programs:
        first.append(first[-1] + each)
    places = [[each.data_ptr() for each in tensors] for tensors in (parameters, moments)]
    device = parameters[0].device
    return Moves(
        torch.tensor([*places, sizes, list(kept), [int(each) for each in signs]], dtype=torch.int64, device=device),
        torch.tensor(first, dtype=torch.int32, device=device),
        torch.tensor([i for i, each in enumerate(programs) for _ in range(each)], dtype=torch.int32, device=device),
        all(address % 16 == 0 for each in places for address in each),
    )


def move_(moves: Moves, radius: Tensor, half: Tensor | None, rate: Tensor, *, by_length: bool = False) -> Tensor:
    """Move the parameters towards the vertices of their sets, in place; returns s, (tensors,) float32. See the module.

    radius: (tensors,) float32 r; rate: a scalar. s = clamp(rate * factor, 0, 1): the factor is 1 without `half`
    (tensors,) float32, else 0.5 / half, or ||m|| / half if it goes `by_length`.
    """
    table, device = moves.table, moves.table.device
    tensors, programs = table.shape[1], moves.owner.shape[0]
    counts = torch.zeros(_READINGS, tensors, 256, dtype=torch.int32, device=device)
    sums = torch.empty(2, programs, dtype=torch.float64, device=device)  # of all squares, of those above the K-th
    equal = torch.empty(2, programs, dtype=torch.int32, device=device)  # the K-th's equals: there, and before
    scale = torch.empty(3, tensors, dtype=torch.float32, device=device)  # s, 1 / ||m_S||, -r
    each = (table, moves.first, moves.owner, counts, tensors, programs)
    flags = {"ALIGNED": moves.aligned, "BLOCK": _BLOCK, "STEPS": _STEPS, "num_warps": 8}
    with torch.cuda.device_of(table):  # programs start on the current device
        for reading in range(_READINGS):
            _read[(programs,)](*each, sums, READING=reading, **flags)
        _measure[(programs,)](*each, sums, equal, **flags)
        factor = 0 if half is None else 2 if by_length else 1
        _weigh[(tensors,)](
            *each, sums, equal, scale, radius, radius if half is None else half, rate, TINY=_TINY, FACTOR=factor
        )
        _move[(programs,)](*each, equal, scale, **flags)
    return scale[0]


@triton.jit
def _row(TABLE, row: tl.constexpr, tensor, tensors):
    return tl.load(TABLE + row * tensors + tensor)


@triton.jit
def _place(TABLE, row: tl.constexpr, tensor, tensors, place, ALIGNED: tl.constexpr):
    """The addresses of entries."""
    start = _row(TABLE, row, tensor, tensors).to(tl.pointer_type(tl.float32))
    addresses = start + place
    if ALIGNED:
        addresses = tl.multiple_of(addresses, 16)
    return addresses


@triton.jit
def _load(TABLE, row: tl.constexpr, tensor, tensors, place, n, ALIGNED: tl.constexpr):
    """Entries: four at once, whose last may lie beyond n but in the same 16 bytes, or one by one; 0 beyond n."""
    addresses = _place(TABLE, row, tensor, tensors, place, ALIGNED)
    if ALIGNED:
        x = tl.load(addresses, mask=place < (n + 3) // 4 * 4, other=0.0)
        return tl.where(place < n, x, 0.0)
    else:
        return tl.load(addresses, mask=place < n, other=0.0)


@triton.jit
def _keys(m):
    """Unsigned keys in the order of |m|: its bits."""
    return m.to(tl.uint32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _mine(TABLE, FIRST, OWNER, tensors):
    """Whose program this is, which of its programs, how many entries it has, and K."""
    tensor = tl.load(OWNER + tl.program_id(0))
    part = tl.program_id(0) - tl.load(FIRST + tensor)
    return tensor, part, _row(TABLE, 2, tensor, tensors).to(tl.int32), _row(TABLE, 3, tensor, tensors).to(tl.int32)


@triton.jit(do_not_specialize=["tensors", "programs"])
def _read(
    TABLE, FIRST, OWNER, COUNTS, tensors, programs, SUMS,
    READING: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    tensor, part, n, kept = _mine(TABLE, FIRST, OWNER, tensors)
    prefix, _left, _there = find_key(COUNTS, tensor, tensors, kept, READING)
    total = tl.zeros((256,), tl.int32)
    other = tl.zeros((), tl.int32)  # keys that were counted as byte 0 and do not belong
    squares = tl.zeros((), tl.float64)
    for step in range(STEPS):
        place = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        belongs = place < n
        m = _load(TABLE, 1, tensor, tensors, place, n, ALIGNED)
        key = _keys(m)
        if READING == 0:
            exact = m.to(tl.float64)
            squares += tl.sum(exact * exact, 0)
        if READING > 0:
            belongs = belongs & ((key >> (32 - 8 * READING)) == prefix)
        total, other = count_byte(key, belongs, total, other, READING, BLOCK)
    add_counts(COUNTS + (READING * tensors + tensor) * 256, total, other)
    if READING == 0:
        tl.store(SUMS + tl.program_id(0), squares)


@triton.jit(do_not_specialize=["tensors", "programs"])
def _measure(
    TABLE, FIRST, OWNER, COUNTS, tensors, programs, SUMS, EQUAL,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    tensor, part, n, kept = _mine(TABLE, FIRST, OWNER, tensors)
    kth, _left, _there = find_key(COUNTS, tensor, tensors, kept, 4)
    squares = tl.zeros((), tl.float64)
    count = tl.zeros((), tl.int32)
    for step in range(STEPS):
        place = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        live = place < n
        m = _load(TABLE, 1, tensor, tensors, place, n, ALIGNED)
        key = _keys(m)
        exact = tl.where(key > kth, m, 0.0).to(tl.float64)
        squares += tl.sum(exact * exact, 0)
        count += tl.sum(((key == kth) & live).to(tl.int32), 0)
    tl.store(SUMS + programs + tl.program_id(0), squares)
    tl.store(EQUAL + tl.program_id(0), count)


@triton.jit(do_not_specialize=["tensors", "programs"])
def _weigh(
    TABLE, FIRST, OWNER, COUNTS, tensors, programs, SUMS, EQUAL, SCALE, RADIUS, HALF, RATE,
    TINY: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """How far each tensor moves, what makes a vertex of its momentum, and the equals before each program's."""
    tensor = tl.program_id(0)
    kept = _row(TABLE, 3, tensor, tensors).to(tl.int32)
    kth, left, _there = find_key(COUNTS, tensor, tensors, kept, 4)
    start, end = tl.load(FIRST + tensor), tl.load(FIRST + tensor + 1)
    all_squares = tl.zeros((), tl.float64)
    squares = tl.zeros((), tl.float64)
    before = tl.zeros((), tl.int32)
    for begin in range(start, end, 128):
        part = begin + tl.arange(0, 128)
        live = part < end
        all_squares += tl.sum(tl.load(SUMS + part, mask=live, other=0.0), 0)
        squares += tl.sum(tl.load(SUMS + programs + part, mask=live, other=0.0), 0)
        equal = tl.load(EQUAL + part, mask=live, other=0)
        tl.store(EQUAL + programs + part, before + tl.cumsum(equal, 0) - equal, mask=live)
        before += tl.sum(equal, 0)
    value = kth.to(tl.float32, bitcast=True).to(tl.float64)
    length = tl.sqrt(squares + left.to(tl.float64) * value * value).to(tl.float32)
    length = tl.where(
        _row(TABLE, 4, tensor, tensors) != 0, 1.0, tl.where(length < TINY, TINY, length)
    )  # a NaN stays one
    share = tl.load(RATE).to(tl.float32)
    if FACTOR == 1:
        share = share * (0.5 / tl.load(HALF + tensor))
    if FACTOR == 2:
        share = share * (tl.sqrt(all_squares).to(tl.float32) / tl.load(HALF + tensor))
    share = tl.where(share < 0, 0.0, tl.where(share > 1, 1.0, share))
    tl.store(SCALE + tensor, share)
    tl.store(SCALE + tensors + tensor, 1 / length)
    tl.store(SCALE + 2 * tensors + tensor, -tl.load(RADIUS + tensor))


@triton.jit(do_not_specialize=["tensors", "programs"])
def _move(
    TABLE, FIRST, OWNER, COUNTS, tensors, programs, EQUAL, SCALE,
    ALIGNED: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    tensor, part, n, kept = _mine(TABLE, FIRST, OWNER, tensors)
    kth, left, there = find_key(COUNTS, tensor, tensors, kept, 4)
    share, scale = tl.load(SCALE + tensor), tl.load(SCALE + tensors + tensor)
    minus = tl.load(SCALE + 2 * tensors + tensor)
    signs = _row(TABLE, 4, tensor, tensors)
    before = tl.load(EQUAL + programs + tl.program_id(0))
    for step in range(STEPS):
        place = (part * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        live = place < n
        m = _load(TABLE, 1, tensor, tensors, place, n, ALIGNED)
        key = _keys(m)
        stays = key >= kth
        if left < there:  # not all of the equals stay
            equal = ((key == kth) & live).to(tl.int32)
            stays = (key > kth) | ((equal > 0) & (before + tl.cumsum(equal, 0) <= left))
            before += tl.sum(equal, 0)
        if signs != 0:
            m = tl.where(m > 0, 1.0, tl.where(m < 0, -1.0, m))
        v = tl.where(stays, m * scale * minus, 0.0)  # in this order: m = 0 where 1 / length is huge
        x = _load(TABLE, 0, tensor, tensors, place, n, ALIGNED)
        moved = tl.where(share < 0.5, x + share * (v - x), v - (v - x) * (1 - share))  # exact at both ends
        tl.store(_place(TABLE, 0, tensor, tensors, place, ALIGNED), moved, mask=live)
