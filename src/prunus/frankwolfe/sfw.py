"""Stochastic Frank-Wolfe: an optimizer that keeps parameters inside feasible sets without ever projecting.

    m <- beta m + (1 - d) g        momentum; at the first step m = g
    v  = argmin over the set of <m, v>                        `sets.Ball.lmo`
    x <- x + s (v - x),  s = clamp(factor * lr, 0, 1)         (Pokutta, Spiegel, Zimmer 2020)

    rescale  none 1   diameter 1/D   gradient ||m|| / ||x - v||   fast_gradient ||m|| / (D/2)        D: L2 diameter

A convex combination of two points of a convex set is in it, so what starts inside stays inside. In most sets v has norm
D/2, and then fast_gradient is an SGD step of length lr ||m|| towards v with weight decay 2 ||m|| / D; for the L2 ball
it is exactly x <- (1 - 2 lr ||m|| / D) x - lr m. Published code leaves d = 0 (m adds up gradients, and grows to up to
1/(1 - beta) of one); d = beta averages them. With the gradient rescalings the two differ by that factor in the
learning rate.

The feasible sets are in `sets/`; which parameters of a network are in which set is said by `constrained`.
"""

# pyright: reportPrivateImportUsage=false
# (torch's own optimizers are made of its _foreach functions, which it does not export)

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from prunus.frankwolfe.sets.ball import Ball
from prunus.frankwolfe.sets.fused import FusedMoves, is_fused
from prunus.frankwolfe.sets.problems import Part, Problems, joint_problem, separate_problems
from prunus.frankwolfe.sets.subspace import COLD, Triple, follow_, make_basis

Rescale = Literal["none", "diameter", "gradient", "fast_gradient"]
_TINY = 1e-30


