"""ELSA: ADMM on the training loss, weights are pulled to a sparse copy that is chosen anew (Lee et al. 2026)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import keep_allocated, without_inputs
from prunus.during.variable import Goal, LowRank, Whole
from prunus.layers import Lookup, View, parameter_shapes
from prunus.machine import imported
from prunus.masks import Masks
from prunus.patterns import check_sparsity, parse
from prunus.score import Allocation, Count, Scores, limited, uniform
from prunus.train import During, Plan

if TYPE_CHECKING:
    from prunus.adapt import Adapted

_LAM, _MOVE = 0.01, 0.5


class ELSA(During):
    """The alternating direction method of multipliers around training itself: dense weights w, a sparse copy z.

        minimise L(w) + lam / 2 * ||w - z + u||^2,  z sparse        (u: the scaled multipliers)
        every step:              g + lam * (w - z + u) is given to the optimizer, after clipping
        every `interval` steps:  z = P(w + u),  u += w - z          P keeps the best of v * (w + u)^2

    v is Adam's second moment (of other optimizers 1): an entry costs what the loss, as far as Adam knows its curvature,
    loses with it. Weights outside P are pulled to zero ever harder while L says otherwise, and come back where it does
    not give in. At the start z = P(w) and u = 0; at the end w = P(w).

    Since u = (w + u) - z, z lives on what P keeps and u on what it prunes. So both are held in one tensor, z - u, which
    is what w is pulled to, and a bit an entry says which it is.

    bits: of an entry of that tensor: 32 (as the weights are), 16 (bfloat16), or 8, whole numbers of a step that up to
    128 neighbours share. What is smaller than half a step is lost; the masks are exact as ever.

    Of a model with LoRA (`adapt(model, ["lora"], ...)`, and the same views for `train`) w = W + s BA is pruned, and L
    is evaluated there, but only A and B are trained: no gradient and no moment of the size of W exists. BA of low rank
    cannot make w sparse, and u would grow for ever. But the gradient of the pull by W itself is the pull, which asks
    for no backward pass. So the two parts of L + lam / 2 ||.||^2 go to different variables, as in decoupled decay:

        every step:              A and B follow L, and lam * (w - z + u) by the chain rule, if lam > 0
        every `interval` steps:  W -= move * (w - z + u)            then z and u as above

    and w becomes as sparse as z. At the end BA is added to W, so that merging adds nothing. v is of rank one there
    (`variable.LowRank`), from the moments of A and B.

    pattern: where zeros may lie: unstructured, N:M, block RxC. allocation: how the zeros are shared out, by shapes or
    scores; of patterns that leave it open. lam: 0.01 if left out, of LoRA 0; it is meant for clipped gradients (norm 1)
    and Adam. move: of LoRA alone, 0.5 if left out; 0 leaves W as it is.
    Source: Lee et al., "The Unseen Frontier: Pushing the Limits of LLM Sparsity with Surrogate-Free ADMM" (ICLR 2026),
    for weights that are trained; LoRA is ours.
    Raises ValueError for a sparsity outside [0, 1) or beside the pattern's, lam < 0, interval < 1, an allocation that
    looks at inputs, bits that are none of the three, move outside [0, 1], nothing that pulls, and (in `attach`) layers
    that the pattern does not fit, or some of which have no LoRA where others have one.

    >>> elsa, optimizer = ELSA(0.7, interval=8), torch.optim.Adam(model.parameters(), lr=1e-3)
    >>> trace = train(model, batches, optimizer, lambda step: 1 - step / 20, steps=20, clip=1.0, during=[elsa])
    >>> masks = elsa.finish()
    """

    def __init__(
        self,
        sparsity: float,
        *,
        pattern: str = "unstructured",
        lam: float | None = None,
        interval: int = 32,
        bits: Literal[8, 16, 32] = 32,
        move: float | None = None,
        allocation: Allocation | Count = uniform,
    ) -> None:
        super().__init__()
        self.pattern = parse(pattern, "layer")
        self.sparsity = check_sparsity(self.pattern, sparsity)
        if (lam is not None and not 0 <= lam < float("inf")) or interval < 1:
            raise ValueError(f"ELSA needs lam > 0 and interval >= 1; got {lam=}, {interval=}")
        if bits not in (8, 16, 32):
            raise ValueError(f"ELSA holds its state in 8, 16 or 32 bits; got {bits=}")
        if move is not None and not 0 <= move <= 1:
            raise ValueError(f"ELSA moves frozen weights by a share of their way, in [0, 1]; got {move=}")
        if not lam and move == 0:
            raise ValueError(f"nothing pulls weights to zero: give lam > 0, or move > 0; got {lam=}, {move=}")
        self.lam, self.interval, self.bits, self.allocation = lam, interval, bits, without_inputs(allocation)
        self.move = move

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Choose the first sparse copy."""
        found = _adapters(model, plan.views)
        parameters = {name: each.parameter for name, each in found.items()}
        self.hold_masks(model, optimizer, plan.views, within=plan.masks, adapted=parameters, packed=True)
        self.variables = {
            name: LowRank(found[name]) if name in found else Whole(parameter)
            for name, parameter in self.pruned_parameters.items()
        }
        if not found and self.lam == 0:
            raise ValueError("lam=0 pulls no weight that is trained to zero: give lam > 0")
        if not found and self.move is not None:
            raise ValueError("move is of weights that LoRA adapts; those that are trained move anyway: leave it out")
        if self.pattern.sparsity is None:
            self.kept_at(self.sparsity)
        self.last = plan.steps - 1
        self.moved = nn.Module()  # weights that are not trained, and change all the same: a checkpoint must hold them
        for place, each in enumerate(self._low_rank().values()):
            self.moved.register_buffer(f"weight{place}", each.adapted.parameter.detach())
        self.views, self.shapes = plan.views, parameter_shapes(self.pruned_parameters, plan.views)
        self.set_masks_(self._best(self._value))
        self.goals = nn.ModuleList()
        for name, mask in self.held().items():
            value = self._value(name)
            goal = Goal(value, self.bits)
            goal.write_(torch.where(self.variables[name].own(mask), value, 0.0))
            self.goals.append(goal)

    @torch.no_grad()
    def gradients(self) -> None:
        """Add lam * (w - z + u)."""
        lam = (0.0 if self._low_rank() else _LAM) if self.lam is None else self.lam
        if not lam:
            return
        goals, pairs = self._goals(), self.gradients_of()
        if self.bits < 32 or len(pairs) < len(goals):  # one at a time: all at once would be as large as what is saved
            for name, variable in self.variables.items():
                variable.pull_(goals[name], lam)
            return
        away = torch._foreach_sub([weight for weight, _ in pairs.values()], [goals[name].read() for name in pairs])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_([grad for _, grad in pairs.values()], away, alpha=lam)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move frozen weights, choose the sparse copy anew and move the multipliers, when it is time."""
        if (step + 1) % self.interval == 0:
            self._alternate()
        if step == self.last:  # what the end takes away is then measured of w
            self._fold()

    def _alternate(self) -> None:
        for name, variable in self._low_rank().items():
            variable.move_(self._goals()[name], _MOVE if self.move is None else self.move)
        chosen, goals = self._best(self._sum), self._goals()
        for name, variable in self.variables.items():
            both = self._sum(name)
            goals[name].write_(torch.where(variable.own(chosen[name]), both, -both))
        self.set_masks_(chosen)

    @torch.no_grad()
    def finish(self) -> Masks:
        """Keep P(w)."""
        self._fold()
        self.set_masks_(self._best(self._value))
        self.enforce_()
        return self.masks()

    def _fold(self) -> None:
        for variable in self._low_rank().values():
            variable.adapted.fold_()

    def _low_rank(self) -> dict[str, LowRank]:
        return {name: each for name, each in self.variables.items() if isinstance(each, LowRank)}

    def _goals(self) -> dict[str, Goal]:
        goals = (goal for goal in self.goals if isinstance(goal, Goal))
        return dict(zip(self.variables, goals, strict=True))

    def _value(self, name: str) -> Tensor:
        """w."""
        return self.variables[name].value()

    def _sum(self, name: str) -> Tensor:
        """w + u."""
        variable = self.variables[name]
        mask = variable.own(self.held()[name])
        return variable.value() - self._goals()[name].read().masked_fill(mask, 0.0)

    @torch.no_grad()
    def _best(self, values: Callable[[str], Tensor]) -> Masks:
        """The masks of P: of the largest v * value^2, of which one layer's are in memory at a time."""
        views, last = {view.name: view for view in self.views}, dict[str, Tensor]()

        def price(name: str) -> Tensor:
            view = views[name]
            if view.parameter not in last:
                last.clear()  # frees it before another is formed
                variable = self.variables[view.parameter]
                squares = values(view.parameter).float().square()
                last[view.parameter] = variable.stored(variable.priced(squares, self.optimizer))
            return limited(view.matrix(last[view.parameter]), view, self.given)

        scores = Scores(Lookup(views, price), self.shapes)
        chosen = keep_allocated(scores, self.sparsity, self.allocation, self.pattern)
        shapes = {name: parameter.shape for name, parameter in self.pruned_parameters.items()}
        return Masks.of(self.views, chosen, shapes)


def _adapters(model: nn.Module, views: Iterable[View]) -> dict[str, Adapted]:
    """The adapters of the views' parameters. Raises ValueError for those that are not a sum, and for layers without."""
    if not any(isinstance(each, imported("prunus.adapt.adapters", "Factors")) for each in model.modules()):
        return {}
    from prunus.adapt import adapted

    found = adapted(model)
    for name in dict.fromkeys(view.parameter for view in views):
        if name not in found:
            raise ValueError(f"'{name}' is to be pruned and has no adapter: give adapt and train the same views")
        factors, weight = found[name].factors, found[name].weight
        if factors.scale is None or factors.mask is not None:
            raise ValueError(f"'{name}' has another adapter than W + s BA: train 'lora', whose masks ELSA makes")
        if factors.B.shape[:-1] != weight.shape[:-1]:
            raise ValueError(f"'{name}' has adapters for some of its experts: give adapt the views of all of them")
    return found
