"""What a classifier recipe may say of its optimizer, and the optimizers and penalties made of it.

    train.optimizer   none: SGD    {sgd: {decoupled_decay: ..}}    {sfw: {set: k_support, k: 0.1, ..}}    {prox: {..}}
                      adamw
    train.penalty     {groups: strength} or {nuclear: strength}, added to the loss

Momentum and weight decay are those of the section `train`; parameters in a feasible set take no weight decay. What is
frozen, because a subset is retrained, is in no optimizer. A new
optimizer is a subclass of `Optimizer` and one `__all__` entry: recipes find it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, Field, model_validator
from torch import nn

from prunus.frankwolfe import (
    SFW,
    GroupLasso,
    KeptGradients,
    NuclearNorm,
    NuclearSteps,
    ProximalSGD,
    constrained_groups,
    count_of,
    sets,
)
from prunus.layers import View, find_layers
from prunus.masks import Masks
from prunus.recipe import names
from prunus.recipe.plain import Strict
from prunus.train import During

__all__ = ["AdamW", "Given", "OneOptimizer", "Optimizer", "Prox", "Pull", "Sfw", "Sgd", "Size"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_USUAL = {"k": 0.1, "p": 2.0}
SetName = Annotated[str, AfterValidator(names.sets.name)]


class OneOf(Strict):
    """A section in which exactly one key is given."""

    @model_validator(mode="after")
    def _check(self) -> OneOf:
        if len(self.given) != 1:
            known = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one of {known}; got {', '.join(self.given) or 'none'}")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """The keys that are given, and their values."""
        return {name: value for name, value in self if value is not None}


class Size(OneOf):
    """How large a set is: its `radius`, its L2 `diameter`, or `initial` times the norm of torch's initialisation."""

    radius: Positive | None = None
    diameter: Positive | None = None
    initial: Positive | None = None

    def made(self) -> sets.Radius | sets.Diameter | sets.Initial:
        """The size as `sets` has it."""
        ((name, value),) = self.given.items()
        return {"radius": sets.Radius, "diameter": sets.Diameter, "initial": sets.Initial}[name](value)


@dataclass(frozen=True)
class Given:
    """What a run says to every optimizer. reference: makes the untrained network, whose norms may size sets."""

    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    reference: Callable[[], nn.Module]


class Optimizer(Strict):
    """What makes an optimizer of a run. A new one is a subclass with its options and one `__all__` entry.

    partly: whether it leaves alone what is frozen, so that subsets can be retrained by it.
    """

    partly: ClassVar[bool] = False

    def made(self, model: nn.Module, given: Given) -> torch.optim.Optimizer:
        """The optimizer, which a captured step may record where its arithmetic allows it."""
        raise NotImplementedError

    def beside(self, model: nn.Module, masks: Masks | None) -> list[During]:
        """What takes part in training beside it. masks: those that hold."""
        return []

    def retraining(self, *, smaller: bool) -> Optimizer:
        """What retrains a pruned network. smaller: it has lost filters or ranks instead of getting zeros."""
        return self


class Sgd(Optimizer):
    """SGD, with decoupled weight decay, w <- (1 - lr * decoupled_decay) w, beside or in place of train.weight_decay."""

    partly: ClassVar[bool] = True
    decoupled_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    def made(self, model: nn.Module, given: Given) -> torch.optim.Optimizer:
        """PyTorch's; with decoupled decay SFW without sets, which is SGD."""
        shared: dict[str, Any] = {"lr": given.lr, "momentum": given.momentum, "weight_decay": given.weight_decay}
        cuda = _recorded(model)
        if self.decoupled_decay:
            return SFW(_trained(model), decoupled_decay=self.decoupled_decay, capturable=cuda, **shared)
        return torch.optim.SGD(_trained(model), nesterov=given.nesterov, fused=cuda, **shared)


