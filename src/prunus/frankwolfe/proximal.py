"""The relatives of Frank-Wolfe that pull weights towards structure: proximal SGD, and penalties on the loss.

    nuclear norm   prox_t(W) = U (S - t)+ V^T                  penalty l * sum over layers ||W||_*
    group lasso    prox_t(w_g) = (1 - t / ||w_g||_2)+ w_g      penalty l * sum over layers and filters ||W_f||_2

A proximal step makes exact zeros (singular values, whole filters), a penalty only small ones. In both, t and l weigh a
group by its norm alone, without the factor sqrt(size) of some texts. Decoupled weight decay is an option of `SFW`.
"""

# pyright: reportPrivateImportUsage=false
# (torch's own optimizers are made of its _foreach functions, which it does not export)

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.frankwolfe.sets.protocol import matrix_of
from prunus.frankwolfe.sfw import check_rates
from prunus.layers import View
from prunus.train import During, Plan, unrecorded

Proximal = Literal["nuclear", "groups"]
_TINY = 1e-30


@torch.no_grad()
def shrink_singular_values(matrix: Tensor, threshold: float | Tensor) -> Tensor:
    """The matrix (..., out, in) with its singular values s replaced by max(s - threshold, 0).

    This is argmin over X of ||X - W||_F^2 / 2 + threshold ||X||_*. Computed in float32, or float64 for float64; a full
    decomposition, for which the host waits for a GPU.

    >>> shrink_singular_values(torch.diag(torch.tensor([3.0, 1.0])), 2.0).diagonal()
    tensor([1., 0.])
    """
    u, s, vt = torch.linalg.svd(_wide(matrix), full_matrices=False)
    return ((u * (s - threshold).clamp_min(0)[..., None, :]) @ vt).to(matrix.dtype)


@torch.no_grad()
def shrink_groups(matrix: Tensor, threshold: float | Tensor) -> Tensor:
    """The matrix (..., out, in) with every row shortened by the threshold, or zero where it was no longer than that.

    This is argmin over X of ||X - W||_F^2 / 2 + threshold * (sum of row norms). Computed in float32, or float64 for
    float64.

    >>> shrink_groups(torch.tensor([[3.0, 4.0], [0.6, 0.8]]), 2.0)
    tensor([[1.8000, 2.4000],
            [0.0000, 0.0000]])
    """
    wide = _wide(matrix)
    norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    factor = torch.where(norms > threshold, 1 - threshold / norms.clamp_min(1e-30), torch.zeros_like(norms))
    return (wide * factor).to(matrix.dtype)


class ProximalSGD(Optimizer):
    """SGD, then the proximal step of lr * strength on every weight of two or more dimensions.

        x <- prox_(lr * strength)(x - lr m),  m <- momentum m + g + weight_decay x

    Options, all of which a group may set for itself: strength (0: plain SGD, for what is not to be shrunk); proximal:
    "nuclear" (a singular value decomposition of each matrix in every step; equal shapes together) or "groups" (rows:
    filters, neurons); momentum, weight_decay; capturable: lets `train(capture=True)` record the step, for "groups" only
    because decompositions wait for the device. Vectors (biases, norms) are not shrunk.
    Raises ValueError for options out of range.

    >>> optimizer = ProximalSGD(model.parameters(), lr=0.1, proximal="groups", strength=1e-3)
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        proximal: Proximal,
        strength: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "proximal": proximal,
            "strength": strength,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any torch optimizer; checks the group's options."""
        group = {**self.defaults, **param_group}
        if group["proximal"] not in ("nuclear", "groups"):
            raise ValueError(f"proximal is nuclear or groups; got {group['proximal']!r}")
        check_rates(group, "lr", "strength", "weight_decay")
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum lies in [0, 1); got {group['momentum']}")
        if group["capturable"] and group["proximal"] == "nuclear" and group["strength"]:
            raise ValueError(
                "The nuclear proximal step decomposes matrices, which cannot be captured: capturable=False"
            )
        super().add_param_group(param_group)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every group; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            present: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            if present:
                torch._foreach_sub_(present, torch._foreach_mul(self._directions(group, present), group["lr"]))
                _shrink_(group, present)
        return loss

    def _directions(self, group: dict[str, Any], present: list[Tensor]) -> list[Tensor]:
        gradients: list[Tensor] = [parameter.grad for parameter in present]  # pyright: ignore[reportAssignmentType]
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, present, alpha=group["weight_decay"]))
        if not group["momentum"]:
            return gradients
        buffers: list[Tensor] = []
        for parameter in present:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, gradients)
        return buffers


