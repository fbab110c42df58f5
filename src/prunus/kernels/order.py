# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""Scores as integers of the same order, inside Triton programs and outside.

The bits of a float32, read as int32, are in order for numbers from +0 on; for negative ones all but the sign are turned
round:

    key = bits ^ ((bits >> 31) & 0x7fffffff),   with -0 taken for +0, so that zeros tie

16-bit scores are widened first, which is exact. Keys of NaN lie above that of inf or below that of -inf.
"""

from __future__ import annotations

import struct

import triton
import triton.language as tl


def key_of(value: float) -> int:
    """The key of a float32 number, outside programs.

    >>> key_of(-0.0), key_of(1.0) > key_of(0.5)
    (0, True)
    """
    (bits,) = struct.unpack("<i", struct.pack("<f", value))
    return 0 if bits == -(1 << 31) else bits ^ ((bits >> 31) & 0x7FFFFFFF)


def value_of(key: int) -> float:
    """The float32 number of a key.

    >>> value_of(key_of(-2.5))
    -2.5
    """
    return struct.unpack("<f", struct.pack("<i", key ^ ((key >> 31) & 0x7FFFFFFF)))[0]


@triton.jit
def widen(x):
    """The same numbers in float32; bfloat16 by its bits, because Triton's interpreter loses denormal ones."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def read_scores(X, S, place, column, live, ABSOLUTE: tl.constexpr, SCALED: tl.constexpr):
    """The float32 scores at X + place: as they are, |x|, or |x| * S[column]; 0 where not live."""
    x = widen(tl.load(X + place, mask=live, other=0.0))
    if ABSOLUTE:
        x = tl.abs(x)
    if SCALED:
        x = x * tl.load(S + column, mask=live, other=0.0)
    return x


@triton.jit
def read_keys(X, S, place, column, live, ABSOLUTE: tl.constexpr, SCALED: tl.constexpr):
    """The keys of `read_scores`, int32; the least int32, which is below every number's key, where not live."""
    x = read_scores(X, S, place, column, live, ABSOLUTE, SCALED)
    bits = x.to(tl.int32, bitcast=True)
    if ABSOLUTE:
        bits = bits & 0x7FFFFFFF  # inf * 0 is a NaN of either sign
    else:
        bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
        bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(live, bits, -2147483648)


@triton.jit
def is_nan(key):
    """Whether the key is that of a NaN (or of an entry that is not live)."""
    return (key > 0x7F800000) | (key < -2139095041)
