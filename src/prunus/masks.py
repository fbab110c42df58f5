"""Which weights stay: `Masks` maps parameter names to bool tensors in the parameters' own shapes; True is kept.

A mask is a value of its own. It is never read off the weights, because trained weights pass through zero; the one
exception is `infer_masks`, for foreign checkpoints. Pruned entries are stored as +0.0. How a mask is chosen is in
`patterns`.

File: safetensors with one uint8 vector a parameter, 8 entries a byte, lowest bit first, shapes in the metadata.
"""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from torch.utils.hooks import RemovableHandle

from prunus.kernels import uses_kernels
from prunus.machine import counted, local_part, read_tensors, write_tensors

if TYPE_CHECKING:
    from prunus.layers import View

__all__ = ["Masks", "count_kept", "infer_masks", "kept_rows", "pack", "read_packed", "unpack", "unwrapped"]

_FORMAT = "prunus.masks"
_VERSION = "1"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of an element -> its bits
_PACKERS = 8  # threads; each holds one packed mask more
_PACKED = 1 << 24  # entries packed by rows at once: 64 MiB of temporaries
_LARGE = 1 << 22  # entries: a kernel of that many takes longer than its launch


class Masks(Mapping[str, Tensor]):
    """Parameter name (a key of `dict(model.named_parameters())`) -> bool tensor of the parameter's shape; True is kept.

    A parameter without a mask is dense. Raises ValueError for a mask that is not bool.

    >>> masks = Masks({"weight": torch.tensor([[True, False]])})
    >>> masks.sparsity
    0.5
    """

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        for name, mask in masks.items():
            if mask.dtype != torch.bool:
                raise ValueError(f"mask of '{name}' must be bool (True is kept), got {mask.dtype}")
        self._masks = dict(masks)

    @classmethod
    def of(cls, views: Iterable[View], matrices: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]) -> Masks:
        """Masks from matrices (view name -> bool (out, in)) and parameter shapes (parameter name -> shape).

        Views of one stacked parameter fill one mask; its experts without a matrix stay dense. Raises ValueError when
        a matrix belongs to none of the views.
        """
        by_name = {view.name: view for view in views}
        whole: dict[str, Tensor] = {}
        for name, matrix in matrices.items():
            if name not in by_name:
                raise ValueError(f"'{name}' is not one of the {len(by_name)} views{_close(name, by_name)}")
            view = by_name[name]
            if view.parameter not in whole:
                whole[view.parameter] = torch.ones(
                    tuple(shapes[view.parameter]), dtype=torch.bool, device=matrix.device
                )
            view.write_(whole[view.parameter], matrix)
        return cls(whole)

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __repr__(self) -> str:
        return f"Masks({counted(len(self), 'parameter')}, sparsity {self.sparsity:.4f})"

    def __eq__(self, other: object) -> bool:
        """Whether both name the same parameters and keep the same entries, wherever they are stored."""
        if not isinstance(other, Masks):
            return NotImplemented
        return self.keys() == other.keys() and all(torch.equal(self[name].cpu(), other[name].cpu()) for name in self)

    def __and__(self, other: Masks) -> Masks:
        """What both keep; a parameter that only one of them names has that one's mask."""
        joined = {**self, **other}
        for name in self.keys() & other.keys():
            if self[name].shape != other[name].shape:
                raise ValueError(f"masks of '{name}' have shapes {_shape(self[name])} and {_shape(other[name])}")
            joined[name] = self[name] & other[name].to(self[name].device)
        return Masks(joined)

    @property
    def sparsity(self) -> float:
        """Share of zeros over the masked parameters; 0 without any."""
        counts = self.table().values()
        return sum(total - kept for kept, total in counts) / max(1, sum(total for _, total in counts))

    def table(self) -> dict[str, tuple[int, int]]:
        """Parameter name -> (entries kept, entries)."""
        return {name: (count_kept(mask), mask.numel()) for name, mask in self.items()}

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the pruned entries of `model` to +0.0, on whatever device and in whatever dtype they are.

        Raises ValueError, before anything changes, for a parameter that is missing, on meta, or of another shape.
        """
        for parameter, pruned in self._pairs(model):
            local_part(parameter).masked_fill_(pruned, 0.0)

    def check(self, model: nn.Module) -> None:
        """Raise ValueError naming the first parameter of `model` that is nonzero where its mask prunes."""
        for name, (parameter, pruned) in zip(self, self._pairs(model), strict=True):
            wrong = int(((local_part(parameter.detach()) != 0) & pruned).sum())
            if wrong:
                raise ValueError(
                    f"'{name}' has {wrong} nonzero weights under its mask: something changed them after pruning. "
                    "Train with masks.hold(model, optimizer), or call masks.apply_(model)"
                )

    def hold(self, model: nn.Module, optimizer: Optimizer) -> Hold:
        """Keep pruned entries of `model` at +0.0: after every step of `optimizer` they and its state are zeroed there.

        State is every float tensor of the parameter's shape (momentum, Adam's moments); those of 8 bits stay. Masking
        gradients instead leaks: momentum and weight decay move pruned weights. NaN and infinities vanish under the mask
        too. Nothing waits for the device, and the work of a step is recorded by a CUDA graph. On a GPU a fused AdamW
        steps and zeroes at once.
        `model` may be compiled, replicated (DistributedDataParallel) or sharded (fully_shard, done before this call):
        masks keep the ordinary names. Wrapped optimizers (accelerate) need their inner torch optimizer here.
        Returns a handle whose `remove()` lets go. Applies the masks once at once. Raises as `apply_`.
        """
        found = self._pruned(model)
        pruned = {key: gone for key, (_, gone) in found.items()}
        fused = _is_fused([parameter for parameter, _ in found.values()], optimizer)
        held = tuple(_Held(parameter, gone, wide=not fused) for parameter, gone in found.values())
        taken: set[int] = set()

        @torch.no_grad()
        def reapply(stepped: Optimizer, *_: Any) -> None:
            _zero_pruned_([each for each in held if id(each.parameter) not in taken], stepped)
            taken.clear()

        def take(stepped: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if all(closure is None for closure in (*args[1:], *kwargs.values())):
                from prunus.kernels import adamw_

                taken.update(adamw_(stepped, pruned))

        reapply(optimizer)
        before = [optimizer.register_step_pre_hook(take)] if fused else []
        return Hold((*before, optimizer.register_step_post_hook(reapply)), model, optimizer, held)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the masks bit-packed; the file appears complete or not at all."""
        shapes = json.dumps({name: list(mask.shape) for name, mask in self.items()})
        with ThreadPoolExecutor(_PACKERS) as pool:  # masks of 30 GB take one core long, and numpy lets others run
            packed = dict(zip(self, pool.map(lambda mask: pack(mask.cpu().flatten()), self.values()), strict=True))
        write_tensors(Path(path), packed, {"format": _FORMAT, "version": _VERSION, "shapes": shapes})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Masks:
        """The masks of a file written by `save`, on the CPU.

        Raises FileNotFoundError, or ValueError for a file that is damaged, foreign, or of a newer version.
        """
        packed, metadata = read_tensors(path)
        _check_metadata(path, metadata)
        try:
            shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged: its shapes are no JSON ({error})") from None
        if shapes.keys() != packed.keys():
            raise ValueError(f"{path} is damaged: its shapes and its tensors have different names")
        return cls({name: read_packed(packed[name], shape, f"{path}: {name}") for name, shape in shapes.items()})

    def _pruned(self, model: nn.Module) -> dict[int, tuple[Tensor, Tensor]]:
        """Id of a parameter -> itself and its pruned entries; a tied one may have masks under several names."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for parameter, gone in self._pairs(model):
            key = id(parameter)
            found[key] = parameter, found[key][1] | gone if key in found else gone
        return found

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """Each masked parameter with the bool tensor of its pruned entries (of this rank's part), all checked before.

        One at a time, because masks on the CPU may be larger than what is left of the parameters' device.
        """
        parameters = _parameters(model)
        found = {name: parameters.get(name, parameters.get(own_name(name))) for name in self}
        checked: list[tuple[Tensor, Tensor]] = []
        for name, mask in self.items():
            parameter = found[name]
            if parameter is None:
                raise ValueError(f"the model has no parameter '{name}', which the masks name{_close(name, parameters)}")
            if parameter.is_meta:
                raise ValueError(f"'{name}' is on the meta device: load its weights before masking them")
            if parameter.shape != mask.shape:
                raise ValueError(
                    f"'{name}' has shape {_shape(parameter)}, its mask {_shape(mask)}: "
                    "the masks belong to another model"
                )
            checked.append((parameter, mask))
        for parameter, mask in checked:
            yield parameter, (~_as_placed(mask, parameter)).contiguous()  # for kernels; a mask may be transposed


@dataclass(frozen=True)
class Hold:
    """What keeps pruned entries at zero, until `remove()`."""

    handles: tuple[RemovableHandle, ...]
    model: nn.Module
    optimizer: Optimizer
    held: tuple[_Held, ...]

    def remove(self) -> None:
        """Let go."""
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def change_(self, masks: Masks) -> None:
        """Hold other masks of the same parameters from now on, in the very tensors that a recorded step reads.

        Raises ValueError for masks of other parameters, before anything changes, and as `apply_`.
        """
        pruned = masks._pruned(self.model)
        if pruned.keys() != {id(each.parameter) for each in self.held}:
            raise ValueError(f"masks of {len(pruned)} parameters cannot follow on those of {len(self.held)} others")
        for each in self.held:
            each.change_(pruned[id(each.parameter)][1])
        _zero_pruned_(self.held, self.optimizer)


def _is_fused(parameters: Iterable[Tensor], optimizer: Optimizer) -> bool:
    """Whether a program takes an optimizer's steps of pruned parameters, with their masks."""
    if not all(type(each) is nn.Parameter and uses_kernels(each) for each in parameters):
        return False
    from prunus.kernels import takes_steps

    return takes_steps(optimizer)


class _Held:
    """A parameter whose pruned entries are kept at zero, with the mask in the form that is fastest to apply.

    The bits of a float, times the integer 0, are +0.0 whatever it was, NaN and -0.0 too; times 1 they stay; and one
    kernel multiplies many tensors. Large parameters are filled one by one: a launch is nothing to them, but a mask of 4
    bytes an entry is; so are those (not `wide`) that a program steps.
    """

    def __init__(self, parameter: Tensor, pruned: Tensor, *, wide: bool) -> None:
        self.parameter, self.pruned = parameter, pruned
        local = local_part(parameter.detach())
        self.integer = _INTEGERS.get(local.element_size()) if wide and local.numel() <= _LARGE else None
        kept = None if self.integer is None else torch.empty_like(local, dtype=self.integer).copy_(~pruned)
        self.kept = kept  # in the parameter's memory format

    def change_(self, pruned: Tensor) -> None:
        """Hold other entries, in place."""
        self.pruned.copy_(pruned)
        if self.kept is not None:
            self.kept.copy_(~pruned)

    def tensors(self, optimizer: Optimizer) -> list[Tensor]:
        """This rank's part of the parameter and of the optimizer's state of its shape."""
        state = optimizer.state.get(self.parameter, {}).values()
        floats = [each for each in state if isinstance(each, Tensor) and each.is_floating_point()]
        alike = [each for each in floats if each.shape == self.parameter.shape]
        return [local_part(each) for each in (self.parameter, *alike)]


def _zero_pruned_(held: Sequence[_Held], optimizer: Optimizer) -> None:
    groups: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
    for each in held:
        for tensor in each.tensors(optimizer):
            plain = type(tensor) in (Tensor, nn.Parameter)
            if each.kept is not None and plain and tensor.element_size() == each.kept.element_size():
                values, kept = groups.setdefault((tensor.device, each.kept.dtype), ([], []))
                values.append(tensor.view(each.kept.dtype))
                kept.append(each.kept)
            else:
                tensor.masked_fill_(each.pruned, 0.0)
    for values, kept in groups.values():
        torch._foreach_mul_(values, kept)  # pyright: ignore[reportPrivateImportUsage]


def count_kept(mask: Tensor) -> int:
    """How many entries of a bool tensor are True, on the CPU 30 times faster than its sum.

    >>> count_kept(torch.tensor([True, False]))
    1
    """
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.count_nonzero())