class AdamW(Optimizer):
    """AdamW, its first beta being train.momentum; weight decay is of matrices and kernels alone."""

    partly: ClassVar[bool] = True
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.999
    eps: Positive = 1e-8

    def made(self, model: nn.Module, given: Given) -> torch.optim.Optimizer:
        """PyTorch's, fused on a GPU."""
        trained, cuda = _trained(model), _recorded(model)
        parts = [[each for each in trained if each.ndim > 1], [each for each in trained if each.ndim < 2]]
        decays = (given.weight_decay, 0.0)
        groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, decays, strict=True) if part]
        betas = (given.momentum, self.beta2)
        return torch.optim.AdamW(groups, lr=given.lr, betas=betas, eps=self.eps, capturable=cuda, fused=cuda or None)


class Sfw(Optimizer):
    """Stochastic Frank-Wolfe: which set, how large, which parameters are in it, and what the others get.

    k: a count (an integer) or a share (a float in (0, 1]), for sets with a K. p: of the set lp.
    include, exclude: globs of layers; with them only the weights of those layers are in the set. Without, sets of
    entries have every parameter, sets of groups and spectral ones the weights of convolutions, and of Linear layers
    unless these are fewer, as a head is.
    rest: the other parameters are in L2 balls of the same size ("l2"), or trained by SGD ("free").
    norms: `size.initial` multiplies the norm that torch's initialisation has on average, or the one measured before
    training. joint: one set over all. dampening: of the momentum. iterations: of the singular vectors, each step.
    """

    set: SetName = "k_support"
    k: int | float | None = None
    p: Annotated[float, Field(ge=1)] | None = None
    size: Size = Size(initial=3.0)
    rescale: Literal["none", "diameter", "gradient", "fast_gradient"] = "fast_gradient"
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    rest: Literal["l2", "free"] = "l2"
    norms: Literal["expected", "measured"] = "expected"
    joint: bool = False
    dampening: Annotated[float, Field(ge=0, le=1)] = 0.0
    iterations: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="before")
    @classmethod
    def _implied(cls, value: Any) -> Any:
        """K and p have usual values in the sets that take them."""
        if not isinstance(value, dict):
            return value
        takes = _usual(value.get("set", "k_support"))
        return {**value, **{key: usual for key, usual in takes.items() if value.get(key) is None}}

    @model_validator(mode="after")
    def _check(self) -> Sfw:
        for key in _USUAL:
            if getattr(self, key) is not None and key not in names.sets.takes(self.set):
                able = [name for name in names.sets.members() if key in names.sets.takes(name)]
                raise ValueError(f"{key}: the set {self.set} takes no {key}; leave it out, or use {', '.join(able)}")
        if self.k is not None:
            count_of(self.k, 1)
        return self

    def ball(self) -> sets.Ball:
        """The set, of radius 1."""
        return names.sets.make({self.set: {key: getattr(self, key) for key in _usual(self.set)}})

    def made(self, model: nn.Module, given: Given) -> torch.optim.Optimizer:
        """SFW, its parameters scaled down to the borders of their sets."""
        groups = _groups(model, self, given.weight_decay, given.reference)
        made = SFW(
            groups,
            lr=given.lr,
            momentum=given.momentum,
            rescale=self.rescale,
            dampening=self.dampening,
            iterations=self.iterations,
            capturable=_recorded(model),
        )
        made.start_()
        return made

    def beside(self, model: nn.Module, masks: Masks | None) -> list[During]:
        """What keeps pruned weights out of the steps."""
        return [] if masks is None else [KeptGradients(masks)]

    def retraining(self, *, smaller: bool) -> Optimizer:
        """Itself, but for a smaller network, which no longer fits the sets."""
        return Sgd() if smaller else self


def _usual(name: Any) -> dict[str, float]:
    """The options of a set that have a usual value here, and it."""
    takes = names.sets.takes(name) if name in names.sets.members() else []
    return {key: usual for key, usual in _USUAL.items() if key in takes}


