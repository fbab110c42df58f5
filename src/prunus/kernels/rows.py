# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""The k-th largest of every row without a sort: a row stays in registers, and a threshold is searched by counting.

With f(t) = #(key >= t), which falls as t grows, a bracket f(lo) >= k > f(hi) shrinks until f(lo) = k, when no tie has
to be decided, or until hi = lo + 1: then all keys from hi on stay, and of those that equal lo the first ones. The next
t is where a straight line between the ends would put k, moved towards the middle of the bracket by a fifth of the
deviation that m keys in it have: the k-th is then mostly caught between t and the nearer end, and the bracket shrinks
to about the root of m keys. After 12 such steps it is halved. 7,168 normal numbers take 8 steps, halving alone 14.

Scores of 16 bits that no float32 multiplies have keys whose low bits are all alike. They are dropped: else a tie, which
16 bits make likely, would be looked for by halving the empty space between two keys.

A row lies in quarters of a power of two, of which the fourth is left out where three hold it (11,008 columns are 3 x
4,096). Each weight is read once and each entry of the mask written once. At 28672 x 7168 in bf16 that is 0.6 GB, 0.2 ms
of an H100's memory; 2 integer operations a key and step are 0.3 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunus.kernels.order import is_nan, read_keys

_WIDEST = 32768  # columns whose keys fit into the registers of one program
_SHIFT = {torch.bfloat16: 16, torch.float16: 13}  # low bits that say nothing
_KEYS = 64  # keys a thread holds: more spare the work that every thread does in a step, fewer hide waiting


def takes_rows(score: Tensor) -> bool:
    """Whether `keep_of_rows` takes this matrix: its rows fit into registers."""
    return 0 < score.shape[1] <= _WIDEST


