"""SparseGPT: prune a layer column by column, and move the error of what goes onto the columns to its right.

The optimal-brain-surgeon update in the metric of the layer's inputs:

    H = X^T X + lam I,   H^-1 = U^T U with U upper triangular
    for each column j:   e = (W_j - M_j W_j) / U_jj,   W_k -= e U_jk for k > j

Criteria that only score are in `score`; where zeros may lie is the pattern's affair (`patterns`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prunus.kernels import uses_kernels
from prunus.machine import full_products
from prunus.patterns import NM, Pattern
from prunus.score import Criterion, magnitude
from prunus.solve.quadratic import finite_gram, invert_lower_, once_per_inputs, seen_gram

if TYPE_CHECKING:
    from prunus.layers import Inputs, Layer

log = logging.getLogger(__name__)

_INNER = 32  # columns swept before the next ones in the block are brought up to date with one product
_PANEL = 8  # blocks after which all later columns are brought up to date: one wide product instead of eight thin ones
_KERNEL_BLOCK = 256  # most columns that a program holds in registers
_MOST_DAMPING = 1.0  # share of the mean diagonal; more would be magnitude pruning under another name


def sparsegpt(damping: float = 0.01, blocksize: int = 128) -> Criterion:
    """SparseGPT (Frantar & Alistarh 2023): chooses and compensates column block by column block.

    damping: lam as a share of the mean diagonal of X^T X. When the factorisation fails it grows tenfold, up to 1,
        which is logged; then ValueError.
    blocksize: columns swept together. An unstructured mask is chosen once a block, by W_ij^2 / U_jj^2 over the block's
        rows and columns; N:M at the first column of each group.

    Inputs that were always zero give their weights away: those become zero, and are pruned first. The blocks' counts
    are the cumulatively rounded shares of `kept`, so the total is exact. All is float32 (never TF32);
    layers that share one `Inputs` share one factorisation. A layer that saw no token is pruned by magnitude, with a
    warning. Its solve raises ValueError for a layer without a Gram matrix, for NaN or Inf, and as `pattern.mask`.

    >>> inputs = Inputs(2, gram=True)
    >>> inputs.add_(torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]))
    >>> layer = Layer("fc", torch.tensor([[1.0, 1.0]]), inputs)
    >>> sparsegpt(damping=0.0).solve(layer, Unstructured("row"), 1)[0]
    tensor([[0.0000, 1.5000]])
    """
    if not damping >= 0 or damping > _MOST_DAMPING or blocksize < 1:
        raise ValueError(
            f"sparsegpt needs 0 <= damping <= {_MOST_DAMPING} and blocksize >= 1; "
            f"got damping={damping}, blocksize={blocksize}"
        )
    factorise = once_per_inputs(lambda layer, inputs: _factorise(layer, inputs, damping))

    @torch.no_grad()
    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        inputs = seen_gram(layer, "sparsegpt")
        if inputs is None:
            return magnitude.solve(layer, pattern, kept)
        with full_products():
            factor = factorise(layer, inputs)
            weight, mask = _sweep(layer, pattern, kept, factor.to(layer.weight.device), blocksize)
        if not bool(weight.isfinite().all()):
            raise ValueError(
                f"sparsegpt's update of '{layer.name}' overflows {weight.dtype}: "
                f"raise damping (now {factor.damping:g}), or load the model in bfloat16 or float32"
            )
        return weight, mask

    return Criterion(solve, needs="gram", name="sparsegpt")


@dataclass(frozen=True)
class _Factor:
    """U (in, in) float32 upper with (H / mean diag H)^-1 = U^T U; which inputs were always zero; the damping used."""

    upper: Tensor
    dead: Tensor
    damping: float

    def to(self, device: torch.device) -> _Factor:
        return _Factor(self.upper.to(device), self.dead.to(device), self.damping)


def _factorise(layer: Layer, inputs: Inputs, damping: float) -> _Factor:
    """The factor of the damped Gram matrix, scaled to mean diagonal 1 (the scale cancels in the sweep).

    With P the reversal of order, P H P = L L^T gives U = P L^-1 P: no inverse is formed.
    """
    inputs.check(layer.name)
    gram = finite_gram(layer, inputs)
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = float(diagonal.mean(dtype=torch.float64)) or 1.0
    hessian = gram.flip(0, 1).div_(mean)
    own = hessian.diagonal().clone().masked_fill_(dead.flip(0), 1.0)
    used = damping
    while True:
        hessian.diagonal().copy_(own + used)
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not bool(failed):
            break
        if used >= _MOST_DAMPING:
            raise ValueError(
                f"the Gram matrix of '{layer.name}' is not positive definite even with damping {used:g} of its mean "
                "diagonal: check the calibration inputs, or prune this layer by score"
            )
        used = min(max(10 * used, 1e-6), _MOST_DAMPING)
        log.warning("'%s': factorisation failed, damping raised to %g of the mean diagonal", layer.name, used)
    del hessian
    invert_lower_(lower)
    return _Factor(lower.flip(0, 1).contiguous(), dead, used)


def _sweep(layer: Layer, pattern: Pattern, kept: int, factor: _Factor, blocksize: int) -> tuple[Tensor, Tensor]:
    """The new weight (out, in) in the weight's dtype and the mask.

    Works on the transpose, so that a column of W is contiguous. After a block the rest of its panel of blocks is
    brought up to date, after a panel the rest of the matrix. Nothing in here waits for the device.
    """
    rows, columns = layer.weight.shape
    unit = pattern.width or 1
    block = max(unit, blocksize // unit * unit)  # groups do not straddle blocks
    edges = [*range(0, columns, block), columns]
    counts = pattern.split((rows, columns), kept, edges, name=layer.name)
    upper, scale = factor.upper, factor.upper.diagonal().reciprocal()[:, None]
    plain: dict[str, Any] = {"dtype": torch.float32, "device": layer.weight.device}
    weight = torch.empty((columns, rows), **plain).copy_(layer.weight.T)
    weight.masked_fill_(factor.dead[:, None], 0.0)
    mask = torch.empty((columns, rows), dtype=torch.bool, device=weight.device)
    errors = torch.empty((min(_PANEL * block, columns), rows), **plain)
    compensate_ = _compensation(weight, pattern, block)
    for (start, stop), count in zip(pairwise(edges), counts, strict=True):
        inside, first = slice(start, stop), start // (_PANEL * block) * _PANEL * block
        last = min(first + _PANEL * block, columns)
        own = errors[start - first : stop - first]
        compensate_(
            weight[inside], mask[inside], own, upper[inside, inside], scale[inside], pattern=pattern, kept=count
        )
        weight[stop:last].addmm_(upper[inside, stop:last].T, own, alpha=-1)
        if stop == last:
            weight[last:].addmm_(upper[first:last, last:].T, errors[: last - first], alpha=-1)
    weight.masked_fill_(~mask, 0.0)
    return weight.T.to(layer.weight.dtype).contiguous(), mask.T.contiguous()


def _compensation(weight: Tensor, pattern: Pattern, block: int) -> Callable[..., None]:
    """What sweeps a block: one program, or plain operations where none is written for the device or the pattern."""
    width = pattern.width or 1
    simple = pattern.width is None or (isinstance(pattern, NM) and width & (width - 1) == 0 and width <= 16)
    if uses_kernels(weight) and simple and block <= _KERNEL_BLOCK and block * weight.shape[1] < 2**31:
        return _launch_block_
    return _sweep_block_


def _launch_block_(
    weight: Tensor, mask: Tensor, errors: Tensor, upper: Tensor, scale: Tensor, *, pattern: Pattern, kept: int
) -> None:
    """`_sweep_block_` in one launch, and the selection before it where the pattern is not N:M."""
    from prunus.kernels import sweep_block_

    if not isinstance(pattern, NM):
        mask.copy_(pattern.choose((weight.abs() * scale).T, kept).T)
    sweep_block_(weight, mask, errors, upper, scale, (pattern.n, pattern.m) if isinstance(pattern, NM) else None)


def _sweep_block_(
    weight: Tensor, mask: Tensor, errors: Tensor, upper: Tensor, scale: Tensor, *, pattern: Pattern, kept: int
) -> None:
    """Choose the mask of a block of columns and compensate inside it; `errors` receives e of every column.

    weight, mask, errors: (block, out), transposed. Per column two kernels: bring it up to date with the errors of the
    columns just before it, and take its own error.
    """
    columns = len(weight)
    step = pattern.width or min(_INNER, columns)
    if pattern.width is None:
        mask.copy_(pattern.choose((weight.abs() * scale).T, kept).T)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        weight[start:stop].addmm_(upper[:start, start:stop].T, errors[:start], alpha=-1)
        if pattern.width is not None:
            group = (weight[start:stop].abs() * scale[start:stop]).T
            mask[start:stop] = pattern.choose(group, kept * step // columns).T
        share = torch.where(mask[start:stop], 0.0, scale[start:stop])  # 1 / U_jj where pruned
        for j in range(start, stop):
            if j > start:
                weight[j].addmv_(errors[start:j].T, upper[start:j, j], alpha=-1)
            torch.mul(weight[j], share[j - start], out=errors[j])
