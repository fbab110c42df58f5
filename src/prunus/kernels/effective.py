# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""The effective weight of a masked low-rank adapter, and what its gradient G = dL/dW_eff leaves in A and B, by tiles.

    W_eff = W + M*(BA)   or   W * (BA)                                                  (B times the scale)
    dB = (M*G) A^T,   dA = B^T (M*G)   or with W*G in place of M*G                      (and dB times it)

Products are those of float32 or nearly: where the other operand has 16 bits, a float32 factor is taken as two bfloat16
numbers, high + low, which leaves 2^-17 of it away; else everything is float32. Factors are split where they are read:
at the size of a small model a layer's time is its launches. No atomics: the same bits every time.

On paper, for (out, in) = 28672 x 7168 in bfloat16, 4,096 tokens, r = 16 on an H100 (3.0 TB/s, 770 TFLOP/s measured):
the three products of a training step take 3 x 1.68e12 operations, 6.6 ms. To build W_eff moves 411 MB in, 411 MB out
and 26 MB of packed mask, 0.28 ms, twice a step; G is written and read once, 0.27 ms, and the sums over tiles are small
and stay in the cache. That is 7.4 ms; full fine-tuning of the layer was measured at 7.1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

_NONE, _BOOL, _BITS = 0, 1, 2  # how a mask is stored
_TILE = 1 << 26  # entries of G formed at once: 128 MiB of bfloat16, few tails of products that leave the GPU half idle
_DEPTH = 512  # rows of G that a program reduces, some at a time: each writes r sums a column, twice 16 KiB of 128
_PROGRAMS = 128  # fewer leave multiprocessors idle: a small matrix is reduced by fewer rows a program

# Rows, columns and warps of a tile where operands are bfloat16, compiled without spills; of building, how many tiles a
# program takes in turn, with B in registers. Reducing writes r sums for every row of every tile: they are wide.
_BUILD = (64, 64, 4, 1)
_REDUCE = (64, 128, 4)
_WIDE = (32, 64, 4, 1)  # of float32 operands, either program


def build_(
    out: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, *, scale: float, product: bool
) -> None:
    """Writes W + scale M*(BA), or scale W * (BA), rounded to W's dtype and then to that of `out`.

    out, weight: (out, in), any strides. A: (r, in), B: (out, r), float32, r up to 64. mask: (out, in) bool, or packed
    as by `bits.pack`, (out, ceil(in / 8)) uint8; or None: all True.
    """
    rows, columns = weight.shape
    halves = weight.dtype != torch.float32
    kind, stored = _stored(mask, weight)
    tile = _BUILD if halves else _WIDE
    _build[(_over(columns, tile[1] * tile[3]), _over(rows, tile[0]))](
        out, weight, A.contiguous(), B.contiguous(), stored, rows, columns, len(A), scale,
        *out.stride(), *weight.stride(), *stored.stride(),
        KIND=kind, PRODUCT=product, HALVES=halves, OPERAND=_operand(halves), RANK=_rank(A), ROWS=tile[0],
        COLUMNS=tile[1], STEPS=tile[3], num_warps=tile[2],
    )  # fmt: skip