class _Pull(During):
    """What pulls on `views`, or all prunable weights of the run, with a strength."""

    def __init__(self, strength: float, views: Sequence[View] | None = None) -> None:
        super().__init__()
        if not strength >= 0:
            raise ValueError(f"{type(self).__name__}'s strength is at least 0; got {strength}")
        self.strength, self.views = strength, views

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Find the prunable weights; raises ValueError when there are none."""
        views = plan.views if self.views is None else self.views
        if not views:
            raise ValueError(f"{type(self).__name__} found no prunable layer; check include and exclude")
        parameters = dict(model.named_parameters())
        self.weighed = [(view, parameters[view.parameter]) for view in views]
        self.optimizer = optimizer


class GroupLasso(_Pull):
    """The penalty strength * sum over layers and filters of ||W_f||_2, on `views`, or all prunable weights of the run.

    >>> trace = train(model, batches, optimizer, lr, steps=10, during=[GroupLasso(1e-4)])
    """

    def penalty(self) -> Tensor:
        """The penalty, a scalar; its gradient is 0, one of the subgradients, for a filter of zeros."""
        norms = [torch.linalg.vector_norm(view.matrix(weight).float(), dim=1).sum() for view, weight in self.weighed]
        return self.strength * torch.stack(norms).sum()


class _NuclearPull(_Pull):
    """One that decomposes the weights every so many steps."""

    def __init__(self, strength: float, views: Sequence[View] | None = None, *, every: int = 1) -> None:
        super().__init__(strength, views)
        if every < 1:
            raise ValueError(f"{type(self).__name__} decomposes every so many steps, at least 1; got every={every}")
        self.every = every


class NuclearNorm(_NuclearPull):
    """The penalty strength * sum over layers (`views`, or all that the run may prune) of ||W||_*, by its subgradient.

    That is U V^T, 0 where a singular value is less than 1e-6 of the largest. It is renewed before every `every`-th step
    and added to the gradients of all; the paper has every=1. The decompositions are outside the step, which can
    therefore be captured, and are those of the smaller Gram matrix in float64.

    >>> trace = train(model, batches, optimizer, lr, steps=10, during=[NuclearNorm(1e-4, every=5)])
    """

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Find the prunable weights; raises ValueError when there are none."""
        super().attach(model, optimizer, plan)
        self.kept = nn.Module()
        for place, (_, weight) in enumerate(self.weighed):
            self.kept.register_buffer(f"direction{place}", torch.zeros_like(weight, requires_grad=False))

    @torch.no_grad()
    def before_step(self, step: int) -> None:
        """Renew the subgradient when it is time."""
        if step % self.every == 0:
            with unrecorded():
                for (view, weight), direction in zip(self.weighed, self.kept.buffers(), strict=True):
                    view.write_(direction, _rescaled(view.matrix(weight), _inverse))

    @torch.no_grad()
    def gradients(self) -> None:
        """Add it to the gradients."""
        pairs = zip(self.weighed, self.kept.buffers(), strict=True)
        chosen = [(weight.grad, direction) for (_, weight), direction in pairs if weight.grad is not None]
        if chosen:
            found, added = [grad for grad, _ in chosen], [direction for _, direction in chosen]
            torch._foreach_add_(found, added, alpha=self.strength)


class NuclearSteps(_NuclearPull):
    """Proximal steps of the nuclear norm beside any optimizer: that of every * lr * strength, after `every` steps each.

    lr: of the weight's group; a weight that the optimizer does not train stays as it is.
    With every=1 and SGD it is `ProximalSGD`, which is what the paper compares with; a larger `every` saves time.
    Decompositions are outside the step, which can therefore be captured, and are those of the smaller Gram matrix in
    float64. Entries that are exactly zero stay so: masks hold within the step, and nothing would zero them again.

    >>> trace = train(model, batches, optimizer, lr, steps=10, during=[NuclearSteps(1e-2, every=5)])
    """

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Shrink the singular values when it is time."""
        if (step + 1) % self.every:
            return
        groups = self.optimizer.param_groups
        rates = {id(each): group["lr"] for group in groups for each in group["params"] if each.requires_grad}
        with unrecorded():
            for view, weight in self.weighed:
                if id(weight) in rates:
                    _shorten_(view, weight, self.every * self.strength * rates[id(weight)])


def _shorten_(view: View, weight: Tensor, threshold: float | Tensor) -> None:
    matrix = view.matrix(weight)
    found = _rescaled(matrix, lambda s: (1 - threshold / s.clamp_min(_TINY)).clamp_min(0))
    view.write_(weight, found.masked_fill(matrix == 0, 0.0))


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _rescaled(matrix: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """U diag(s * factor(s)) V^T, the singular values from the smaller Gram matrix in float64.

    They are exact to about 1e-8 of the largest. The host waits for a GPU.
    """
    wide = (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).double()
    squares, u = torch.linalg.eigh(wide @ wide.mT)
    found = (u * factor(squares.clamp_min(0).sqrt())) @ (u.mT @ wide)
    return found if matrix.shape[0] <= matrix.shape[1] else found.mT


def _inverse(s: Tensor) -> Tensor:
    return torch.where(s > 1e-6 * s.amax(), 1 / s.clamp_min(_TINY), torch.zeros_like(s))


def _shrink_(group: dict[str, Any], present: list[Tensor]) -> None:
    """The proximal step of the matrices, equal shapes together."""
    if not group["strength"]:
        return
    shapes: dict[object, list[Tensor]] = {}
    for parameter in present:
        if parameter.ndim > 1:
            shapes.setdefault((matrix_of(tuple(parameter.shape)), parameter.dtype, parameter.device), []).append(
                parameter
            )
    shrink = shrink_singular_values if group["proximal"] == "nuclear" else shrink_groups
    for chosen in shapes.values():
        shrunk = shrink(torch.stack([parameter.flatten(1) for parameter in chosen]), group["lr"] * group["strength"])
        values = [each.view(parameter.shape) for each, parameter in zip(shrunk, chosen, strict=True)]
        torch._foreach_copy_(chosen, values)