def infer_masks(state: Mapping[str, Tensor]) -> Masks:
    """Masks that keep what is not exactly zero, for a foreign checkpoint that came without masks.

    The only place where zeros are read as pruned; a weight that training left at zero is taken for pruned too.
    state: the pruned parameters alone (name -> weight), not embeddings or biases.

    >>> infer_masks({"weight": torch.tensor([0.0, 1.0])})["weight"].tolist()
    [False, True]
    """
    return Masks({name: weight != 0 for name, weight in state.items()})


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter under its name in `model` and under its name in the ordinary module that `model` wraps."""
    named = dict[str, Tensor](model.named_parameters(remove_duplicate=False))
    return {own_name(name): each for name, each in unwrapped(model).named_parameters(remove_duplicate=False)} | named


def unwrapped(model: nn.Module) -> nn.Module:
    """The ordinary module inside those that torch.compile, (Distributed)DataParallel and AveragedModel make.

    >>> unwrapped(nn.DataParallel(nn.Linear(2, 2)))
    Linear(in_features=2, out_features=2, bias=True)
    """
    around = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel, AveragedModel))
    inner = dict(model.named_children()).get("module" if around else "_orig_mod")
    return model if inner is None else unwrapped(inner)


def own_name(name: str) -> str:
    """A parameter's name without what torch.compile of a submodule, or a parametrization, put into it.

    >>> own_name("0.parametrizations.weight.original"), own_name("_orig_mod.0.weight")
    ('0.weight', '0.weight')
    """
    parts = name.removesuffix(".original").split(".") if ".parametrizations." in f".{name}" else name.split(".")
    return ".".join(part for part in parts if part not in ("_orig_mod", "parametrizations"))


def _as_placed(mask: Tensor, parameter: Tensor) -> Tensor:
    """The mask's entries for this rank's part of the parameter, on its device. Nothing is sent: all ranks have it."""
    if type(parameter) not in (Tensor, nn.Parameter):
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(parameter, DTensor):
            mask = mask.to(parameter.device)
            return distribute_tensor(mask, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return mask.to(parameter.device)


def read_packed(packed: Tensor, shape: Sequence[int], place: str) -> Tensor:
    """The mask of this shape that is stored as `pack(mask.flatten())`. Raises ValueError that names a damaged place."""
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.shape != ((count + 7) // 8,):
        raise ValueError(f"{place} is damaged: {tuple(packed.shape)} {packed.dtype} cannot hold {count} bits")
    return unpack(packed, count).view(tuple(shape))


def _check_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != _FORMAT or "shapes" not in metadata:
        raise ValueError(
            f"{path} does not hold Prunus masks (its metadata says format={metadata.get('format')!r}). "
            "Masks of a foreign checkpoint come from infer_masks"
        )
    if metadata.get("version") != _VERSION:
        raise ValueError(f"{path} has masks of version {metadata.get('version')!r}; this Prunus reads {_VERSION!r}")


def _close(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f"; close names: {', '.join(close)}" if close else ""


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


# Bits: 8 entries a byte, lowest bit first. A matrix is packed by rows, every row starting in a byte of its own: beside
# a weight of 16 bits it costs a sixteenth of it, in memory and whenever it is read.


def pack(mask: Tensor) -> Tensor:
    """(..., columns) bool -> (..., ceil(columns / 8)) uint8.

    >>> pack(torch.tensor([[True, False, True], [False, False, False]])).tolist()
    [[5], [0]]
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask.numpy(), axis=-1, bitorder="little"))
    *rows, columns = mask.shape
    width = -(-columns // 8)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    packed = [
        (nn.functional.pad(part.to(torch.uint8), (0, 8 * width - columns)).view(-1, width, 8) * weights).sum(-1)
        for part in mask.reshape(-1, columns).split(max(1, _PACKED // max(1, columns)))  # (rows, bytes, 8)
    ]
    return torch.cat(packed).to(torch.uint8).view(*rows, width)


def unpack(packed: Tensor, columns: int) -> Tensor:
    """(..., ceil(columns / 8)) uint8 -> (..., columns) bool.

    >>> unpack(torch.tensor([[5]], dtype=torch.uint8), 3).tolist()
    [[True, False, True]]
    """
    if packed.device.type == "cpu":
        bits = np.unpackbits(packed.numpy(), axis=-1, count=columns, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    bytes_ = _table(packed.device).index_select(0, packed.flatten().int())  # 8 entries each
    return bytes_.view(torch.bool).view(*packed.shape[:-1], -1)[..., :columns]


@cache
def _table(device: torch.device) -> Tensor:
    """Byte -> its 8 entries, as the 8 bytes of an integer; brought to a device once, which no recorded step may do."""
    bits = (torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten().to(device)


def kept_rows(mask: Tensor, rows: slice, columns: int) -> Tensor:
    """The rows of a mask as bool, be it packed or bool already.

    >>> kept_rows(torch.ones(3, 4, dtype=torch.bool), slice(0, 2), 4).shape
    torch.Size([2, 4])
    """
    return unpack(mask[rows], columns) if mask.dtype == torch.uint8 else mask[rows]
