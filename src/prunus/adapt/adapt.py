"""Train a sliver of a pruned model: choose parameters, put adapters in place, and merge them again.

    adapt(model, ["norms", "mask_lora"]) ── train ──▶ adaptation.merge_() ──▶ the same modules, dtypes and zeros

Subsets are found in `subsets`; the mathematics of the adapters is in `adapters`. Merging is done in float32, one layer
at a time, under the stored mask (never one inferred from zeros, which training can create and leave), and is checked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.adapt.adapters import Factors, Init
from prunus.adapt.sites import LINEAR, Cast, Kind, Parametrization, Site, find_owners, make_sites
from prunus.adapt.subsets import ADAPTERS, SUBSETS, check_subsets, find_subset
from prunus.layers import View

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """What merging changed, by layer name.

    difference: largest absolute difference between adapter and merged layer on a random probe of unit variance.
    lost: for "lora_prune", the share of the update's Frobenius norm that fell under the mask and is gone.
    """

    difference: dict[str, float]
    lost: dict[str, float]


@dataclass(frozen=True)
class _Plain:
    """A parameter trained itself: its dtype before, and the modules that see it cast to that dtype meanwhile."""

    key: str
    parameter: nn.Parameter
    dtype: torch.dtype
    casts: tuple[Parametrization, ...]


@dataclass
class Adaptation:
    """What `adapt` made trainable.

    groups: subset -> its float32 parameters, disjoint. total: number of the model's own values. Between `adapt` and
    `merge_` modules see float32 trainables in the dtype they had, so the model runs with and without autocast and
    already computes what the merged one will.
    """

    groups: dict[str, list[nn.Parameter]]
    total: int
    _kind: str | None = field(repr=False)
    _sites: list[Site] = field(repr=False)
    _plain: list[_Plain] = field(repr=False)
    _held: list[tuple[str, nn.Parameter, Tensor]] = field(repr=False)
    _requires_grad: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _merged: bool = field(default=False, repr=False)

    @property
    def trainable(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for group in self.groups.values() for parameter in group)

    @property
    def share(self) -> float:
        """Trainable values over the model's own."""
        return self.trainable / self.total

    def param_groups(self, lr: float, lrs: Mapping[str, float] | None = None) -> list[dict[str, Any]]:
        """Groups for a torch optimizer, one a subset, at learning rate lrs[subset] or else `lr`.

        Raises: ValueError for a subset in `lrs` that is not trained.
        """
        rates = dict(lrs or {})
        unknown = [name for name in rates if name not in self.groups]
        if unknown:
            raise ValueError(f"lrs names {unknown[0]!r}, which is not trained; trained are {', '.join(self.groups)}")
        return [
            {"params": list(parameters), "lr": rates.get(name, lr), "subset": name}
            for name, parameters in self.groups.items()
            if parameters
        ]

    def keep_effective(self) -> None:
        """From now on builds each layer's effective weight once a step, not two or three times a micro batch.

        It is held from the step's first forward pass to the next step, so memory grows by the adapted weights. Values
        are the same, as long as parameters change in ways that autograd sees (optimizers do; `.data` does not count).
        Not for steps recorded as CUDA graphs, nor sharded parameters.
        """
        for site in self._sites:
            site.factors.keep = True

    @torch.no_grad()
    def merge_(self) -> MergeReport:
        """Puts everything back in place, merged: module objects, dtypes, requires_grad; pruned entries are +0.0.

        Raises:
            ValueError, before anything is changed: merged already; "lora" on a layer whose mask has zeros; a trained
                value that is NaN, infinite or beyond the dtype it goes back to; a weight trained by "full" that is
                not zero where it is pruned.
            RuntimeError: a merged layer is not finite or does not compute what its adapter computed.
        """
        self._check()
        self._merged = True
        for plain in self._plain:
            _restore(plain)
        difference: dict[str, float] = {}
        lost: dict[str, float] = {}
        for site in self._sites:
            if self._kind == "lora_prune":
                lost[site.name] = site.lost()
            difference[site.name] = site.merge_(exact=self._kind != "lora_prune")
        for _, parameter, mask in self._held:
            parameter.masked_fill_(~mask.to(parameter.device), 0)  # -0.0 becomes +0.0
        for parameter, flag in self._requires_grad:
            parameter.requires_grad_(flag)
            parameter.grad = None
        return MergeReport(difference, lost)

    def _check(self) -> None:
        if self._merged:
            raise ValueError("This adaptation is merged already; call adapt again to train on")
        for site in self._sites:
            if self._kind == "lora" and site.pruned:
                raise ValueError(
                    f"'{site.name}' has {site.pruned} pruned weights, and merging 'lora' would fill them. "
                    "Train 'mask_lora' or 'scale_lora', which keep them zero, or 'lora_prune', which drops that part."
                )
            for factor in (site.factors.A, site.factors.B):
                if not factor.isfinite().all():
                    raise ValueError(f"The adapter of '{site.name}' is not finite: training diverged. Lower its lr")
        for plain in self._plain:
            if not plain.parameter.to(plain.dtype).isfinite().all():
                raise ValueError(f"'{plain.key}' is not finite in {plain.dtype}: training diverged. Lower its lr")
        for key, parameter, mask in self._held:
            if (parameter * ~mask.to(parameter.device)).any():
                raise ValueError(f"'{key}' is not zero where it is pruned: train it under masks.hold(model, optimizer)")


