"""ELSA: ADMM on the training loss, weights are pulled to a sparse copy that is chosen anew (Lee et al. 2026)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import keep_allocated, without_inputs
from prunus.layers import parameter_shapes
from prunus.masks import Masks
from prunus.patterns import check_sparsity, parse
from prunus.score import Allocation, Count, Scores, uniform
from prunus.train import During, Plan


class ELSA(During):
    """The alternating direction method of multipliers around training itself: dense weights w, a sparse copy z.

        minimise L(w) + lam / 2 * ||w - z + u||^2,  z sparse        (u: the scaled multipliers)
        every step:              g + lam * (w - z + u) is given to the optimizer, after clipping
        every `interval` steps:  z = P(w + u),  u += w - z          P keeps the best of v * (w + u)^2

    v is Adam's second moment (of other optimizers 1): an entry costs what the loss, as far as Adam knows its curvature,
    loses with it. Weights outside P are pulled to zero ever harder while L says otherwise, and come back where it does
    not give in. At the start z = P(w) and u = 0; at the end w = P(w).

    Since u = (w + u) - z, z lives on what P keeps and u on what it prunes. So both are held in one tensor, z - u, which
    is what w is pulled to.

    bits: of an entry of that tensor: 32 (as the weights are), 16 (bfloat16), or 8, whole numbers of a step that up to
    128 neighbours share. What is smaller than half a step is lost; the masks are exact as ever.

    pattern: where zeros may lie: unstructured, N:M, block RxC. allocation: how the zeros are shared out, by shapes or
    scores; of patterns that leave it open. lam is meant for clipped gradients (norm 1) and Adam.
    Source: Lee et al., "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM" (ICLR 2026).
    Raises ValueError for a sparsity outside [0, 1) or beside the pattern's, lam <= 0, interval < 1, an allocation that
    looks at inputs, bits that are none of the three, and (in `attach`) layers that the pattern does not fit.

    >>> elsa, optimizer = ELSA(0.7, interval=8), torch.optim.Adam(model.parameters(), lr=1e-3)
    >>> trace = train(model, batches, optimizer, lambda step: 1 - step / 20, steps=20, clip=1.0, during=[elsa])
    >>> masks = elsa.finish()
    """

    def __init__(
        self,
        sparsity: float,
        *,
        pattern: str = "unstructured",
        lam: float = 0.01,
        interval: int = 32,
        bits: Literal[8, 16, 32] = 32,
        allocation: Allocation | Count = uniform,
    ) -> None:
        super().__init__()
        self.pattern = parse(pattern, "layer")
        self.sparsity = check_sparsity(self.pattern, sparsity)
        if not 0 < lam < float("inf") or interval < 1:
            raise ValueError(f"ELSA needs lam > 0 and interval >= 1; got {lam=}, {interval=}")
        if bits not in (8, 16, 32):
            raise ValueError(f"ELSA holds its state in 8, 16 or 32 bits; got {bits=}")
        self.lam, self.interval, self.bits, self.allocation = lam, interval, bits, without_inputs(allocation)

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Choose the first sparse copy."""
        self.hold_masks(model, optimizer, plan.views)
        self.views, self.shapes = plan.views, parameter_shapes(dict(model.named_parameters()), plan.views)
        weights = self._weights()
        self.set_masks_(self._best(weights))
        self.goals = nn.ModuleList(_Goal(weight, self.bits) for weight in weights.values())
        for goal, weight, mask in zip(self._goals(), weights.values(), self.held().values(), strict=True):
            goal.write_(torch.where(mask, weight, 0.0))

    @torch.no_grad()
    def gradients(self) -> None:
        """Add lam * (w - z + u)."""
        goals, pairs = dict(zip(self.pruned_parameters, self._goals(), strict=True)), self.gradients_of()
        if self.bits < 32:  # one at a time: all of them at once would be as large as what is saved
            for name, (weight, grad) in pairs.items():
                grad.add_(weight - goals[name].read(), alpha=self.lam)
            return
        away = torch._foreach_sub([weight for weight, _ in pairs.values()], [goals[name].read() for name in pairs])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_([grad for _, grad in pairs.values()], away, alpha=self.lam)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Choose the sparse copy anew and move the multipliers, when it is time."""
        if (step + 1) % self.interval:
            return
        both = {  # w + u
            name: weight - goal.read().masked_fill(mask, 0.0)
            for (name, weight), mask, goal in zip(
                self._weights().items(), self.held().values(), self._goals(), strict=True
            )
        }
        self.set_masks_(self._best(both))
        for mask, goal, each in zip(self.held().values(), self._goals(), both.values(), strict=True):
            goal.write_(torch.where(mask, each, -each))

    def finish(self) -> Masks:
        """Keep P(w)."""
        self.set_masks_(self._best(self._weights()))
        self.enforce_()
        return self.masks()

    def _goals(self) -> list[_Goal]:
        return [goal for goal in self.goals if isinstance(goal, _Goal)]

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.pruned_parameters.items()}

    @torch.no_grad()
    def _best(self, values: Mapping[str, Tensor]) -> Masks:
        """The masks of P: of the largest v * value^2."""
        sizes: dict[str, Tensor] = {}
        for name, value in values.items():
            second = self.optimizer.state.get(self.pruned_parameters[name], {}).get("exp_avg_sq")
            square = value.float().square()
            sizes[name] = square if second is None else square.mul_(second)
        scores = Scores({view.name: view.matrix(sizes[view.parameter]) for view in self.views}, self.shapes)
        chosen = keep_allocated(scores, self.sparsity, self.allocation, self.pattern)
        return Masks.of(self.views, chosen, {name: value.shape for name, value in values.items()})


class _Goal(nn.Module):
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

    def read(self) -> Tensor:
        """What was written, but for rounding."""
        if self.held.dtype == torch.int8:
            return (self.held * self.step).view(self.shape).to(self.dtype)
        return self.held.to(self.dtype)

    def write_(self, values: Tensor) -> None:
        """Hold other values."""
        if self.held.dtype == torch.int8:
            rows = values.float().reshape(self.held.shape)
            self.step.copy_(rows.abs().amax(1, keepdim=True).div_(127))
            values = torch.where(self.step > 0, rows / self.step, 0.0).round_()
        self.held.copy_(values)
