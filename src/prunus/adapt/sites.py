"""Where an adapter sits in a model: put in place of its layer, or on its parameter, and merged back.

A weight that a plain linear module owns alone is adapted by replacing the module; any other (stacked experts,
convolutions, tied weights, linear modules with a forward of their own) by a parametrization of the parameter.
What is trained besides, and the checks before merging, are in `adapt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from prunus.adapt.adapters import AdaptedWeight, EffectiveLinear, Factors, Init, LowRankLinear, matrices, new_factors
from prunus.adapt.effective import effective_weight, tiles
from prunus.layers import View
from prunus.machine import no_autocast
from prunus.masks import pack, unpack

LINEAR = (EffectiveLinear, LowRankLinear)

_SLACK = 8  # roundings of the output's scale |x||W| that a merged layer may differ by


@dataclass(frozen=True)
class Kind:
    """One of `subsets.ADAPTERS`: its rank, the scale of its update (None: a product), and how it starts."""

    name: str
    rank: int
    scale: float | None
    init: Init
    generator: torch.Generator


@dataclass(frozen=True)
class Owner:
    """A module that holds a parameter under `attribute`, and where the tree holds the module."""

    module: nn.Module
    attribute: str
    slots: tuple[tuple[nn.Module, str], ...]


class Cast(nn.Module):
    """The parametrization that shows a float32 trainable to its module in the dtype it had."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, stored: Tensor) -> Tensor:
        """The same values, rounded."""
        return stored.to(self.dtype)


@dataclass(frozen=True)
class Parametrization:
    """A parametrization of ours on a module's parameter, and the order its parameters had."""

    module: nn.Module
    attribute: str
    order: tuple[str, ...]

    @classmethod
    def put(cls, module: nn.Module, attribute: str, mapping: nn.Module) -> Parametrization:
        """Shows the module `mapping(parameter)`, which may have another dtype, in place of its parameter."""
        found = cls(module, attribute, tuple(module._parameters))
        parametrize.register_parametrization(module, attribute, mapping, unsafe=True)
        return found

    def remove(self) -> None:
        """Makes the parameter an ordinary one again, the same object at the same place."""
        parametrize.remove_parametrizations(self.module, self.attribute, leave_parametrized=False)
        own = self.module._parameters
        for name in self.order:
            if name in own:
                own[name] = own.pop(name)