def reduce(
    g: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, mask: Tensor | None, *, scale: float, product: bool
) -> tuple[Tensor, Tensor]:
    """dA (r, in) and dB (out, r), float32, from row tiles of G = g^T x, dropped as soon as used.

    g: (tokens, out), x: (tokens, in), of one dtype. weight, A, B, mask, scale: as in `build_`.
    G is rounded to bfloat16 where all are bfloat16, as the weight's own gradient would be; else it is float32, because
    float16 could overflow or vanish.
    """
    rows, columns = weight.shape
    dtype = torch.bfloat16 if g.dtype == weight.dtype == torch.bfloat16 else torch.float32
    step, rank = _tile_rows(rows, columns), len(A)
    halves = dtype == torch.bfloat16 and not product
    a, b = A.contiguous(), B.contiguous()
    kind, stored = _stored(mask, weight)
    tile = _REDUCE if halves else _WIDE
    across = _over(columns, tile[1])
    depth = _depth(step, across, tile[0])
    G = torch.empty(step, columns, dtype=dtype, device=weight.device)
    dA = torch.empty(_over(step, depth), rank, columns, device=weight.device)  # by program, summed over tiles
    dB = torch.empty(across, step, rank, device=weight.device)  # by program, of one tile
    result = torch.empty(rows, rank, device=weight.device)
    for start in range(0, rows, step):
        inside = slice(start, min(rows, start + step))
        count = inside.stop - start
        _multiply(g[:, inside].t(), x, G[:count])
        _reduce[(across, _over(count, depth))](
            G, weight[inside], a, b[inside], stored[inside], dA, dB, count, columns, rank, scale,
            *weight.stride(), *stored.stride(), dA.stride(0), dB.stride(0),
            FIRST=start == 0, KIND=kind, PRODUCT=product, HALVES=halves, OPERAND=_operand(halves), RANK=_rank(A),
            ROWS=tile[0], COLUMNS=tile[1], STEPS=depth // tile[0], num_warps=tile[2], num_stages=2 if halves else 1,
        )  # fmt: skip
        torch.sum(dB[:, :count], 0, out=result[inside])
    return dA.sum(0) if len(dA) > 1 else dA[0], result


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """The product of two matrices of one dtype, into a matrix of that dtype or float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:  # products of 16-bit numbers are exact in float32
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _tile_rows(rows: int, columns: int) -> int:
    """Rows of G formed at once: equal shares of the matrix, in multiples of what a program takes."""
    tiles = max(1, _over(rows * columns, _TILE))
    return min(rows, _over(_over(rows, tiles), _DEPTH) * _DEPTH)


def _depth(rows: int, across: int, tile: int) -> int:
    """Rows of a program: halved from `_DEPTH`, down to one tile, while that makes fewer than `_PROGRAMS` programs.

    On an H200 the matrices of a block of width 576 took 17 us each in 5 to 24 programs of up to eight tiles in turn.
    """
    depth = _DEPTH
    while depth > tile and across * _over(rows, depth) < _PROGRAMS:
        depth //= 2
    return depth


def _over(a: int, b: int) -> int:
    return -(-a // b)


def _rank(A: Tensor) -> int:
    return max(16, 1 << (len(A) - 1).bit_length())


def _operand(halves: bool) -> tl.dtype:
    """What products are formed of. The interpreter's know no bfloat16: there the same values are float32."""
    return tl.bfloat16 if halves and not _INTERPRETED else tl.float32


def _stored(mask: Tensor | None, weight: Tensor) -> tuple[int, Tensor]:
    """How the mask is stored, and its bytes; a program without a mask gets the weight in its place and leaves it."""
    if mask is None:
        return _NONE, weight
    return (_BITS, mask) if mask.dtype == torch.uint8 else (_BOOL, mask.view(torch.uint8))