def adapt(
    model: nn.Module,
    train: Sequence[str],
    *,
    masks: Mapping[str, Tensor] | None,
    views: Sequence[View],
    rank: int = 16,
    alpha: float = 32.0,
    init: Init = "kaiming",
    generator: torch.Generator | None = None,
    prefix: str = "",
) -> Adaptation:
    """The named subsets of `model` made trainable in float32, the rest frozen, adapters on the views' layers.

    Args:
        train: subsets, freely combined, but one adapter kind at most and "full" alone. A parameter of two subsets
            counts in the first of head, embeddings, norms, biases. "full" needs masks.hold(model, optimizer).
        masks: parameter name -> bool in the parameter's shape, True kept. A layer without one counts as unpruned.
        views: the layers that an adapter kind adapts.
        rank, alpha: of LoRA, LoRA-Prune and MaskLoRA, which add (alpha / rank) BA; ScaleLoRA has only a rank.
        init: see `adapters.new_factors`.   generator: on the CPU; default one seeded with 0.
        prefix: where `model` is a block "model.layers.0" and views and masks bear full names.

    Raises: ValueError for a bad combination, an empty subset, and masks that do not fit; nothing is changed then.

    >>> from prunus.layers import find_layers
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    >>> adaptation = adapt(model, ["norms", "mask_lora"], masks=None, views=find_layers(model), rank=2)
    >>> {name: len(group) for name, group in adaptation.groups.items()}
    {'norms': 2, 'mask_lora': 2}
    """
    check_subsets(train)
    if rank < 1 or not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"rank is {rank} and alpha {alpha}; both must be positive")
    if any(isinstance(module, Factors | Cast) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is adapted already; call merge_ on its adaptation first")
    kind = next((name for name in train if name in ADAPTERS), None)
    claimed = _claim(model, [name for name in train if name != kind])
    own = _local(masks or {}, prefix, dict(model.named_parameters()))
    sites: list[Site] = []
    if kind is not None:
        generator = generator or torch.Generator().manual_seed(0)
        if not views:
            raise ValueError(f"Subset {kind!r} is empty: there is no prunable layer of {type(model).__name__} in views")
        local = [replace(view, parameter=_local_name(view.parameter, prefix)) for view in views]
        scale = None if kind == "scale_lora" else alpha / rank
        sites = make_sites(model, Kind(kind, rank, scale, init, generator), local, own)
        _check_sites(sites, claimed)
    total = sum(parameter.numel() for parameter in model.parameters())
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    for site in sites:
        site.install()
    plain = [item for found in claimed.values() for item in _train_(model, found, cast="full" not in train)]
    groups = {name: list(claimed.get(name, {}).values()) for name in SUBSETS if name in train}
    if kind is not None:
        groups[kind] = [factor for site in sites for factor in (site.factors.A, site.factors.B)]
    trained = {key: parameter for found in claimed.values() for key, parameter in found.items()}
    held = [(key, trained[key], mask) for key, mask in own.items() if key in trained]
    adaptation = Adaptation(groups, total, kind, sites, plain, held, flags)
    log.info("training %s: %d values, %.3f %%", ", ".join(groups), adaptation.trainable, 100 * adaptation.share)
    return adaptation


def _claim(model: nn.Module, names: Sequence[str]) -> dict[str, dict[str, nn.Parameter]]:
    """Subset -> its parameters by name, each parameter in one subset only."""
    claimed: dict[str, dict[str, nn.Parameter]] = {}
    taken: set[int] = set()
    for name in ("head", "embeddings", "norms", "biases", "full"):
        if name in names:
            found = find_subset(model, name)
            claimed[name] = {key: value for key, value in found.items() if id(value) not in taken}
            taken |= {id(value) for value in found.values()}
    for name, other in (("head", "embeddings"), ("embeddings", "head")):
        if name in names and other not in names:
            shared = [key for key, value in claimed[name].items() if _in(model, value, other)]
            if shared:
                log.warning("'%s' is tied: training '%s' trains the %s too", shared[0], name, other)
    return claimed


def _in(model: nn.Module, parameter: nn.Parameter, name: str) -> bool:
    try:
        return any(parameter is found for found in find_subset(model, name).values())
    except ValueError:
        return False


def _local_name(name: str, prefix: str) -> str:
    return name.removeprefix(prefix + ".") if prefix else name


def _local(masks: Mapping[str, Tensor], prefix: str, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The masks of `model`'s own parameters, under its own names."""
    own = {_local_name(name, prefix): mask for name, mask in masks.items()}
    found = {name: mask for name, mask in own.items() if name in parameters}
    if masks and not found:
        raise ValueError(f"No mask belongs to this model: masks has {next(iter(masks))!r}, ... ; prefix is {prefix!r}")
    for name, mask in found.items():
        if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
            raise ValueError(
                f"The mask of '{name}' is {mask.dtype} {tuple(mask.shape)}; the weight needs bool "
                f"{tuple(parameters[name].shape)}"
            )
    return found


def _check_sites(sites: Sequence[Site], claimed: Mapping[str, Mapping[str, nn.Parameter]]) -> None:
    named = {id(parameter): name for name, found in claimed.items() for parameter in found.values()}
    unmasked: list[str] = []
    for site in sites:
        if id(site.weight) in named:
            raise ValueError(
                f"'{site.name}' would be trained by {named[id(site.weight)]!r} and by its adapter; take it out of views"
            )
        wrong = site.unmasked_values()
        if wrong:
            raise ValueError(
                f"'{site.name}' has {wrong} nonzero values where it is pruned; call masks.apply_(model) first"
            )
        if site.mask is None and (site.weight == 0).sum() > 0.05 * site.weight.numel():
            unmasked.append(site.name)
    if unmasked:
        log.warning("%d layers without a mask hold many zeros, which will train: %s, ...", len(unmasked), unmasked[0])


def _train_(model: nn.Module, found: Mapping[str, nn.Parameter], *, cast: bool) -> list[_Plain]:
    """Makes parameters trainable float32; where `cast`, their modules still see the dtype they had."""
    owners = find_owners(model)
    plain: list[_Plain] = []
    for key, parameter in found.items():
        dtype = parameter.dtype
        parameter.requires_grad_(True)
        casts: list[Parametrization] = []
        if torch.finfo(dtype).bits < 32:
            parameter.data = parameter.data.float()
            seen = [owner for owner in owners[id(parameter)] if cast and not isinstance(owner.module, LINEAR)]
            casts = [Parametrization.put(owner.module, owner.attribute, Cast(dtype)) for owner in seen]
        plain.append(_Plain(key, parameter, dtype, tuple(casts)))
    return plain


def _restore(plain: _Plain) -> None:
    for item in plain.casts:
        item.remove()
    plain.parameter.data = plain.parameter.data.to(plain.dtype)
