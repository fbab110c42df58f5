"""Masks of the scores |W_ij| * s_j (magnitude, Wanda), which on a GPU are then never written down.

N:M and rows have programs in `kernels/` that multiply while they select: the weight is read once, the mask written
once. Any other pattern, and everything on a CPU, goes by `pattern.mask` of the scores, with the same bits.
"""

from __future__ import annotations

from functools import singledispatch

from torch import Tensor

from prunus.patterns.entries import NM, Unstructured
from prunus.patterns.protocol import Pattern, check_count, quoted
from prunus.patterns.selection import goes_to_kernels, refuse_nan

__all__ = ["mask_scaled", "scaled"]


def scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """|W_ij| * s_j, or |W_ij| without a scale: (out, in) float32, contiguous, so that sums over it are always the same.

    >>> scaled(torch.tensor([[-2.0, 1.0]]), torch.tensor([5.0, 1.0])).tolist()
    [[10.0, 1.0]]
    """
    size = weight.abs().float().contiguous()
    return size if scale is None else size.mul_(scale)


@singledispatch
def mask_scaled(
    pattern: Pattern, weight: Tensor, scale: Tensor | None, kept: int, *, name: str = "this layer"
) -> Tensor:
    """The mask (out, in) bool that the pattern makes of the scores |W_ij| * s_j.

    weight: (out, in) floating. scale: (in,) float32, nothing negative, on the weight's device; None is 1.
    Raises ValueError as `pattern.mask`.

    >>> mask_scaled(NM(1, 2), torch.tensor([[-2.0, 3.0]]), torch.tensor([5.0, 1.0]), 1).tolist()
    [[True, False]]
    """
    return pattern.mask(scaled(weight, scale), kept, name=name)


@mask_scaled.register
def _(pattern: NM, weight: Tensor, scale: Tensor | None, kept: int, *, name: str = "this layer") -> Tensor:
    if not goes_to_kernels(weight):
        return pattern.mask(scaled(weight, scale), kept, name=name)
    from prunus.kernels import keep_of_groups

    check_count(weight, kept, name)
    pattern.check_count((weight.shape[0], weight.shape[1]), kept, name)
    return _checked(keep_of_groups(weight, pattern.n, pattern.m, absolute=True, scale=scale), name)


@mask_scaled.register
def _(pattern: Unstructured, weight: Tensor, scale: Tensor | None, kept: int, *, name: str = "this layer") -> Tensor:
    check_count(weight, kept, name)
    if pattern.per == "row" and goes_to_kernels(weight):
        from prunus.kernels import keep_of_rows, takes_rows

        if takes_rows(weight):
            each, extra = divmod(kept, max(1, weight.shape[0]))
            return _checked(keep_of_rows(weight, each, extra, absolute=True, scale=scale), name)
    return pattern.mask(scaled(weight, scale), kept, name=name)


def _checked(found: tuple[Tensor, Tensor], name: str) -> Tensor:
    mask, nans = found
    refuse_nan(int(nans), mask.numel(), f"the score of {quoted(name)}")
    return mask