@triton.jit
def _kept(M, row, first, rows, columns, m_row, m_column, KIND: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The mask of a tile, (rows, columns) bool, whose first column is a multiple of 8; False outside."""
    if KIND == 1:
        column = first + tl.arange(0, COLUMNS)
        live = (row < rows)[:, None] & (column < columns)[None, :]
        kept = tl.load(M + row[:, None] * m_row + column[None, :] * m_column, mask=live, other=0)
    else:
        byte = first // 8 + tl.arange(0, COLUMNS // 8)
        live = (row < rows)[:, None] & (byte * 8 < columns)[None, :]
        packed = tl.load(M + row[:, None] * m_row + byte[None, :] * m_column, mask=live, other=0)
        bits = (packed[:, :, None] >> tl.arange(0, 8).to(tl.uint8)[None, None, :]) & 1
        kept = tl.reshape(bits, (ROWS, COLUMNS))
    return kept != 0


@triton.jit
def _halves(x, HALVES: tl.constexpr, OPERAND: tl.constexpr):
    """A float32 factor as two bfloat16 numbers that add up, or as it is, twice."""
    high = x.to(tl.bfloat16).to(tl.float32) if HALVES else x
    low = (x - high).to(tl.bfloat16) if HALVES else x
    return high.to(OPERAND), low.to(OPERAND)


@triton.jit
def _build(
    OUT, W, A, B, M, rows, columns, r, scale, o_row, o_column, w_row, w_column, m_row, m_column,
    KIND: tl.constexpr, PRODUCT: tl.constexpr, HALVES: tl.constexpr, OPERAND: tl.constexpr, RANK: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, RANK)
    tall = (row < rows)[:, None]
    b = tl.load(B + row[:, None] * r + rank[None, :], mask=tall & (rank < r)[None, :], other=0.0) * scale
    b, b_low = _halves(b, HALVES, OPERAND)
    for step in range(0, STEPS):
        start = (tl.program_id(0) * STEPS + step) * COLUMNS
        column = start + tl.arange(0, COLUMNS)
        wide = (column < columns)[None, :]
        live = tall & wide
        w = tl.load(W + row[:, None] * w_row + column[None, :] * w_column, mask=live, other=0.0).to(tl.float32)
        a = tl.load(A + rank[:, None] * columns + column[None, :], mask=wide & (rank < r)[:, None], other=0.0)
        a, a_low = _halves(a, HALVES, OPERAND)
        update = tl.dot(b, a, input_precision="ieee")
        if HALVES:
            update = tl.dot(b_low, a, update)
            update = tl.dot(b, a_low, update)
        if PRODUCT:
            w = w * update
        elif KIND == 0:
            w = w + tl.where(live, update, 0.0)  # a bare sum would be started with w, and rounded otherwise than below
        else:
            kept = _kept(M, row, start, rows, columns, m_row, m_column, KIND, ROWS, COLUMNS)
            w = w + tl.where(kept, update, 0.0)
        rounded = w.to(W.dtype.element_ty).to(tl.float32).to(OUT.dtype.element_ty)
        tl.store(OUT + row[:, None] * o_row + column[None, :] * o_column, rounded, mask=live)


@triton.jit
def _reduce(
    G, W, A, B, M, DA, DB, rows, columns, r, scale, w_row, w_column, m_row, m_column, da, db,
    FIRST: tl.constexpr, KIND: tl.constexpr, PRODUCT: tl.constexpr, HALVES: tl.constexpr, OPERAND: tl.constexpr,
    RANK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rank = tl.arange(0, RANK)
    wide = (column < columns)[None, :] & (rank < r)[:, None]
    at = rank[:, None] * columns + column[None, :]
    a, a_low = _halves(tl.load(A + at, mask=wide, other=0.0), HALVES, OPERAND)  # (r, columns)
    sums = DA + tl.program_id(1) * da + at
    total = tl.load(sums, mask=wide & (not FIRST), other=0.0)
    for step in range(0, STEPS):
        row = (tl.program_id(1) * STEPS + step) * ROWS + tl.arange(0, ROWS)
        live = (row < rows)[:, None] & (column < columns)[None, :]
        thin = (row < rows)[:, None] & (rank < r)[None, :]
        row = row.to(tl.int64)
        g = tl.load(G + row[:, None] * columns + column[None, :], mask=live, other=0.0)
        if PRODUCT:
            w = tl.load(W + row[:, None] * w_row + column[None, :] * w_column, mask=live, other=0.0)
            g = g.to(tl.float32) * w.to(tl.float32)
        elif KIND != 0:
            kept = _kept(M, row, tl.program_id(0) * COLUMNS, rows, columns, m_row, m_column, KIND, ROWS, COLUMNS)
            g = tl.where(kept, g, 0.0)
        g = g.to(OPERAND)
        b = tl.load(B + row[None, :] * r + rank[:, None], mask=tl.trans(thin), other=0.0) * scale  # B^T, (r, rows)
        b, b_low = _halves(b, HALVES, OPERAND)
        part = tl.dot(g, tl.trans(a), input_precision="ieee")  # (rows, r)
        total = tl.dot(b, g, total, input_precision="ieee")
        if HALVES:
            part = tl.dot(g, tl.trans(a_low), part)
            total = tl.dot(b_low, g, total)
        own = DB + tl.program_id(0) * db + row[:, None] * r + rank[None, :]
        tl.store(own, part * scale, mask=thin)
    tl.store(sums, total, mask=wide)


_INTERPRETED = isinstance(_build, InterpretedFunction)
