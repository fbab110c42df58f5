# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""SparseGPT's walk through a block of columns in one launch.

    for each column j:   e = (1 - M_j) W_j / U_jj,   W_k -= e U_jk for every k >= j of the block

Rows are independent, so a program takes a few rows, holds their part of the block in registers and walks the columns;
the plain path launches two to four programs a column for the same arithmetic. The columns are held as groups (of m for
N:M, else of one): a group is read out of the registers by a sum in which all other groups are zero, hence exactly, its
mask is chosen where the pattern is N:M, and its columns are finished one after the other.

What it costs at 7168 rows and 128 columns: 3 operations an entry and column, 0.4 G, and 4 x 3.7 MB of traffic: about
10 us on an H100 for either; the dependency from column to column, 128 times some 300 cycles, is what counts.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32  # of one program: 224 programs at 7168 rows, more than an H100 has multiprocessors


def sweep_block_(
    weight: Tensor, mask: Tensor, errors: Tensor, upper: Tensor, scale: Tensor, choose: tuple[int, int] | None
) -> None:
    """Compensates inside a block of columns, all of it transposed: (block, out), every last stride 1.

    weight: float32, changed: entry j is what column j was when its turn came, pruned entries then about zero.
    mask: bool, True kept. Read where `choose` is None; where it is (n, m) written: the best n of every m columns by
        |W_ij| / U_jj, ties to the lower column. m is a power of two that divides the block.
    errors: float32, written: e of every column. upper: (block, block) float32 of U. scale: (block,) float32, 1 / U_jj.
    """
    columns, rows = weight.shape
    n, m = choose or (0, 1)
    count = columns // m
    _sweep[(-(-rows // _ROWS),)](
        weight, mask.view(torch.uint8), errors, upper, scale, rows, columns,
        weight.stride(0), mask.stride(0), errors.stride(0), upper.stride(0),
        N=n, GROUP=m, COUNT=count, GROUPS=1 << (count - 1).bit_length(), ROWS=_ROWS, num_warps=4 if m <= 4 else 8,
    )  # fmt: skip


@triton.jit
def _sweep(
    W, M, E, U, S, rows, columns, w_stride, m_stride, e_stride, u_stride,
    N: tl.constexpr, GROUP: tl.constexpr, COUNT: tl.constexpr, GROUPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, GROUP)
    column = group[:, None] * GROUP + member[None, :]  # (groups, group)
    inside = row < rows
    live = (column < columns)[None, :, :] & inside[:, None, None]
    place = column[None, :, :] * w_stride + row[:, None, None]
    w = tl.load(W + place, mask=live, other=0.0)  # (rows, groups, group)
    for g in range(0, COUNT):
        here = tl.sum(tl.where((group == g)[None, :, None], w, 0.0), axis=1)  # (rows, group)
        mine = g * GROUP + member
        kept_at = M + mine[None, :] * m_stride + row[:, None]
        if N > 0:
            score = tl.abs(here) * tl.load(S + mine)[None, :]
            other = score[:, None, :]
            this = score[:, :, None]
            earlier = (member[None, :] < member[:, None])[None, :, :]
            better = (other > this) | ((other == this) & earlier)
            keep = (tl.sum(better.to(tl.int32), axis=2) < N).to(tl.int32)
            tl.store(kept_at, keep.to(tl.uint8), mask=inside[:, None])
        else:
            keep = tl.load(kept_at, mask=inside[:, None], other=1).to(tl.int32)
        for i in tl.static_range(GROUP):
            j = g * GROUP + i
            value = tl.sum(tl.where((member == i)[None, :], here, 0.0), axis=1)  # (rows,)
            stays = tl.sum(tl.where((member == i)[None, :], keep, 0), axis=1)
            error = tl.where(stays != 0, 0.0, value * tl.load(S + j))
            tl.store(E + j * e_stride + row, error, mask=inside)
            u = U + j * u_stride
            here -= error[:, None] * tl.load(u + mine)[None, :]
            w -= error[:, None, None] * tl.load(u + column, mask=column < columns, other=0.0)[None, :, :]
    tl.store(W + place, w, mask=live)