class SFW(Optimizer):
    """Stochastic Frank-Wolfe for groups with a `constraint`, SGD for groups without (None).

    params: parameters or groups, as for any torch optimizer. Options, all of which a group may set for itself:
    constraint: a `Ball` for each parameter by itself, a list of balls (one a parameter, in order), or None;
    joint: the group's parameters are one point of the one ball; rescale, momentum, dampening: see the module;
    iterations: of the subspace iteration that follows leading singular vectors, for spectral sets;
    weight_decay (added to the gradient, as in SGD) and decoupled_decay (x <- (1 - lr * decay) x, as in AdamW; the
    papers' released code leaves lr out), both for unconstrained groups only;
    capturable: lets `train(capture=True)` record the step. The learning rate may be a number or a tensor either way.

    Parameters without a gradient stay as they are; under a joint constraint the others move as if these did not exist.
    Equal sizes are handled at once, nothing waits for the device, and singular vectors are state. State dicts do not
    hold the constraints: those of the optimizer that loads one stay. Raises ValueError for options out of range, balls
    that do not fit the parameters, weight decay with a constraint, sparse gradients.

    >>> layer = nn.Linear(8, 4, bias=False)
    >>> optimizer = SFW(layer.parameters(), lr=0.1, constraint=k_support(0.3, radius=10.0), rescale="fast_gradient")
    >>> optimizer.start_()
    >>> layer(torch.ones(1, 8)).sum().backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        *,
        constraint: Ball | Sequence[Ball] | None = None,
        joint: bool = False,
        rescale: Rescale = "none",
        momentum: float = 0.9,
        dampening: float = 0.0,
        iterations: int = 1,
        weight_decay: float = 0.0,
        decoupled_decay: float = 0.0,
        capturable: bool = False,
    ) -> None:
        self._plans: dict[int, _Plan] = {}
        self._fused: dict[int, FusedMoves] = {}
        defaults: dict[str, Any] = {
            "lr": lr,
            "constraint": constraint,
            "joint": joint,
            "rescale": rescale,
            "momentum": momentum,
            "dampening": dampening,
            "iterations": iterations,
            "weight_decay": weight_decay,
            "decoupled_decay": decoupled_decay,
            "capturable": capturable,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any torch optimizer; checks the group's options."""
        _check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["constraint"] is not None:
            _problems_of(group, range(len(group["params"])))  # refuses sets that do not fit

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
        work: list[_Work] = []
        for number, group in enumerate(self.param_groups):
            places = _with_gradients(group)
            if not places:
                continue
            present = [group["params"][place] for place in places]
            directions = self._directions(group, present)
            if group["constraint"] is None:
                _descend_(present, directions, group["lr"], group["decoupled_decay"])
                continue
            problems = self._move_fused_(number, places, present, directions)
            work += [_Work(group, each, present, each.gather(directions, present)) for each in problems]
        for each, leading in zip(work, self._leading(work), strict=True):
            vertices = each.problems.vertices(each.moments, leading)
            share = _share(each, vertices)
            each.problems.move_(each.present, vertices, share[:, None, None])
            self._note_left([each.problems], each.present, share)
        return loss

    @torch.no_grad()
    def start_(self) -> None:
        """Scale those parameters of constrained groups that are outside their sets down to the border."""
        for number, group in enumerate(self.param_groups):
            if group["constraint"] is None:
                continue
            for problems in self._problems(number, tuple(range(len(group["params"])))):
                for ball, tensors in problems.balls(group["params"]):
                    torch._foreach_copy_(tensors, list(ball.start(tensors)))

    @torch.no_grad()
    def gaps(self) -> list[Tensor]:
        """The Frank-Wolfe gap <m, x - v> of each constrained group, with exact v: scalars, on the groups' devices.

        m: the momentum as the last step left it, also when gradients are gone; a group without either is left out. At
        least 0 for feasible x, and 0 where x is stationary. For reports: v is computed anew, for spectral sets by full
        singular value decompositions.
        """
        found: list[Tensor] = []
        for number, group in enumerate(self.param_groups):
            places = _with_gradients(group) or self._with_momentum(group)
            if group["constraint"] is None or not places:
                continue
            present = [group["params"][place] for place in places]
            known = [self.state[parameter].get("momentum_buffer", parameter.grad) for parameter in present]
            total = torch.zeros((), device=present[0].device)
            for problems in self._problems(number, places):
                points, moments = problems.gather(present, present), problems.gather(known, present)
                vertices = problems.vertices(moments)
                total = total + _dot(moments, [x - v for x, v in zip(points, vertices, strict=True)]).sum()
            found.append(total)
        return found

    def left(self) -> float | None:
        """How much of the start is left: prod (1 - s) over all steps, a mean over the constrained entries.

        A point is that share of where it began and for the rest a mean of vertices. None before the first step. Waits
        for the device.
        """
        moved = [p for group in self.param_groups for p in group["params"] if "left" in self.state[p]]
        if not moved:
            return None
        entries = sum(parameter.numel() for parameter in moved)
        return sum(self.state[parameter]["left"].item() * parameter.numel() for parameter in moved) / entries

    def state_dict(self) -> dict[str, Any]:
        """As for any torch optimizer, without the constraints."""
        packed = super().state_dict()
        for group in packed["param_groups"]:
            group.pop("constraint")
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As for any torch optimizer; the constraints are those that this optimizer has."""
        own = [group["constraint"] for group in self.param_groups]
        saved = state_dict["param_groups"]
        if len(own) != len(saved):
            raise ValueError(f"This optimizer has {len(own)} groups, the state dict {len(saved)}: it is another's")
        groups = [{**group, "constraint": constraint} for group, constraint in zip(saved, own, strict=True)]
        super().load_state_dict({**state_dict, "param_groups": groups})
        for group, constraint, was in zip(self.param_groups, own, saved, strict=True):
            group["constraint"] = constraint  # not the copy that torch made
            for parameter, number in zip(group["params"], was["params"], strict=True):
                stored = state_dict["state"].get(number, {})
                for key in stored.keys() & {"basis", "left"}:  # torch cast them to the weight's dtype
                    self.state[parameter][key] = stored[key].to(parameter.device, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._plans, self._fused = {}, {}

    def _directions(self, group: dict[str, Any], present: list[Tensor]) -> list[Tensor]:
        """The momentum buffers, moved on; or the gradients if there is no momentum."""
        gradients: list[Tensor] = [parameter.grad for parameter in present]  # pyright: ignore[reportAssignmentType]
        if any(gradient.is_sparse for gradient in gradients):
            raise ValueError("SFW takes dense gradients; make the embedding with sparse=False")
        if group["weight_decay"]:
            gradients = list(torch._foreach_add(gradients, present, alpha=group["weight_decay"]))
        if not group["momentum"]:
            return gradients
        pairs = zip(present, gradients, strict=True)
        old = [(self.state[x]["momentum_buffer"], g) for x, g in pairs if "momentum_buffer" in self.state[x]]
        if old:
            moved = [buffer for buffer, _ in old]
            torch._foreach_mul_(moved, group["momentum"])
            torch._foreach_add_(moved, [gradient for _, gradient in old], alpha=1 - group["dampening"])
        if len(old) < len(present):
            for parameter, gradient in zip(present, gradients, strict=True):
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = gradient.clone()
        return [self.state[parameter]["momentum_buffer"] for parameter in present]

    def _with_momentum(self, group: dict[str, Any]) -> tuple[int, ...]:
        pairs = enumerate(group["params"])
        return tuple(place for place, each in pairs if "momentum_buffer" in self.state.get(each, {}))

    def _problems(self, number: int, places: tuple[int, ...]) -> list[Problems]:
        """How a group's parameters are put together; kept until others have gradients or the constraint is another."""
        group, known = self.param_groups[number], self._plans.get(number)
        if known is None or known.constraint is not group["constraint"] or known.places != places:
            known = _Plan(group["constraint"], places, _problems_of(group, places))
            self._plans[number] = known
        return known.problems

    def _move_fused_(
        self, number: int, places: tuple[int, ...], present: list[Tensor], moments: list[Tensor]
    ) -> list[Problems]:
        """Move those of a group's problems that programs move at once; returns the others."""
        group, problems = self.param_groups[number], self._problems(number, places)
        if group["rescale"] == "gradient" or not group["momentum"]:  # gradients lie elsewhere each time
            return problems
        chosen = [each for each in problems if is_fused(each, present, moments)]
        chosen = [each for each in chosen if each.radius.device == chosen[0].radius.device]
        if chosen:
            known = self._fused.get(number)
            if known is None or not known.fits(chosen, present, moments):
                known = self._fused[number] = FusedMoves(chosen, present, moments)
            self._note_left(chosen, present, known.move_(present, group["lr"], group["rescale"]))
        return [each for each in problems if not any(each is other for other in chosen)]

    def _note_left(self, moved: Sequence[Problems], present: Sequence[Tensor], share: Tensor) -> None:
        """Multiply what is left of the start by 1 - share, (problems,) of all that moved, in their order."""
        places = [place for problems in moved for part in problems.parts for place in part.places]
        for state in (self.state[present[place]] for place in places):
            if "left" not in state:
                state["left"] = torch.ones((), device=share.device)
        factors = (1 - share).float().expand(len(places)).unbind()  # a joint constraint moves all by one share
        torch._foreach_mul_([self.state[present[place]]["left"] for place in places], factors)

    def _leading(self, work: Sequence[_Work]) -> list[list[Triple] | None]:
        """For each work the leading singular vectors of its moments, where its set needs some; None elsewhere.

        They are those of the last step, turned. All are followed in step, because their factorisations are small and
        there are few kinds of them.
        """
        found: list[list[Triple] | None] = [None] * len(work)
        todo: dict[int, list[tuple[int, list[Tensor], Tensor]]] = {}  # iterations -> place in work, state, moments
        for place, each in enumerate(work):
            widths = each.problems.widths()
            if widths is None:
                continue
            found[place] = []
            for part, width, moment in zip(each.problems.parts, widths, each.moments, strict=True):
                kept, fresh = self._bases(part, width, each.present)
                iterations = max(each.group["iterations"], COLD if fresh else 1)
                todo.setdefault(iterations, []).append((place, kept, moment))
        for iterations, parts in todo.items():
            stacks = [torch.cat(kept).to(moment.dtype) for _, kept, moment in parts]
            triples = follow_(stacks, [moment for _, _, moment in parts], iterations)
            torch._foreach_copy_(
                [each for _, kept, _ in parts for each in kept], [each for stack in stacks for each in stack.split(1)]
            )
            for (place, _, _), triple in zip(parts, triples, strict=True):
                mine = found[place]
                assert mine is not None
                mine.append(triple)
        return found

    def _bases(self, part: Part, width: int, present: Sequence[Tensor]) -> tuple[list[Tensor], bool]:
        """The singular vectors kept for the tensors of a part, and whether some were made just now."""
        fresh = False
        for seed, place in enumerate(part.places):
            if "basis" not in self.state[present[place]]:
                # Three dimensions: never of the shape of a matrix, whose masks would be applied to it.
                made = make_basis(1, *part.key, width, device=present[place].device, seed=seed)
                self.state[present[place]]["basis"], fresh = made, True
        return [self.state[present[place]]["basis"] for place in part.places], fresh


