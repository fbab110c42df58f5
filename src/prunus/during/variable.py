"""What ELSA moves: a weight that is trained itself, or what an adapter makes of a frozen one, W + s BA.

Both are seen alike: a value w, a pull lam (w - z + u) that is added to gradients, a price v of each entry, and an end.
z - u, to which w is pulled, is held in `Goal`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from prunus.adapt import Adapted


class Goal(nn.Module):
    """A tensor of the shape and dtype of another, held in fewer bits."""

    held: Tensor
    step: Tensor  # of whole numbers: (n, 1) float32, one for each row of `held`, (n, up to 128) int8

    def __init__(self, like: Tensor, bits: int) -> None:
        super().__init__()
        self.shape, self.dtype = like.shape, like.dtype
        width = min(128, like.numel() & -like.numel())  # the largest power of two that divides it
        shape, dtype = {8: ((like.numel() // width, width), torch.int8), 16: (like.shape, torch.bfloat16)}.get(
            bits, (like.shape, like.dtype)
        )
        self.register_buffer("held", torch.zeros(shape, dtype=dtype, device=like.device))
        if bits == 8:
            self.register_buffer("step", torch.ones(shape[0], 1, device=like.device))

    def read(self, rows: slice = slice(None)) -> Tensor:
        """What was written, or some rows of it, but for rounding."""
        if self.held.dtype != torch.int8:
            return self.held[rows].to(self.dtype)
        start, stop, _ = rows.indices(self.shape[0])
        size, width = self.shape[1:].numel(), self.held.shape[1]
        blocks = slice(start * size // width, -(-stop * size // width))
        flat = (self.held[blocks] * self.step[blocks]).flatten()
        first = start * size - blocks.start * width
        return flat[first : first + (stop - start) * size].view(stop - start, *self.shape[1:]).to(self.dtype)

    def write_(self, values: Tensor) -> None:
        """Hold other values."""
        if self.held.dtype == torch.int8:
            rows = values.float().reshape(self.held.shape)
            self.step.copy_(rows.abs().amax(1, keepdim=True).div_(127))
            values = torch.where(self.step > 0, rows / self.step, 0.0).round_()
        self.held.copy_(values)


class Whole:
    """A weight that is trained itself. v is Adam's second moment of it."""

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def value(self) -> Tensor:
        """w, in the weight's shape and dtype."""
        return self.weight.detach()

    def own(self, stored: Tensor) -> Tensor:
        """What has the weight's shape, in that of `value`."""
        return stored

    def stored(self, values: Tensor) -> Tensor:
        """What has the shape of `value`, in the weight's."""
        return values

    def pull_(self, goal: Goal, lam: float) -> None:
        """Adds lam * (w - goal) to the gradient, if there is one."""
        if self.weight.grad is not None:
            self.weight.grad.add_(self.value() - goal.read(), alpha=lam)

    def priced(self, squares: Tensor, optimizer: Optimizer) -> Tensor:
        """v * squares, in place; v is 1 where the optimizer has no second moments."""
        second = _second(self.weight, optimizer)
        return squares if second is None else squares.mul_(second)


class LowRank:
    """W + s BA of a frozen W. No gradient and no moment of its size exists.

    The pull R = lam * (w - z + u) is formed by tiles of rows, and reaches the factors by the chain rule:
    s B^T R and s R A^T.

    v_ij = r_i c_j / mean(c): r_i, the mean of B's second moments in row i, is the mean square of dL/dw in that row, as
    A's components sketch it, but for a factor of the whole layer; c_j likewise, of A in column j, through B. It is the
    second moment of rank one that Adafactor has (Shazeer and Stern 2018), from what Adam keeps anyway.
    """

    def __init__(self, adapted: Adapted) -> None:
        self.adapted = adapted
        # A copy, because a teacher may share the dense one; contiguous, so that matrices of it share its memory.
        adapted.parameter.data = adapted.parameter.detach().clone(memory_format=torch.contiguous_format)

    def value(self) -> Tensor:
        """w, float32: (out, in) or (experts, out, in)."""
        return self.adapted.value()

    def own(self, stored: Tensor) -> Tensor:
        """What has the weight's shape, in that of `value`."""
        return self.adapted.matrices(stored)

    def stored(self, values: Tensor) -> Tensor:
        """What has the shape of `value`, in the weight's."""
        return self.adapted.stored(values)

    def pull_(self, goal: Goal, lam: float) -> None:
        """Adds the gradients of lam / 2 * ||w - goal||^2 to those of A and B, if there are any."""
        self.adapted.add_gradients_(lambda rows: self.adapted.rows(rows).sub_(goal.read(rows)).mul_(lam))

    def move_(self, goal: Goal, share: float) -> None:
        """Brings W that share of the way on which W + s BA would be the goal."""
        self.adapted.move_(lambda rows: self.adapted.rows(rows).sub_(goal.read(rows)).mul_(-share))

    def priced(self, squares: Tensor, optimizer: Optimizer) -> Tensor:
        """v * squares, in place; v is 1 where the optimizer has no second moments."""
        factors = self.adapted.factors
        of_A, of_B = _second(factors.A, optimizer), _second(factors.B, optimizer)
        if of_A is None or of_B is None:
            return squares
        rows, columns = of_B.mean(-1, keepdim=True), of_A.mean(-2, keepdim=True)  # (out, 1), (1, in)
        mean = columns.mean(-1, keepdim=True)
        return squares.mul_(rows).mul_(torch.where(mean > 0, columns / mean, 1.0))  # 0: B was zero until now


def _second(parameter: Tensor, optimizer: Optimizer) -> Tensor | None:
    return optimizer.state.get(parameter, {}).get("exp_avg_sq")
