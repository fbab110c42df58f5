# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""N:M selection in one reading: of every m consecutive entries of a row the n largest.

An entry stays if fewer than n of its group are ahead of it, where a larger one is ahead, and an equal one to its left.
Groups of four in rows whose entries are neighbours in memory have a program of their own: a thread holds whole groups,
six comparisons order one, and its four bytes of the mask are written as one word. In wider groups of a power of two
the n largest are found by sorting networks in registers, some 60 instructions an entry for 16:32 (0.4 ms of an H100 at
the size below), and the smallest of them is the threshold. Other groups read each opponent from the cache, m readings
an entry.

At 28672 x 7168 in bf16 a mask moves 0.6 GB: 0.2 ms of an H100's memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from prunus.kernels.order import read_scores

_TILE = 1024  # entries of one program
_WIDEST = 64  # columns of a group that is sorted: a network of more would be long, and is compiled


def keep_of_groups(
    score: Tensor, n: int, m: int, *, absolute: bool = False, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mask (out, in) bool of the n largest of every m consecutive entries of a row; how many entries are NaN.

    score: (out, in) float32, bfloat16 or float16, any strides, `in` a multiple of m. With `absolute` |score| counts,
        and with `scale` (in,) float32 its product with that. Ties keep the lower column.
    The count is an int32 tensor (1,): where it is not 0 the mask means nothing.
    """
    rows, columns = score.shape
    mask = torch.empty((rows, columns), dtype=torch.bool, device=score.device)
    nans = torch.zeros(1, dtype=torch.int32, device=score.device)
    x = score.detach()
    factors = nans if scale is None else scale.contiguous()
    flags = {"N": n, "ABSOLUTE": absolute, "SCALED": scale is not None}
    if not mask.numel():
        return mask, nans
    with torch.cuda.device_of(x):  # programs start on the current device
        if m == 4 and x.stride(1) == 1:
            block = min(2 * _TILE, triton.next_power_of_2(columns))
            parts = triton.cdiv(columns, block)
            words = mask.view(torch.int32)  # (out, in / 4)
            _keep_of_four[(rows * parts,)](
                x, factors, words, nans, columns, x.stride(0), parts,
                **flags, BLOCK=block, num_warps=max(1, block // 512),
            )  # fmt: skip
        elif 4 < m <= _WIDEST and m & (m - 1) == 0 and x.stride(1) == 1:
            groups, count = mask.numel() // m, _TILE // m
            _keep_of_wide[(triton.cdiv(groups, count),)](
                x, factors, mask.view(torch.uint8), nans, groups, columns // m, x.stride(0),
                **flags, M_=m, GROUPS=count, num_warps=1,
            )  # fmt: skip
        else:
            high, wide = _tile(x)
            parts = triton.cdiv(columns, wide)
            _keep_of_any[(triton.cdiv(rows, high) * parts,)](
                x, factors, mask.view(torch.uint8), nans, rows, columns, x.stride(0), x.stride(1), parts,
                **flags, M_=m, HIGH=high, WIDE=wide, num_warps=4,
            )  # fmt: skip
    return mask, nans


def _tile(x: Tensor) -> tuple[int, int]:
    """Rows and columns of a program's tile, long where entries are neighbours in memory."""
    rows, columns = x.shape
    if x.stride(0) == 1 and x.stride(1) != 1:
        high = min(_TILE // 4, triton.next_power_of_2(rows))
        return high, _TILE // high
    wide = min(_TILE, triton.next_power_of_2(columns))
    return _TILE // wide, wide


@triton.jit
def _keep_of_four(
    X, S, WORDS, NANS, columns, stride, parts,
    N: tl.constexpr, ABSOLUTE: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // parts).to(tl.int64)
    start = (tl.program_id(0) % parts) * BLOCK
    column = start + tl.arange(0, BLOCK)
    x = read_scores(X + row * stride, S, column, column, column < columns, ABSOLUTE, SCALED)
    even, odd = tl.split(tl.reshape(x, (BLOCK // 4, 2, 2)))  # entries 0, 2 and 1, 3 of each group
    a, c = tl.split(even)
    b, d = tl.split(odd)
    total = a + b + c + d  # NaN if one of them is, or if inf meets -inf
    if tl.sum((total != total).to(tl.int32), 0) > 0:
        nan = tl.sum((x != x).to(tl.int32), 0)
        if nan > 0:
            tl.atomic_add(NANS, nan)
    ab, ac, ad = (b > a).to(tl.int32), (c > a).to(tl.int32), (d > a).to(tl.int32)  # whether the second is ahead
    bc, bd, cd = (c > b).to(tl.int32), (d > b).to(tl.int32), (d > c).to(tl.int32)
    word = (ab + ac + ad < N).to(tl.int32)
    word |= (1 - ab + bc + bd < N).to(tl.int32) << 8
    word |= (2 - ac - bc + cd < N).to(tl.int32) << 16
    word |= (3 - ad - bd - cd < N).to(tl.int32) << 24
    group = start // 4 + tl.arange(0, BLOCK // 4)
    tl.store(WORDS + row * (columns // 4) + group, word, mask=group < columns // 4)


@triton.jit
def _keep_of_wide(
    X, S, M, NANS, groups, across, stride,
    N: tl.constexpr, ABSOLUTE: tl.constexpr, SCALED: tl.constexpr, M_: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    live = (group < groups)[:, None]
    place = tl.arange(0, M_)[None, :]
    column = ((group % across) * M_)[:, None] + place
    x = read_scores(X + (group // across)[:, None] * stride, S, column, column, live, ABSOLUTE, SCALED)  # (groups, m)
    nan = tl.sum(tl.sum((x != x).to(tl.int32), 1), 0)
    if nan > 0:
        tl.atomic_add(NANS, nan)
    if N & (N - 1) == 0:
        least = tl.min(tl.topk(x, N), 1)
    else:
        least = tl.sum(tl.where(place == N - 1, tl.sort(x, descending=True), 0.0), 1)
    above = (x > least[:, None]).to(tl.int32)
    equal = (x == least[:, None]).to(tl.int32)
    left = N - tl.sum(above, 1)  # equals that may stay
    keep = above | (equal & (tl.cumsum(equal, 1) <= left[:, None]).to(tl.int32))
    tl.store(M + group[:, None] * M_ + place, keep.to(tl.uint8), mask=live)


@triton.jit
def _keep_of_any(
    X, S, M, NANS, rows, columns, row_stride, column_stride, parts,
    N: tl.constexpr, ABSOLUTE: tl.constexpr, SCALED: tl.constexpr,
    M_: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row = ((tl.program_id(0) // parts) * HIGH + tl.arange(0, HIGH)).to(tl.int64)[:, None]
    column = ((tl.program_id(0) % parts) * WIDE + tl.arange(0, WIDE))[None, :]
    live = (row < rows) & (column < columns)
    place = column % M_
    x = read_scores(X + row * row_stride, S, column * column_stride, column, live, ABSOLUTE, SCALED)
    nan = tl.sum(tl.sum((x != x).to(tl.int32), 1), 0)
    if nan > 0:
        tl.atomic_add(NANS, nan)
    ahead = tl.zeros((HIGH, WIDE), tl.int32)
    for j in range(M_):
        opponent = column - place + j
        y = read_scores(X + row * row_stride, S, opponent * column_stride, opponent, live, ABSOLUTE, SCALED)
        ahead += ((y > x) | ((y == x) & (j < place))).to(tl.int32)
    tl.store(M + row * columns + column, (ahead < N).to(tl.uint8), mask=live)
