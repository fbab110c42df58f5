# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""Cross-entropy of logits and its gradient, in one launch.

    l_i = log sum_k exp z_ik - z_iy,     dz_ik = exp(z_ik) / sum_k exp z_ik - [k = y_i]

A program takes a row and walks it twice: once for the largest logit and the sum of exponentials (which is rescaled when
a larger one comes), once for the gradient, when most of the row is still in the cache. Everything is float32 but what
is stored. For 768 x 50272 bfloat16 logits that is 77 MB read once or twice and 77 MB written, 0.05 to 0.08 ms on an
H100; written with log_softmax it is eight passes of float32, 0.4 ms.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096  # entries of a row in registers at once


def cross_entropy(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of every row (n,) float32, and the gradient (n, words) of their sum in the dtype of z.

    z: (n, words) logits, float32 or 16-bit, stride 1 along words. y: (n,) int64, each in [0, words).
    """
    z = z if z.stride(1) == 1 else z.contiguous()
    losses, dz, how = prepared(z)
    if len(z):
        _entropy[(len(z),)](z, y, losses, dz, z.shape[1], z.stride(0), **how)
    return losses, dz


def prepared(z: Tensor) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Room for the losses and the gradient of rows of logits, and how a program walks such a row."""
    rows, words = z.shape
    block = min(_BLOCK, triton.next_power_of_2(words))
    losses = torch.empty(rows, dtype=torch.float32, device=z.device)
    dz = torch.empty(rows, words, dtype=z.dtype, device=z.device)
    return losses, dz, {"BLOCKS": triton.cdiv(words, block), "BLOCK": block, "num_warps": 8}


@triton.jit
def _entropy(Z, Y, LOSSES, DZ, words, z_row, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    z_at, dz_at = Z + row * z_row, DZ + row * words
    place = tl.arange(0, BLOCK)
    top = -3.4e38  # finite, so that -inf among the logits is no trouble
    total = 0.0
    for i in range(0, BLOCKS):
        k = i * BLOCK + place
        z = tl.load(z_at + k, mask=k < words, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(z, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), axis=0)
        top = higher
    y = tl.load(Y + row)
    tl.store(LOSSES + row, top - tl.load(z_at + y).to(tl.float32) + tl.log(total))
    for i in range(0, BLOCKS):
        k = i * BLOCK + place
        z = tl.load(z_at + k, mask=k < words, other=-float("inf")).to(tl.float32)
        p = tl.exp(z - top) / total - tl.where(k == y, 1.0, 0.0)
        tl.store(dz_at + k, p.to(DZ.dtype.element_ty), mask=k < words)