@dataclass(frozen=True)
class Site:
    """One adapted parameter. `mask` is bool in the shape of its matrices, True kept, on any device; None: all True."""

    name: str
    weight: nn.Parameter
    mask: Tensor | None
    factors: Factors
    owners: tuple[Owner, ...]
    transposed: bool
    experts: tuple[int, ...] | None  # those adapted of a stack; None: all, or no stack
    adapter: EffectiveLinear | LowRankLinear | AdaptedWeight
    undo: list[Parametrization | RemovableHandle] = field(default_factory=list)

    def install(self) -> None:
        """Puts the adapter in place."""
        if isinstance(self.adapter, LINEAR):
            for parent, child in self.owners[0].slots:
                setattr(parent, child, self.adapter)
        else:
            for owner in self.owners:
                self.undo.append(Parametrization.put(owner.module, owner.attribute, self.adapter))
                self.undo.append(owner.module.register_forward_pre_hook(self.adapter.open_))
                self.undo.append(owner.module.register_forward_hook(self.adapter.close_, always_call=True))

    def restore(self) -> None:
        """Takes the adapter out again, if it is there."""
        for item in self.undo:
            item.remove()
        self.undo.clear()
        if isinstance(self.adapter, LINEAR):
            for parent, child in self.owners[0].slots:
                setattr(parent, child, self.owners[0].module)

    @property
    def views(self) -> list[str]:
        """The names of the views that it adapts."""
        if self.factors.A.ndim == 2:
            return [self.name]
        return [f"{self.name}[{place}]" for place in self.experts or range(len(self.factors.A))]

    @property
    def pruned(self) -> int:
        """How many weights the mask prunes."""
        return 0 if self.mask is None else int((~self.mask).sum())

    def unmasked_values(self) -> int:
        """How many weights are not zero where they are pruned."""
        kept = self._kept()
        return 0 if kept is None else int(((self._matrices(self.weight) != 0) & ~kept).sum())

    def lost(self) -> float:
        """||(1 - M)*(BA)|| / ||BA||, Frobenius."""
        kept = self._kept()
        if kept is None:
            return 0.0
        A, B = self.factors.A, self.factors.B
        whole = under = 0.0
        for rows in tiles(kept):
            squares = (B[rows] @ (A[rows] if A.ndim == 3 else A)).square_()
            whole += squares.sum(dtype=torch.float64).item()
            under += squares.mul_(~kept[rows]).sum(dtype=torch.float64).item()
        return (under / whole) ** 0.5 if whole else 0.0

    def merge_(self, *, exact: bool) -> float:
        """Writes the effective weight, restores the modules, and returns the largest difference on a random probe.

        Raises: RuntimeError if the merged weight is not finite, or, where `exact`, if the layer computes anything else
        than the adapter did.
        """
        W, kept = self._matrices(self.weight), self._kept()
        merged = effective_weight(self.factors.terms(W))  # the very call of forward: its bits
        if kept is not None:
            merged.masked_fill_(~kept, 0)  # W is zero here; in a product it may have become -0.0
        if not merged.isfinite().all():
            raise RuntimeError(
                f"'{self.name}' does not fit into {W.dtype} when merged; it is left unmerged. Lower its lr"
            )
        with no_autocast(W):
            x = torch.randn(4, W.shape[-1], generator=torch.Generator().manual_seed(0)).to(W)
            before, bound = self._output(x), self._bound(x, merged if self.factors.scale is None else W)
            self._write_(merged)
            self.restore()
            gap = (self._output(x).float() - before.float()).abs()
        if exact and not (gap <= bound).all():
            raise RuntimeError(
                f"'{self.name}' merged differs from its adapter by {gap.max().item():.3g}, more than rounding in "
                f"{W.dtype} explains; its weight was changed in place after adapt"
            )
        return gap.max().item()

    def _kept(self) -> Tensor | None:
        """The mask on the weight's device: the packed one that is there already, or else brought from where it is."""
        packed = self.factors.mask
        if packed is not None and packed.dtype == torch.uint8 and packed.device == self.weight.device:
            return unpack(packed, self.factors.A.shape[-1])
        return None if self.mask is None else self.mask.to(self.weight.device)

    def _matrices(self, stored: Tensor) -> Tensor:
        W = matrices(stored, stacked=self.factors.A.ndim == 3, transposed=self.transposed)
        return W if self.experts is None else W[list(self.experts)]

    def _write_(self, merged: Tensor) -> None:
        W = matrices(self.weight.detach(), stacked=merged.ndim == 3, transposed=self.transposed)
        if self.experts is None:
            W.copy_(merged)
        else:
            W[list(self.experts)] = merged

    def _output(self, x: Tensor) -> Tensor:
        """(4, in) -> (4, out) or (experts, 4, out), through the module where it is a linear one. Hooks do not run."""
        owner = self.owners[0]
        if isinstance(self.adapter, LINEAR):
            parent, child = owner.slots[0]
            return getattr(parent, child).forward(x)
        return x @ self._matrices(getattr(owner.module, owner.attribute)).mT

    def _bound(self, x: Tensor, W: Tensor) -> Tensor:
        """What rounding explains: _SLACK eps |x| (|W| + c |B||A|)^T, in the precision of the device's products."""
        A, B, scale = self.factors.A, self.factors.B, self.factors.scale
        size = W.abs().float()
        if scale is not None:
            size += (B.abs() * scale) @ A.abs()
        info = torch.finfo(W.dtype)
        eps = 2**-10 if W.is_cuda and W.dtype == torch.float32 else info.eps  # TF32
        bias = getattr(self.adapter, "bias", None)
        scales = x.abs().float() @ size.mT + (0 if bias is None else bias.abs().float())
        return _SLACK * (eps * scales + info.tiny * W.shape[-1])