class Pull(Strict):
    """A pull towards structure, of strength `groups` (filters, neurons) or `nuclear` (low rank), on prunable layers.

    include, exclude: globs of layers, as for pruning. every: steps between two decompositions of nuclear pulls.
    """

    groups: Positive | None = None
    nuclear: Positive | None = None
    every: Annotated[int, Field(ge=1)] = 1
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _check(self) -> Pull:
        if (self.groups is None) == (self.nuclear is None):
            raise ValueError("give either groups or nuclear, with its strength")
        if self.every > 1 and self.nuclear is None:
            raise ValueError("every goes with nuclear, whose decompositions are dear; leave it out")
        return self

    def penalty(self, model: nn.Module) -> During:
        """The pull as a term of the loss."""
        if self.nuclear is not None:
            return NuclearNorm(self.nuclear, self.views(model), every=self.every)
        return GroupLasso(self.groups or 0.0, self.views(model))

    def views(self, model: nn.Module) -> tuple[View, ...]:
        """The layers that are pulled. Raises ValueError for a glob that matches none."""
        return tuple(find_layers(model, include=self.include, exclude=self.exclude))


class Prox(Pull, Optimizer):
    """Proximal SGD, the exact steps of a pull: of groups inside the optimizer, of nuclear norms beside plain SGD."""

    def made(self, model: nn.Module, given: Given) -> torch.optim.Optimizer:
        """Proximal SGD of groups, or plain SGD."""
        if self.groups is None:
            return Sgd().made(model, given)
        return ProximalSGD(
            _pulled(model, self),
            proximal="groups",
            strength=self.groups,
            weight_decay=given.weight_decay,
            capturable=_recorded(model),
            lr=given.lr,
            momentum=given.momentum,
        )

    def beside(self, model: nn.Module, masks: Masks | None) -> list[During]:
        """The proximal steps of nuclear norms."""
        return [] if self.nuclear is None else [NuclearSteps(self.nuclear, self.views(model), every=self.every)]

    def retraining(self, *, smaller: bool) -> Optimizer:
        """SGD: what the steps were to bring about is there."""
        return Sgd()


class OneOptimizer(OneOf):
    """One optimizer by name with its options."""

    shorthands: ClassVar[tuple[str, ...]] = ("string",)

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """A name alone takes the options' defaults."""
        if isinstance(value, str):
            return {value: {}}
        alone = isinstance(value, dict) and len(value) == 1
        return {name: {} if part is None else part for name, part in value.items()} if alone else value

    @property
    def one(self) -> Optimizer:
        """The one that is given."""
        (found,) = self.given.values()
        return found


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _recorded(model: nn.Module) -> bool:
    """Whether its steps may be recorded: on CUDA."""
    return next(model.parameters()).is_cuda


def _groups(
    model: nn.Module, asked: Sfw, weight_decay: float, reference: Callable[[], nn.Module]
) -> list[dict[str, Any]]:
    """Parameter groups: those in sets, and those without, which alone take weight decay."""
    only = None
    if asked.include or asked.exclude:
        only = {view.parameter for view in find_layers(model, include=asked.include, exclude=asked.exclude)}
    sized = reference() if asked.norms == "measured" else model
    groups = constrained_groups(
        sized, asked.ball(), asked.size.made(), joint=asked.joint, rest=asked.rest, norms=asked.norms, only=only
    )
    names = {id(parameter): name for name, parameter in sized.named_parameters()}
    own = dict(model.named_parameters())
    for group in groups:
        group["params"] = [own[names[id(parameter)]] for parameter in group["params"]]
        group["weight_decay"] = weight_decay if group["constraint"] is None else 0.0
    return groups


def _pulled(model: nn.Module, asked: Pull) -> list[dict[str, Any]]:
    """Parameter groups: the weights that are pulled, and the others."""
    chosen = {view.parameter for view in asked.views(model)}
    inside = [parameter for name, parameter in model.named_parameters() if name in chosen]
    outside = [parameter for name, parameter in model.named_parameters() if name not in chosen]
    return [{"params": inside}, *([{"params": outside, "strength": 0.0}] if outside else [])]
