"""What a network costs, dense and sparse, in operations, parameters and energy; and how far its weights have moved.

The speed-up is theoretical: operations that a machine would save that skips every pruned weight, and nothing else.
"""

from __future__ import annotations

import copy
import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from prunus.blocks import uncompiled
from prunus.machine import called, in_mode
from prunus.masks import Masks


@dataclass(frozen=True)
class Cost:
    """What `cost` counts: floating-point operations of one forward pass (two for a multiply-add), and parameters.

    speedup: dense_flops / sparse_flops. nonzero: parameters that no mask prunes.

    >>> Cost(200, 50, 4.0, 10, 4).speedup
    4.0
    """

    dense_flops: int
    sparse_flops: int
    speedup: float
    parameters: int
    nonzero: int


@torch.no_grad()
def cost(model: nn.Module, x: Tensor, masks: Masks | None = None) -> Cost:
    """The Cost of `model` for the batch x, with and without `masks`.

    torch counts the matrix products and convolutions of each module (FlopCounterMode; not norms, activations or
    additions). A module's own operations are multiplied by the share that its masked parameters keep; those of modules
    without a mask, and of attention between activations, stay whole. The model runs in evaluation mode.
    Raises ValueError for a mask of a parameter that the model has not (give the original of a compiled model).

    >>> masks = Masks({"weight": torch.tensor([[True, False], [False, False]])})
    >>> cost(nn.Linear(2, 2), torch.zeros(1, 2), masks)
    Cost(dense_flops=8, sparse_flops=2, speedup=4.0, parameters=6, nonzero=3)
    """
    masks = Masks({}) if masks is None else masks
    return cost_under(own_flops(model, x), model, masks)


def cost_under(dense: Mapping[str, int], model: nn.Module, masks: Masks) -> Cost:
    """What `cost` gives, of operations that were counted before. dense: module name -> its own, as by `own_flops`.

    Raises as `cost`.

    >>> cost_under({"": 8}, nn.Linear(2, 2), Masks({"weight": torch.tensor([[True, False], [False, False]])})).speedup
    4.0
    """
    parameters, tables = dict(model.named_parameters(remove_duplicate=False)), masks.table()
    for name in masks:
        if name not in parameters:
            raise ValueError(f"the model has no parameter '{name}'; give the model that the masks are of, not compiled")
    counted = {id(parameters[name]): counts for name, counts in tables.items()}  # a weight may have several names
    sparse = 0.0
    for module, flops in dense.items():
        own = model.get_submodule(module).parameters(recurse=False)
        inside = [counted[id(parameter)] for parameter in own if id(parameter) in counted]
        kept, entries = sum(kept for kept, _ in inside), sum(entries for _, entries in inside)
        sparse += flops * kept / entries if entries else flops
    total, whole = sum(dense.values()), sum(parameter.numel() for parameter in model.parameters())
    pruned = sum(entries - kept for kept, entries in tables.values())
    return Cost(total, round(sparse), total / sparse if sparse else math.inf, whole, whole - pruned)


@torch.no_grad()
def flops_of(model: nn.Module, x: Tensor) -> int:
    """The floating-point operations of one forward pass over x, as `cost` counts them, for the model as a whole.

    Counted on shapes alone: nothing is computed, and other threads are not disturbed.

    >>> flops_of(nn.Linear(2, 3), torch.zeros(1, 2))
    12
    """
    shapes = copy.deepcopy(model).to("meta").eval()
    counter = _Counter()
    with counter:
        shapes(x.to("meta"))
    return counter.total


def weight_change(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> float:
    """||after - before||_2 / ||before||_2 over all tensors together, summed in float64; infinite where nothing was.

    Integer tensors (counters) are left out. Raises ValueError when the names or shapes differ.

    >>> weight_change({"w": torch.tensor([3.0, 4.0])}, {"w": torch.tensor([3.0, 4.5])})
    0.1
    """
    if before.keys() != after.keys():
        raise ValueError(f"weights have different names: {sorted(before.keys() ^ after.keys())[:3]} are in one only")
    moved = whole = 0.0
    for name, old in before.items():
        if after[name].shape != old.shape:
            raise ValueError(f"'{name}' has shape {tuple(old.shape)} before and {tuple(after[name].shape)} after")
        if old.is_floating_point():
            old = old.detach().double()
            moved += float((after[name].detach().to(old.device).double() - old).square().sum())
            whole += float(old.square().sum())
    if not whole:
        return math.inf if moved else 0.0
    return math.sqrt(moved / whole)


class Energy:
    """Context that measures the joules that the current GPU spends inside it, whatever else runs there too.

    `joules` is None until the end, and where no NVIDIA driver tells (a CPU, an old GPU).

    >>> with Energy() as energy:
    ...     pass
    >>> energy.joules is None or energy.joules >= 0
    True
    """

    def __init__(self) -> None:
        self.joules: float | None = None
        self._start: float | None = None

    def __enter__(self) -> Energy:
        self.joules, self._start = None, _joules_so_far()
        return self

    def __exit__(self, *_: object) -> None:
        now = _joules_so_far()
        if now is not None and self._start is not None:
            self.joules = now - self._start


class _Counter(TorchDispatchMode):
    """Sums up the operations of what torch knows to count; a mode of this thread alone, without module hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.total += int(count(*args, **(kwargs or {}), out_val=out))
        return out


def own_flops(model: nn.Module, x: Any) -> dict[str, int]:
    """Module name -> operations of its own forward, without that of modules inside it. x: a tensor, or keywords."""
    with in_mode(model, training=False), uncompiled(model) as plain, FlopCounterMode(display=False) as counter:
        called(plain, x)
    root = type(model).__name__
    found = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    names = [name for name, _ in model.named_modules()]
    whole = {name: found.get(f"{root}.{name}" if name else root, 0) for name in names}
    own = dict(whole)
    for name in names[1:]:
        own[name.rpartition(".")[0]] -= whole[name]
    return own


def _joules_so_far() -> float | None:
    """Energy that the current GPU has spent since its driver was loaded."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    try:
        driver: Any = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    handle, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}".encode()
    failed = (
        driver.nvmlInit_v2()
        or driver.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle))
        or driver.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(millijoules))
    )
    return None if failed else millijoules.value / 1000