def find_owners(model: nn.Module) -> dict[int, tuple[Owner, ...]]:
    """The owners of every parameter, by its id: several where it is tied."""
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child, module in parent._modules.items():
            slots.setdefault(id(module), []).append((parent, child))
    owners: dict[int, tuple[Owner, ...]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                owner = Owner(module, attribute, tuple(slots.get(id(module), ())))
                owners[id(parameter)] = (*owners.get(id(parameter), ()), owner)
    return owners


def make_sites(model: nn.Module, kind: Kind, views: Sequence[View], masks: Mapping[str, Tensor]) -> list[Site]:
    """One site a parameter, in the order of the views; nothing is changed yet."""
    if kind.init not in get_args(Init):
        raise ValueError(f"Unknown init {kind.init!r}; known are {' and '.join(map(repr, get_args(Init)))}")
    parameters, owners = dict(model.named_parameters()), find_owners(model)
    grouped: dict[str, list[View]] = {}
    for view in views:
        if view.parameter not in parameters:
            raise ValueError(
                f"{type(model).__name__} has no parameter {view.parameter!r} (view '{view.name}'): check prefix"
            )
        grouped.setdefault(view.parameter, []).append(view)
    return [
        _site(kind, group, parameters[key], masks.get(key), owners[id(parameters[key])])
        for key, group in grouped.items()
    ]


def _site(
    kind: Kind, views: Sequence[View], weight: nn.Parameter, mask: Tensor | None, owners: tuple[Owner, ...]
) -> Site:
    view, stacked = views[0], views[0].index is not None
    experts = tuple(view.index or 0 for view in views) if stacked else None
    experts = None if experts == tuple(range(weight.shape[0])) else experts
    if mask is not None:
        mask = matrices(mask, stacked=stacked, transposed=view.transposed)
        mask = mask if experts is None else mask[list(experts)]
    shape = (len(views), *view.shape) if stacked else view.shape
    A, B = new_factors(shape, kind.rank, product=kind.scale is None, init=kind.init, generator=kind.generator)
    trained = mask.to(weight.device) if mask is not None and kind.name == "mask_lora" else None
    trained = pack(trained) if trained is not None and not stacked else trained
    factors = Factors(A.to(weight.device), B.to(weight.device), scale=kind.scale, mask=trained)
    name = view.name.rpartition("[")[0] if stacked else view.name
    if len(owners) == 1 and _is_plain_linear(owners[0], view, weight):
        bias = owners[0].module._parameters.get("bias")
        cls = EffectiveLinear if kind.name in ("scale_lora", "mask_lora") else LowRankLinear
        adapter = cls(weight, bias, factors, transposed=view.transposed)
    else:
        adapter = AdaptedWeight(factors, transposed=view.transposed, experts=experts)
    return Site(name, weight, mask, factors, owners, view.transposed, experts, adapter)


def _is_plain_linear(owner: Owner, view: View, weight: nn.Parameter) -> bool:
    """Whether the module computes x W^T + b and nothing else, and is called: attention of torch reads its out_proj."""
    module = owner.module
    if not owner.slots or not isinstance(module, nn.Linear | Conv1D) or parametrize.is_parametrized(module):
        return False
    if isinstance(module, NonDynamicallyQuantizableLinear) or owner.attribute != "weight":
        return False
    if type(module) in (nn.Linear, Conv1D):
        return True
    with torch.no_grad(), no_autocast(weight):
        x = torch.randn(2, view.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
        plain = F.linear(x, view.matrix(weight), module.bias).float()
        try:
            own: object = module.forward(x)
        except RuntimeError:  # it takes inputs of another shape
            return False
        same = isinstance(own, Tensor) and own.shape == plain.shape  # pyright: ignore[reportUnnecessaryIsInstance] of subclasses
        return same and torch.allclose(own.float(), plain, rtol=0.02, atol=0.02 * plain.abs().max().item())