def keep_of_rows(
    score: Tensor, kept: int, extra: int = 0, *, absolute: bool = False, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mask (out, in) bool of the `kept` largest of every row, one more in the first `extra`; how many are NaN.

    score: (out, in) float32, bfloat16 or float16, any strides. With `absolute` |score| counts, and with `scale` (in,)
        float32, none of it negative, its product with that. Ties keep the lower column.
    The count is an int32 tensor (1,): where it is not 0 the mask means nothing.
    """
    rows, columns = score.shape
    mask = torch.empty((rows, columns), dtype=torch.bool, device=score.device)
    nans = torch.zeros(1, dtype=torch.int32, device=score.device)
    x = score if score.stride(1) == 1 else score.contiguous()  # rows are read in whole lines
    block = max(128, triton.next_power_of_2(columns))
    warps = min(32, max(1, block // (32 * _KEYS)))
    if not rows:
        return mask, nans
    with torch.cuda.device_of(x):  # programs start on the current device
        _keep[(rows,)](
            x, nans if scale is None else scale.contiguous(), mask.view(torch.uint8), nans, columns, x.stride(0),
            kept, extra, ABSOLUTE=absolute, SCALED=scale is not None, QUARTER=block // 4, FOUR=4 * columns > 3 * block,
            SHIFT=_SHIFT.get(x.dtype, 0) if scale is None else 0, PART=min(block, 512 * warps), num_warps=warps,
        )  # fmt: skip
    return mask, nans


@triton.jit(do_not_specialize=["kept", "extra"])
def _keep(
    X, S, M, NANS, columns, stride, kept, extra,
    ABSOLUTE: tl.constexpr, SCALED: tl.constexpr, QUARTER: tl.constexpr, FOUR: tl.constexpr, SHIFT: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    X += row.to(tl.int64) * stride
    M += row.to(tl.int64) * columns
    a, least_a = _quarter(X, S, 0, columns, ABSOLUTE, SCALED, QUARTER)
    b, least_b = _quarter(X, S, QUARTER, columns, ABSOLUTE, SCALED, QUARTER)
    c, least_c = _quarter(X, S, 2 * QUARTER, columns, ABSOLUTE, SCALED, QUARTER)
    most, least = tl.maximum(a, tl.maximum(b, c)), tl.minimum(least_a, tl.minimum(least_b, least_c))
    if FOUR:
        d, least_d = _quarter(X, S, 3 * QUARTER, columns, ABSOLUTE, SCALED, QUARTER)
        most, least = tl.maximum(most, d), tl.minimum(least, least_d)
        d = d >> SHIFT
    low, high = tl.min(least, 0), tl.max(most, 0)
    if is_nan(low) | is_nan(high):
        for start in range(0, columns, PART):
            place = start + tl.arange(0, PART)
            again = read_keys(X, S, place, place, place < columns, ABSOLUTE, SCALED)
            tl.atomic_add(NANS, tl.sum((is_nan(again) & (place < columns)).to(tl.int32), 0))
    a, b, c = a >> SHIFT, b >> SHIFT, c >> SHIFT
    low = low >> SHIFT
    high = (high >> SHIFT) + 1
    wanted = kept + (row < extra).to(tl.int32)
    from_low = tl.zeros((), tl.int32) + columns  # keys >= low
    from_high = tl.zeros((), tl.int32)  # keys >= high
    step = tl.zeros((), tl.int32)
    while (low + 1 < high) & (from_low != wanted) & (from_high != wanted):
        trial = _between(low, high, from_low, from_high, wanted, step)
        above = (a >= trial).to(tl.int32) + (b >= trial).to(tl.int32) + (c >= trial).to(tl.int32)
        if FOUR:
            above += (d >= trial).to(tl.int32)
        count = tl.sum(above, 0)
        enough = count >= wanted
        low = tl.where(enough, trial, low)
        from_low = tl.where(enough, count, from_low)
        high = tl.where(enough, high, trial)
        from_high = tl.where(enough, from_high, count)
        step += 1
    if (from_low == wanted) | (from_high == wanted):
        threshold = tl.where(from_low == wanted, low, high)
        _write(M, a >= threshold, 0, columns, QUARTER)
        _write(M, b >= threshold, QUARTER, columns, QUARTER)
        _write(M, c >= threshold, 2 * QUARTER, columns, QUARTER)
        if FOUR:
            _write(M, d >= threshold, 3 * QUARTER, columns, QUARTER)
    else:
        left = wanted - from_high  # equals that may stay
        for start in range(0, columns, PART):
            place = start + tl.arange(0, PART)
            inside = place < columns
            again = (
                read_keys(X, S, place, place, inside, ABSOLUTE, SCALED) >> SHIFT
            )  # from the cache: registers are dear
            equal = again == low
            first = tl.cumsum(equal.to(tl.int32), 0) <= left
            tl.store(M + place, ((again >= high) | (equal & first)).to(tl.uint8), mask=inside)
            left -= tl.sum(equal.to(tl.int32), 0)


@triton.jit
def _quarter(X, S, start, columns, ABSOLUTE: tl.constexpr, SCALED: tl.constexpr, QUARTER: tl.constexpr):
    """The keys from a column on, and the same with the most int32 where the row has ended."""
    place = start + tl.arange(0, QUARTER)
    key = read_keys(X, S, place, place, place < columns, ABSOLUTE, SCALED)
    return key, tl.where(place < columns, key, 0x7FFFFFFF)


@triton.jit
def _write(M, keep, start, columns, QUARTER: tl.constexpr):
    """A quarter of the mask."""
    place = start + tl.arange(0, QUARTER)
    tl.store(M + place, keep.to(tl.uint8), mask=place < columns)


@triton.jit
def _between(low, high, from_low, from_high, wanted, step):
    """The next threshold: low < trial < high."""
    root = tl.rsqrt((from_low - from_high).to(tl.float32))
    share = (from_low - wanted).to(tl.float32) * root * root
    share = tl.where(share < 0.5, share + 0.2 * root, share - 0.2 * root)
    width = (high - low).to(tl.uint32, bitcast=True).to(tl.float32)  # modulo 2^32: right for signed scores too
    line = low + tl.minimum(tl.maximum(width * share, 1.0), 2147483520.0).to(tl.int32)
    half = (low & high) + ((low ^ high) >> 1)
    return tl.maximum(low + 1, tl.minimum(tl.where(step < 12, line, half), high - 1))