@dataclass(frozen=True)
class _Work:
    """What a step does to some parameters of a group: their problems, and their momentum as these see it."""

    group: dict[str, Any]
    problems: Problems
    present: list[Tensor]
    moments: list[Tensor]


@dataclass(frozen=True)
class _Plan:
    """The problems of a group, for one constraint and the parameters (by place) that have gradients."""

    constraint: Ball | Sequence[Ball]
    places: tuple[int, ...]
    problems: list[Problems]


def _with_gradients(group: dict[str, Any]) -> tuple[int, ...]:
    return tuple(place for place, parameter in enumerate(group["params"]) if parameter.grad is not None)


def _problems_of(group: dict[str, Any], places: Iterable[int]) -> list[Problems]:
    chosen = list(places)
    tensors, constraint = [group["params"][place] for place in chosen], group["constraint"]
    if group["joint"]:
        return [joint_problem(constraint, tensors)]
    if isinstance(constraint, Ball):
        return separate_problems([constraint] * len(chosen), tensors)
    if len(constraint) != len(group["params"]):
        raise ValueError(
            f"{len(constraint)} balls for {len(group['params'])} parameters: give one for each, or one Ball"
        )
    return separate_problems([constraint[place] for place in chosen], tensors)


def check_rates(group: dict[str, Any], *names: str) -> None:
    """Raise ValueError for one of these options of a group that is below 0, or NaN."""
    for name in names:
        if not float(group[name]) >= 0:
            raise ValueError(f"{name} is at least 0; got {float(group[name])}")


