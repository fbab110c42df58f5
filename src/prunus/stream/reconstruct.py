"""Fit a pruned block to its dense outputs: the whole block, its halves, or one matrix at a time.

    minimise over the chosen parameters   mean ||f_W(x) - t||^2 / mean ||t||^2

x are the outputs of the blocks already pruned and fitted; t = f_W*(x) with the dense weights W* on the same x
(`inputs="pruned"`, as the PERP code does) or on the dense network's own x (`inputs="dense"`). A window that holds a
nonlinearity is fitted better than a single matrix.
"""

from __future__ import annotations

import copy
import logging
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunus.adapt import ADAPTERS, Adaptation, adapt, find_subset
from prunus.blocks import Arguments, find_blocks, run_block
from prunus.layers import View
from prunus.machine import Precision, autocast
from prunus.masks import Masks
from prunus.train import Capture, StandIns, Trained, linear_warmup_decay, seeded, train, unrecordable

__all__ = ["Fit", "Passing", "check_fit", "reconstruct"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """How a pruned block is fitted.

    window: what is fitted at once. "block"; "half": each child of the block that holds pruned layers (attention, MLP),
        loose layers through the whole block; "matrix": each pruned layer for itself.
    train: parameter subsets, as in `adapt`.
    inputs: whether targets come from the dense block on the pruned network's inputs or on the dense network's.
    steps: optimizer steps a window, each on one calibration batch; lr: peak learning rate of AdamW.

    >>> Fit(window="half", train=("mask_lora",), steps=32).lr
    0.0001
    """

    window: Literal["block", "half", "matrix"] = "block"
    train: tuple[str, ...] = ("full",)
    inputs: Literal["pruned", "dense"] = "pruned"
    steps: int = 64
    lr: float = 1e-4
    warmup: float = 0.1
    rank: int = 16
    alpha: float = 32.0
    init: Literal["kaiming", "gaussian"] = "kaiming"
    precision: Precision = "fp32"
    seed: int = 0


@dataclass(frozen=True)
class _Unit:
    """A module that is fitted at once: its path below the block ("" is the block), the children that may change (None:
    all) and the parameters, by their names in it, that may not."""

    path: str
    views: list[View]
    free: tuple[str, ...] | None = None
    fixed: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Passing:
    """What runs through a block, per batch: hidden (b, length, d), which enters the pruned block; the other arguments
    of the call; targets, what the dense block gave; dense, what entered the dense block where that is another."""

    hidden: Sequence[Tensor]
    arguments: Sequence[Arguments]
    targets: Sequence[Tensor]
    dense: Sequence[tuple[Tensor, Arguments]] | None


Example = dict[str, Any]  # target: (b, ..., d); args, kwargs: what the unit receives


def reconstruct(
    block: nn.Module,
    dense: nn.Module,
    fit: Fit,
    passing: Passing,
    *,
    views: Sequence[View],
    masks: Masks,
    prefix: str,
    fixed: Sequence[str] = (),
    stand_ins: StandIns | None = None,
) -> tuple[float, float]:
    """The block's relative squared output error before and after it was fitted in place.

    block, dense: the pruned block and its dense twin on one device; prefix: the block's name in the model. views: its
    pruned layers; a block without one stays as it is. fixed: parameters, by their names in the block, that stay.
    stand_ins: of the blocks before, through which this one is fitted where it is like them; by default their steps are
    recorded anew. A window whose fit ends worse than it began is put back.

    Raises ValueError when a subset of `fit.train` is empty in a window (norms of an attention half).
    """
    stand_ins = StandIns(wanted=False) if stand_ins is None else stand_ins
    stand_ins.next_block()
    whole: list[Example] = [
        {"target": target, "args": (x, call), "kwargs": {}}
        for x, call, target in zip(passing.hidden, passing.arguments, passing.targets, strict=True)
    ]
    units = [_fixing(unit, fixed) for unit in _units(block, views, fit.window, prefix)]
    units = [unit for unit in units if _is_trained(block, unit, fit.train)]
    if len(units) == 1 and units[0].path == "":
        return _fit_(block, units[0], whole, stand_ins, masks=masks, fit=fit, prefix=prefix)
    holder = _Holder(block)
    before = _error(holder, whole, fit.precision)
    for unit in units:
        with autocast(_device(block), fit.precision):
            examples = whole if unit.path == "" else _examples(block, dense, unit, passing)
        _fit_(block, unit, examples, stand_ins, masks=masks, fit=fit, prefix=prefix)
    return before, _error(holder, whole, fit.precision)


def check_fit(model: nn.Module, views: Sequence[View], train: Sequence[str], window: str) -> None:
    """Raise ValueError for parameters that a unit which is fitted does not have; the model may be empty.

    >>> check_fit(model, find_layers(model), ["norms"], "block")
    """
    for prefix in find_blocks(model):
        block, own = model.get_submodule(prefix), [view for view in views if view.name.startswith(f"{prefix}.")]
        for unit in _units(block, own, window, prefix) if own else []:
            for name in (each for each in train if each not in ADAPTERS):
                find_subset(block.get_submodule(unit.path), name)


def _units(block: nn.Module, views: Sequence[View], window: str, prefix: str) -> list[_Unit]:
    if window == "block":
        return [_Unit("", list(views))] if views else []
    groups: dict[str, list[View]] = {}
    for view in views:
        path = _owner(view, prefix)
        groups.setdefault(path if window == "matrix" else path.split(".")[0], []).append(view)
    if window == "matrix":
        return [_Unit(path, found) for path, found in groups.items()]
    loose = [path for path, found in groups.items() if any(_owner(view, prefix) == path for view in found)]
    units = [_Unit(path, found) for path, found in groups.items() if path not in loose]
    if loose:
        free = tuple(name for name, _ in block.named_children() if name in loose or name not in groups)
        units.append(_Unit("", [view for path in loose for view in groups[path]], free))
    return units


def _fixing(unit: _Unit, fixed: Sequence[str]) -> _Unit:
    """The unit with those of a block's fixed parameters that it has."""
    inside = f"{unit.path}." if unit.path else ""
    return replace(unit, fixed=tuple(name.removeprefix(inside) for name in fixed if name.startswith(inside)))


def _is_trained(block: nn.Module, unit: _Unit, train: Sequence[str]) -> bool:
    """Whether anything of a unit may change."""
    module, fixed = block.get_submodule(unit.path), set(unit.fixed)
    return any(name in ADAPTERS or not find_subset(module, name).keys() <= fixed for name in train)


def _owner(view: View, prefix: str) -> str:
    """Path below the block of the module that holds the view's parameter."""
    return view.parameter.removeprefix(prefix + ".").rpartition(".")[0]


@torch.no_grad()
def _examples(
    block: nn.Module,
    dense: nn.Module,
    unit: _Unit,
    passing: Passing,
) -> list[Example]:
    """What a part of the block receives in the pruned block, with the dense part's answer."""
    examples: list[Example] = []
    own = list(zip(passing.hidden, passing.arguments, strict=True))
    for (x, call), other in zip(own, passing.dense or own, strict=True):
        [(args, kwargs)] = _calls(block, unit.path, lambda x=x, call=call: run_block(block, x, call))
        if other[0] is x:
            target = _first(dense.get_submodule(unit.path)(*args, **kwargs))
        else:
            [target] = _outputs(dense, unit.path, lambda other=other: run_block(dense, *other))
        home = x.device
        examples.append({"target": target.to(home), "args": _to(args, home), "kwargs": _to(kwargs, home)})
    return examples


def _calls(block: nn.Module, path: str, run: Callable[[], object]) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = block.get_submodule(path).register_forward_pre_hook(
        lambda _module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        run()
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ValueError(
            f"{path!r} is called {len(seen)} times in one forward of its block; fit the window 'block' instead"
        )
    return seen


def _outputs(block: nn.Module, path: str, run: Callable[[], object]) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = block.get_submodule(path).register_forward_hook(lambda _module, _args, output: seen.append(_first(output)))
    try:
        run()
    finally:
        handle.remove()
    return seen


def _fit_(
    block: nn.Module,
    unit: _Unit,
    examples: list[Example],
    stand_ins: StandIns,
    *,
    masks: Masks,
    fit: Fit,
    prefix: str,
) -> tuple[float, float]:
    """Relative error of one unit before and after its fit in place; its weights are put back when the error grew."""
    module = block.get_submodule(unit.path)
    holder = _Holder(module)
    place = f"{prefix}.{unit.path}" if unit.path else prefix
    before = _error(holder, examples, fit.precision)
    saved = {name: value.detach().clone() for name, value in module.state_dict().items()}
    _train_(holder, unit, examples, stand_ins, masks=masks, fit=fit, place=place)
    after = _error(holder, examples, fit.precision)
    if after <= before:
        return before, after
    log.warning("%s: the fit raised the error from %.3g to %.3g; weights put back", place, before, after)
    module.load_state_dict(saved)
    return before, before


def _train_(
    holder: nn.Module,
    unit: _Unit,
    examples: list[Example],
    stand_ins: StandIns,
    *,
    masks: Masks,
    fit: Fit,
    place: str,
) -> None:
    local = replace(unit, views=[_local(view, place) for view in unit.views])
    device = _device(holder)
    own = Masks({_within(view.parameter, place): masks[view.parameter].to(device) for view in unit.views})
    seed = fit.seed + zlib.crc32(place.encode())

    def run(trained: Trained, capture: Capture) -> None:
        train(
            trained.model,
            _order(examples, seed),
            trained.optimizer,
            linear_warmup_decay(fit.steps, fit.warmup),
            steps=fit.steps,
            loss=_loss,
            masks=trained.masks,
            precision=fit.precision,
            capture=capture,
            shared=False,  # an example's masks and positions are for the whole batch
        )

    def loss(model: nn.Module, example: Example) -> Tensor:
        with autocast(device, fit.precision):
            return _loss(model, example)

    stand_in = None
    if not unrecordable(device, scaled=fit.precision == "fp16"):
        copied = partial(_prepare, unit=local, fit=fit, seed=seed)
        how = local.free, local.fixed, tuple(local.views)
        stand_in = stand_ins.find(holder, how, examples[0], lambda: copied(*copy.deepcopy((holder, own)))[1])
    adaptation, trained = _prepare(holder, own, local, fit, seed)
    try:
        with seeded(seed, device):  # as if no block had been fitted before
            stand_ins.train_(stand_in, trained, loss, run, examples[0])
    except BaseException:
        adaptation.abandon_()
        raise
    adaptation.merge_()


def _prepare(holder: nn.Module, own: Masks, unit: _Unit, fit: Fit, seed: int) -> tuple[Adaptation, Trained]:
    """What is trained of a unit, and how; views and masks bear names below the holder."""
    adaptation = adapt(
        holder,
        fit.train,
        masks=own,
        views=unit.views,
        rank=fit.rank,
        alpha=fit.alpha,
        init=fit.init,
        generator=torch.Generator().manual_seed(seed),
    )
    groups = adaptation.param_groups(fit.lr)
    parts = ["unit"] if unit.free is None else [f"unit.{child}" for child in unit.free]
    free = {id(p) for part in parts for p in holder.get_submodule(part).parameters()}
    free -= {id(holder.get_parameter(f"unit.{name}")) for name in unit.fixed}
    groups = [{**group, "params": [p for p in group["params"] if id(p) in free]} for group in groups]
    groups, cuda = [group for group in groups if group["params"]], _device(holder).type == "cuda"
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, capturable=cuda, fused=cuda or None)
    return adaptation, Trained(holder, optimizer, adaptation.held)


class _Holder(nn.Module):
    """Maps an example to a unit's output. The unit is a child, so that a lone matrix can be replaced as others are."""

    def __init__(self, unit: nn.Module) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, example: Example) -> Tensor:
        """The unit's output (b, ..., d) on the unit's device."""
        device = _device(self)
        args, kwargs = example["args"], example["kwargs"]
        if all(p.dtype == torch.float32 for p in self.unit.parameters()):  # "full" trains a 16-bit unit in float32
            args, kwargs = _float(args), _float(kwargs)
        if len(args) == 2 and isinstance(args[1], Arguments):
            return run_block(self.unit, args[0], args[1])
        return _first(self.unit(*_to(args, device), **_to(kwargs, device)))


