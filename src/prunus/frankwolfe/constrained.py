"""Which parameters of a network Frank-Wolfe constrains, and how it goes on under masks.

Groups for `frankwolfe.SFW`, as the papers have them. Pruned weights are held as everywhere (`masks.hold`), best with
`KeptGradients`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.frankwolfe.sets.ball import Ball, lp
from prunus.frankwolfe.sets.group import Entries
from prunus.frankwolfe.sets.radius import Size, expected_norm, measured_norm
from prunus.layers import CONVOLUTIONS
from prunus.masks import Masks
from prunus.train import During, Plan


def constrained_groups(
    model: nn.Module,
    ball: Ball,
    size: Size,
    *,
    joint: bool = False,
    rest: Literal["l2", "free"] = "l2",
    norms: Literal["expected", "measured"] = "expected",
    only: Collection[str] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups for `SFW`: which parameters are in which set, of which radius, as the papers have it.

    Sets of entries constrain every parameter that requires gradients; sets of groups and spectral ones the weights of
    convolutions, and those of Linear layers unless these are fewer (the head of a convolutional network, which the
    authors, too, leave out). Then rest: "l2" puts every other parameter into an L2 ball of the same size, "free" into a
    group without constraint. size: `Radius`, `Diameter` or `Initial`; joint: one set over all. norms:
    "expected", what torch's own initialisation of each layer makes on average, whatever this model's was; or
    "measured", the norms now. only: names of the parameters that are in the set, in place of that rule.
    Raises ValueError for an expected norm without closed form, names in `only` that the model has not, and when nothing
    would be in the set.

    >>> groups = constrained_groups(nn.Linear(8, 4), group_k_support(0.5), Initial(3.0))
    >>> [(len(group["params"]), round(group["constraint"][0].radius, 3)) for group in groups]
    [(1, 3.464), (1, 1.225)]
    """
    strange = set(only or ()) - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if strange:
        raise ValueError(f"the model has no parameter {min(strange)!r}, which `only` names")
    chosen: list[tuple[Tensor, float]] = []
    others: list[tuple[Tensor, float]] = []
    structured = _structured(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or any(parameter is known for known, _ in chosen + others):
                continue
            whole = isinstance(ball.seen, Entries) or (name == "weight" and isinstance(module, structured))
            if only is not None:
                whole = (f"{path}.{name}" if path else name) in only
            if not whole and rest == "free":
                others.append((parameter, 1.0))
                continue
            norm = expected_norm(module, name) if norms == "expected" else measured_norm(parameter)
            (chosen if whole else others).append((parameter, norm))
    if not chosen:
        what = "Linear or convolution weight" if only is None else "parameter of those names"
        raise ValueError(f"The model has no {what} that requires gradients: nothing to constrain")
    groups = [_group(chosen, ball, size, joint)]
    if others and rest == "l2":
        groups.append(_group(others, lp(2), size, joint))
    elif others:
        groups.append({"params": [parameter for parameter, _ in others], "constraint": None})
    return groups


def tied_groups(model: nn.Module, ball: Ball, size: Size, sets: Iterable[Sequence[str]]) -> list[dict[str, Any]]:
    """Parameter groups for `SFW`: the parameters of each set are one point of the ball, all others are free.

    sets: names of parameters, in the order of a `sets.Tied`, such as gate, up and down of every MLP, so that a neuron
    goes from all three at once. size: by the norms now. Raises AttributeError for a name that the model lacks, and
    ValueError for matrices that share no groups.

    >>> model = nn.ModuleDict({"gate": nn.Linear(8, 6), "up": nn.Linear(8, 6), "down": nn.Linear(6, 8)})
    >>> ball = group_k_support(0.5, groups=Tied())
    >>> groups = tied_groups(model, ball, Initial(1.0), [("gate.weight", "up.weight", "down.weight")])
    >>> [(len(group["params"]), group["constraint"] is not None) for group in groups]
    [(3, True), (3, False)]
    """
    chosen = [[model.get_parameter(name) for name in names] for names in sets]
    groups = [_group([(each, measured_norm(each)) for each in point], ball, size, joint=True) for point in chosen]
    own = {id(each) for point in chosen for each in point}
    rest = [each for each in model.parameters() if each.requires_grad and id(each) not in own]
    return [*groups, {"params": rest, "constraint": None}]


class KeptGradients(During):
    """Zeroes the gradients of pruned weights, so that a linear minimiser spends nothing on them.

    `masks.hold` alone would zero what it spent afterwards. Sets of entries or groups then never choose a pruned weight;
    singular vectors of a pruned matrix are not zero there, so spectral sets rely on `masks.hold`.

    >>> kept = KeptGradients(Masks({"weight": torch.tensor([[True, False]])}))
    """

    def __init__(self, masks: Masks) -> None:
        super().__init__()
        self.given = masks

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Find the parameters; raises ValueError for a mask without one."""
        parameters = dict(model.named_parameters(remove_duplicate=False))
        missing = [name for name in self.given if name not in parameters]
        if missing:
            raise ValueError(f"the model has no parameter '{missing[0]}', which the masks name")
        self.pairs = [(parameters[name], ~mask.to(parameters[name].device)) for name, mask in self.given.items()]

    @torch.no_grad()
    def gradients(self) -> None:
        """Zero them."""
        for parameter, pruned in self.pairs:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(pruned, 0.0)


def _structured(model: nn.Module) -> tuple[type[nn.Module], ...]:
    """The layers whose weights sets of groups and spectral ones constrain."""
    convolutions = sum(isinstance(module, CONVOLUTIONS) for module in model.modules())
    linear = sum(isinstance(module, nn.Linear) for module in model.modules())
    return CONVOLUTIONS if linear < convolutions else (nn.Linear, *CONVOLUTIONS)


def _group(members: list[tuple[Tensor, float]], ball: Ball, size: Size, joint: bool) -> dict[str, Any]:
    parameters, shapes = [parameter for parameter, _ in members], [tuple(each.shape) for each, _ in members]
    if joint:
        return {
            "params": parameters,
            "joint": True,
            "constraint": size.fit(ball, shapes, [norm for _, norm in members]),
        }
    balls = [size.fit(ball, [shape], [norm]) for shape, (_, norm) in zip(shapes, members, strict=True)]
    return {"params": parameters, "constraint": balls}