def _check_group(group: dict[str, Any]) -> None:
    check_rates(group, "lr", "weight_decay", "decoupled_decay")
    if group["rescale"] not in get_args(Rescale):
        raise ValueError(f"rescale is one of {', '.join(get_args(Rescale))}; got {group['rescale']!r}")
    if not (0 <= group["momentum"] < 1 and 0 <= group["dampening"] <= 1):
        raise ValueError(
            f"momentum lies in [0, 1) and dampening in [0, 1]; got {group['momentum']} and {group['dampening']}"
        )
    if group["iterations"] < 1:
        raise ValueError(f"iterations of the subspace iteration are at least 1; got {group['iterations']}")
    if group["constraint"] is not None and (group["weight_decay"] or group["decoupled_decay"]):
        raise ValueError("A constrained group shrinks by its set and takes no weight decay: set its decay to 0")
    if group["joint"] and not isinstance(group["constraint"], Ball):
        raise ValueError(f"joint=True needs one Ball for the whole group; got {type(group['constraint']).__name__}")


def _share(work: _Work, vertices: Sequence[Tensor]) -> Tensor:
    """How far each problem moves towards its vertex, (problems,) in [0, 1]."""
    problems, rescale, lr = work.problems, work.group["rescale"], work.group["lr"]
    if rescale == "none":
        factor = torch.ones_like(problems.half)
    elif rescale == "diameter":
        factor = 0.5 / problems.half
    elif rescale == "fast_gradient":
        factor = _length(work.moments) / problems.half
    else:
        points = problems.gather(work.present, work.present)
        apart = [x - v for x, v in zip(points, vertices, strict=True)]
        factor = _length(work.moments) / _length(apart).clamp_min(_TINY)
    return (factor * lr).clamp(0, 1)


def _length(parts: Sequence[Tensor]) -> Tensor:
    """The L2 norm of each problem, (problems,)."""
    norms = [torch.linalg.vector_norm(part.flatten(1), dim=1) for part in parts]
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), dim=0)


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """The inner product of each problem, (problems,)."""
    products = [torch.linalg.vecdot(a.flatten(1), b.flatten(1)) for a, b in zip(one, other, strict=True)]
    return products[0] if len(products) == 1 else torch.stack(products).sum(0)


def _descend_(parameters: list[Tensor], directions: list[Tensor], lr: float | Tensor, decay: float) -> None:
    """An SGD step; the learning rate may be a tensor on the device."""
    if decay:
        torch._foreach_mul_(parameters, 1 - lr * decay)
    torch._foreach_sub_(parameters, torch._foreach_mul(directions, lr))