def _local(view: View, place: str) -> View:
    """The view under its names below the holder of a unit at this place."""
    return replace(view, name=_within(view.name, place), parameter=_within(view.parameter, place))


def _within(name: str, place: str) -> str:
    return "unit" + name.removeprefix(place)


def _order(examples: Sequence[Example], seed: int) -> Callable[[int], Example]:
    """Step -> example, in a new order each epoch, a function of (seed, step) alone."""
    n = len(examples)

    def at(step: int) -> Example:
        epoch, place = divmod(step, n)
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed + epoch))
        return examples[int(order[place])]

    return at


def _loss(holder: nn.Module, example: Example) -> Tensor:
    target = example["target"].to(_device(holder)).float()
    output = holder(example).float()
    return (output - target).square().mean() / target.square().mean().clamp_min(1e-12)


def _float(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, tree)


@torch.no_grad()
def _error(holder: nn.Module, examples: Sequence[Example], precision: Precision) -> float:
    """Relative squared error over all examples."""
    with autocast(_device(holder), precision):
        return _relative((holder(example), example["target"]) for example in examples)


def _relative(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    wrong = scale = torch.zeros((), dtype=torch.float64)
    for output, target in pairs:
        target = target.to(output.device)
        wrong = wrong + (output.float() - target.float()).square().sum(dtype=torch.float64).cpu()
        scale = scale + target.float().square().sum(dtype=torch.float64).cpu()
    return float(wrong / scale.clamp_min(1e-30))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _to(tree: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), tree)


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device
