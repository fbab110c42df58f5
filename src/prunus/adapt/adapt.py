"""Train a sliver of a pruned model: choose parameters, put adapters in place, and merge them again.

    adapt(model, ["norms", "mask_lora"]) ── train ──▶ adaptation.merge_() ──▶ the same modules, dtypes and zeros
                                             └─▶ adaptation.save(folder)     Adaptation.load(folder, model)

Subsets are found in `subsets`; the mathematics of the adapters is in `adapters`, their folders in `stored`. Merging is
done in float32, one layer at a time, under the stored mask (never one inferred from zeros, which training can create
and leave), and is checked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from prunus.adapt.adapters import Factors, Init
from prunus.adapt.sites import LINEAR, Cast, Kind, Parametrization, Site, find_owners, make_sites
from prunus.adapt.stored import StoredAdapter, fingerprint, peft_config, read_adapter
from prunus.adapt.subsets import ADAPTERS, SUBSETS, check_subsets, find_subset
from prunus.layers import View, find_layers
from prunus.machine import counted
from prunus.masks import Masks

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
    before: Tensor | None = None  # what it was before an adapter was loaded over it


@dataclass
class Adaptation:
    """What `adapt` made trainable.

    groups: subset -> its float32 parameters, disjoint. total: number of the model's own values. Between `adapt` and
    `merge_` modules see float32 trainables in the dtype they had, so the model runs with and without autocast and
    already computes what the merged one will.

    >>> adaptation = adapt(model, ["norms"], masks=None, views=find_layers(model))
    >>> adaptation.trainable
    48
    >>> _ = adaptation.merge_()  # the model is as it was, with what was trained
    """

    groups: dict[str, list[nn.Parameter]]
    total: int
    _kind: str | None = field(repr=False)
    _sites: list[Site] = field(repr=False)
    _plain: list[_Plain] = field(repr=False)
    _held: list[tuple[str, nn.Parameter, Tensor]] = field(repr=False)
    _requires_grad: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _masks: Masks = field(repr=False)
    _merged: bool = field(default=False, repr=False)

    @property
    def trainable(self) -> int:
        """Number of trainable values."""
        return sum(parameter.numel() for group in self.groups.values() for parameter in group)

    @property
    def share(self) -> float:
        """Trainable values over the model's own."""
        return self.trainable / self.total

    @property
    def held(self) -> Masks | None:
        """The masks of what is trained itself, under which it is to be trained; None where none of it is pruned."""
        own = Masks({key: mask for key, _, mask in self._held})
        return own if own else None

    def param_groups(
        self, lr: float, lrs: Mapping[str, float] | None = None, *, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for a torch optimizer, one a subset, at learning rate lrs[subset] or else `lr`.

        weight_decay: of matrices; with one, vectors (norms, biases) are groups of their own, without.

        Raises: ValueError for a subset in `lrs` that is not trained.
        """
        rates = dict(lrs or {})
        unknown = [name for name in rates if name not in self.groups]
        if unknown:
            raise ValueError(f"lrs names {unknown[0]!r}, which is not trained; trained are {', '.join(self.groups)}")
        groups: list[dict[str, Any]] = []
        for name, parameters in self.groups.items():
            matrices = [each for each in parameters if each.ndim > 1 or not weight_decay]
            vectors = [each for each in parameters if each.ndim < 2 and weight_decay]
            for params, decay in ((matrices, weight_decay), (vectors, 0.0)):
                groups += [{"params": params, "lr": rates.get(name, lr), "weight_decay": decay, "subset": name}]
        return [group for group in groups if group["params"]]

    def keep_effective(self) -> None:
        """From now on builds each layer's effective weight once a step, not two or three times a micro batch.

        It is held from the step's first forward pass to the next step, so memory grows by the adapted weights. Values
        are the same, as long as parameters change in ways that autograd sees (optimizers do; `.data` does not count).
        Not for sharded parameters.
        """
        _follow_fused()
        for site in self._sites:
            site.factors.keep = True

    @torch.no_grad()
    def merge_(self) -> MergeReport:
        """Puts everything back in place, merged: module objects, dtypes, requires_grad; pruned entries are +0.0.

        Raises:
            ValueError, before anything is changed: merged already; "lora" on a layer whose mask has zeros; a trained
                value that is NaN, infinite or beyond the dtype it goes back to; a weight trained by "full" that is
                not zero where it is pruned.
            RuntimeError: a merged layer is not finite or does not compute what its adapter computed. Layers before it
                are merged then, later ones as they were before `adapt`, and no adapter is left in the model.
        """
        self._check()
        self._merged = True
        for plain in self._plain:
            _restore(plain)
        difference: dict[str, float] = {}
        lost: dict[str, float] = {}
        try:
            for site in self._sites:
                if self._kind == "lora_prune":
                    lost[site.name] = site.lost()
                difference[site.name] = site.merge_(exact=self._kind != "lora_prune")
            for _, parameter, mask in self._held:
                parameter.masked_fill_(~mask.to(parameter.device), 0)  # -0.0 becomes +0.0
        finally:
            for site in self._sites:
                site.restore()
            self._freeze_as_before()
        return MergeReport(difference, lost)

    @torch.no_grad()
    def save(self, folder: str | Path, *, base: str = "") -> None:
        """Write what is trained to a folder of some megabytes, in peft's layout where peft can express it (`stored`).

        base: where the pruned model is, for whoever merges it later. Call it before `merge_`. Raises ValueError for an
        adaptation that is merged, or trains "full", and a folder with files of others.

        >>> adaptation = adapt(model, ["norms", "lora"], masks=None, views=find_layers(model))
        >>> adaptation.save("out/adapter", base="facebook/opt-125m")
        """
        self._check_alive()
        if "full" in self.groups:
            raise ValueError("'full' trains every parameter, which is no adapter: merge and save the model")
        tensors = {name: parameter.detach() for name, parameter in self._named().items()}
        first = self._sites[0].factors if self._sites else None
        rank = 1 if first is None else first.A.shape[-2]
        alpha = float(rank if first is None or first.scale is None else first.scale * rank)
        masks = self._masks if self._masks else None
        views = tuple(name for site in self._sites for name in site.views)
        prints = {site.name: fingerprint(site.weight) for site in self._sites}
        train = tuple(self.groups)
        StoredAdapter(rank, alpha, tensors, views, train, masks, base, prints, self._peft(rank, alpha, base)).write(
            folder
        )

    @classmethod
    def load(
        cls, folder: str | Path, model: nn.Module, *, masks: Masks | None = None, keep: bool = False
    ) -> Adaptation:
        """The adapter of a folder on `model`, the pruned model that it was trained on, to use, train on or merge.

        The masks that lie beside it are applied to the model first, so a dense model will do where pruning only zeroed
        weights. A LoRA of peft has none: under `masks` it becomes MaskLoRA. keep: what `remove_` puts back of norms,
        biases, heads and embeddings is kept, so that another adapter may take their place.

        Raises: FileNotFoundError without an adapter; ValueError for a damaged one, another base, masks that differ.

        >>> adaptation = Adaptation.load("out/adapter", model)
        >>> adaptation.remove_()
        """
        stored = read_adapter(folder)
        if masks is not None and stored.masks is not None and masks != stored.masks:
            raise ValueError(f"{folder} was trained under other masks than those given; give the model it belongs on")
        masks = stored.masks if masks is None else masks
        views = _views_named(model, stored.views, folder)
        _check_base(model, views, masks or {}, stored, folder)
        if masks is not None:
            masks.apply_(model)
        train = stored.train or ("lora" if masks is None else "mask_lora",)
        found = adapt(model, train, masks=masks, views=views, rank=stored.rank, alpha=stored.alpha)
        try:
            found._fill_(stored.tensors, folder, keep=keep)
        except ValueError:
            found.abandon_()
            raise
        return found

    @torch.no_grad()
    def remove_(self) -> None:
        """Takes everything out again, so that the model is the pruned one as before, and another adapter may follow.

        Raises: ValueError for an adaptation that is merged, or that trained parameters of the model in place without
        being loaded with keep=True.
        """
        self._check_alive()
        lost = next((plain.key for plain in self._plain if plain.before is None), None)
        if lost is not None:
            raise ValueError(f"'{lost}' was trained in place, and what it was is gone; use Adaptation.load(keep=True)")
        self.abandon_()
        for plain in self._plain:
            assert plain.before is not None
            plain.parameter.copy_(plain.before)

    @torch.no_grad()
    def abandon_(self) -> None:
        """Takes everything out again after a training that failed; what it trained in place keeps its values.

        Raises: ValueError for an adaptation that is merged.
        """
        self._check_alive()
        self._merged = True
        for plain in self._plain:
            _restore(plain)
        for site in self._sites:
            site.restore()
        self._freeze_as_before()

    def _fill_(self, tensors: Mapping[str, Tensor], folder: str | Path, *, keep: bool) -> None:
        """Puts stored values in place. Raises ValueError for names and shapes that are not the model's."""
        own = self._named()
        shapes = {name: tuple(each.shape) for name, each in own.items()}
        found = {name: tuple(each.shape) for name, each in tensors.items()}
        if shapes != found:
            name = next(iter(sorted(shapes.items() ^ found.items())))[0]
            raise ValueError(f"{folder}: '{name}' is {found.get(name)}; this model has {shapes.get(name)} there")
        if keep:
            self._plain = [
                replace(plain, before=plain.parameter.detach().to(plain.dtype, copy=True)) for plain in self._plain
            ]
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def _named(self) -> dict[str, nn.Parameter]:
        """What is trained, by the names that it is stored under."""
        found = {plain.key: plain.parameter for plain in self._plain}
        for site in self._sites:
            found |= {f"{site.name}.lora_A": site.factors.A, f"{site.name}.lora_B": site.factors.B}
        return found

    def _peft(self, rank: int, alpha: float, base: str) -> dict[str, Any] | None:
        """The config by which peft opens it; None where peft computes otherwise."""
        whole = sorted({plain.key.rpartition(".")[0] for plain in self._plain})
        linear = all(isinstance(site.adapter, LINEAR) for site in self._sites)
        if not linear or not set(self.groups) <= {"norms", "lora", "lora_prune"} or self._kind is None:
            return None
        transposed = any(site.transposed for site in self._sites)
        how = {"base_model_name_or_path": base, "fan_in_fan_out": transposed, "task_type": "CAUSAL_LM"}
        return peft_config([site.name for site in self._sites], whole, rank, alpha, how)

    def _freeze_as_before(self) -> None:
        for parameter, flag in self._requires_grad:
            parameter.requires_grad_(flag)
            parameter.grad = None

    def _check_alive(self) -> None:
        if self._merged:
            raise ValueError("This adaptation is merged already, or removed; call adapt or Adaptation.load again")

    def _check(self) -> None:
        self._check_alive()
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
            counts in the first of head, embeddings, norms, biases. What is pruned and trained itself, as all is by
            "full", is to be trained under `adaptation.held`.
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
    adaptation = Adaptation(groups, total, kind, sites, plain, held, flags, Masks(own))
    log.info("training %s: %d values, %.3f %%", ", ".join(groups), adaptation.trainable, 100 * adaptation.share)
    return adaptation


def _views_named(model: nn.Module, names: Sequence[str], folder: str | Path) -> list[View]:
    """The views of these names. Raises ValueError for one that the model does not have."""
    known = {view.name: view for view in find_layers(model)}
    if not known.keys() >= set(names):  # a head, a router
        known |= {view.name: view for view in find_layers(model, include=["*"])}
    lacking = next((name for name in names if name not in known), None)
    if lacking is not None:
        raise ValueError(f"{folder} adapts '{lacking}', which {type(model).__name__} does not have: another model's")
    return [known[name] for name in names]


def _check_base(
    model: nn.Module, views: Sequence[View], masks: Mapping[str, Tensor], stored: StoredAdapter, folder: str | Path
) -> None:
    parameters = dict(model.named_parameters())
    names = {view.parameter: view.name if view.index is None else view.name.rpartition("[")[0] for view in views}
    for parameter, name in names.items():
        said, mask = stored.prints.get(name), masks.get(parameter)
        other = mask is not None and mask.shape != parameters[parameter].shape
        if said is not None and (other or fingerprint(parameters[parameter], mask) != said):
            raise ValueError(
                f"{folder} was trained on other weights: '{name}' of this model is not what it was. Give the pruned "
                f"model that it belongs on{f', {stored.base}' if stored.base else ''}"
            )


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
        many = counted(len(unmasked), "layer")
        log.warning("many zeros, which will train, are in %s without a mask: %s, ...", many, unmasked[0])


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


@cache
def _follow_fused() -> None:
    """From now on fused optimizers, too, tell autograd that they changed parameters; once in a process."""
    register_optimizer_step_post_hook(_changed)


def _changed(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version(group["params"])


def _restore(plain: _Plain) -> None:
    for item in plain.casts:
        item.remove()
    plain.parameter.data = plain.parameter.data.to(plain.dtype)
