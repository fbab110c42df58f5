# pyright: basic, reportMissingImports=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
"""The loss of distillation (see `train.distill`) of rows of logits, and its gradient, in one launch.

    l_i  = a T^2 sum_k q_ik (log q_ik - log p_ik) + (1 - a) (log sum_k exp z_ik - z_iy),
    dz_i = a T (p_i - q_i) + (1 - a) (softmax(z_i) - onehot(y_i)),     p_i = softmax(z_i / T), q_i = softmax(t_i / T)

As in `entropy`, a program takes a row and walks it twice: once for the largest logits and the sums, the divergence's
own among them, all rescaled when a larger logit comes; once for the gradient. So two rows of logits are read once or
twice and one is written, where log_softmax, kl_div and what follows them are some twenty passes of float32.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from prunus.kernels.entropy import prepared


def distilled_loss(z: Tensor, taught: Tensor, y: Tensor, weight: float, temperature: float) -> tuple[Tensor, Tensor]:
    """The loss of every row (n,) float32, and the gradient (n, words) of their sum in the dtype of z.

    z, taught: (n, words) logits of student and teacher, float32 or 16-bit, strides 1 along words. y: (n,) int64, each
    in [0, words). weight: a, in (0, 1]. temperature: T > 0.
    """
    z, taught = (each if each.stride(1) == 1 else each.contiguous() for each in (z, taught))
    losses, dz, how = prepared(z)
    if len(z):
        _divergence[(len(z),)](
            z, taught, y, losses, dz, z.shape[1], z.stride(0), taught.stride(0), float(weight), float(temperature),
            WARM=temperature != 1, **how,
        )  # fmt: skip
    return losses, dz


@triton.jit
def _divergence(
    Z, TAUGHT, Y, LOSSES, DZ, words, z_row, taught_row, weight, temperature,
    WARM: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z_at, taught_at, dz_at = Z + row * z_row, TAUGHT + row * taught_row, DZ + row * words
    place = tl.arange(0, BLOCK)
    hidden = -float("inf")
    # p_: of z / T, q_: of the teacher's t / T, z_: of z, where T is not 1
    p_top, p_sum, q_top, q_sum, z_top, z_sum = -3.4e38, 0.0, -3.4e38, 0.0, -3.4e38, 0.0
    apart = 0.0  # sum exp(t - q_top) ((t - q_top) - (z - p_top)), both over T: small differences of large logits
    for i in range(0, BLOCKS):
        k = i * BLOCK + place
        z = tl.load(z_at + k, mask=k < words, other=hidden).to(tl.float32)
        t = tl.load(taught_at + k, mask=k < words, other=hidden).to(tl.float32)
        if WARM:
            higher = tl.maximum(z_top, tl.max(z, axis=0))
            z_sum = z_sum * tl.exp(z_top - higher) + tl.sum(tl.exp(z - higher), axis=0)
            z_top = higher
            z, t = z / temperature, t / temperature
        p_higher, q_higher = tl.maximum(p_top, tl.max(z, axis=0)), tl.maximum(q_top, tl.max(t, axis=0))
        shrink, moved = tl.exp(q_top - q_higher), (q_top - q_higher) - (p_top - p_higher)
        z, t = z - p_higher, t - q_higher
        e = tl.exp(t)
        gap = tl.where(e == 0, 0.0, t) - tl.where(e == 0, 0.0, z)  # of what the teacher hides none; a NaN goes on
        apart = shrink * (apart + q_sum * moved) + tl.sum(e * gap, axis=0)
        p_sum = p_sum * tl.exp(p_top - p_higher) + tl.sum(tl.exp(z), axis=0)
        q_sum = q_sum * shrink + tl.sum(e, axis=0)
        p_top, q_top = p_higher, q_higher
    if not WARM:
        z_top, z_sum = p_top, p_sum
    y = tl.load(Y + row)
    loss = weight * temperature * temperature * (apart / q_sum - tl.log(q_sum) + tl.log(p_sum))
    if weight < 1:  # else a label may be one that the student hides, whose entropy is infinite
        loss += (1 - weight) * (z_top - tl.load(z_at + y).to(tl.float32) + tl.log(z_sum))
    tl.store(LOSSES + row, loss)
    for i in range(0, BLOCKS):
        k = i * BLOCK + place
        z = tl.load(z_at + k, mask=k < words, other=hidden).to(tl.float32)
        t = tl.load(taught_at + k, mask=k < words, other=hidden).to(tl.float32)
        own = tl.exp(z - z_top) / z_sum
        p = own
        if WARM:
            p, t = tl.exp(z / temperature - p_top) / p_sum, t / temperature
        d = weight * temperature * (p - tl.exp(t - q_top) / q_sum)
        d += (1 - weight) * (own - tl.where(k == y, 1.0, 0.0))
        tl.store(dz_at + k, d.to(DZ.dtype.element_ty), mask=k < words)
