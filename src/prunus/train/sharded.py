"""A model sharded over the launched processes while it is trained (FSDP2), and the ordinary one again afterwards.

`fully_shard` changes modules for good, so a twin is sharded: the same tree of modules around the same parameters, whose
own data are given up meanwhile. Each rank then holds 1/n of every parameter, gradient and optimizer state, and one
block in full; at the end the shards are gathered into the parameters that were there before.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunus.blocks import find_blocks, find_recomputing
from prunus.machine import imported, ranks


def asked() -> bool:
    """Whether `accelerate launch --use_fsdp` asked for sharding. Raises ValueError for its first version."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise ValueError("models are sharded by FSDP2: launch with --use_fsdp --fsdp_version 2")
    return True


def check_whole(model: nn.Module) -> None:
    """Raises ValueError for a model that is sharded already, of whose weights this process has a part."""
    part = imported("torch.distributed.tensor", "DTensor")
    name = next((name for name, each in model.named_parameters() if isinstance(each, part)), None)
    if name is not None:
        raise ValueError(
            f"{name!r} is sharded: give the model as it was before fully_shard; train shards it meanwhile, where it is "
            "launched with --use_fsdp --fsdp_version 2, and without methods that take part"
        )


@contextmanager
def sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> Generator[nn.Module]:
    """A twin of `model` whose parameters are sharded, which `optimizer` trains meanwhile; every rank enters alike.

    On leaving, also after an error that all ranks have, the model has its parameters back with the values that were
    reached, and the optimizer trains them, without state. Nothing may be done with the model itself meanwhile: it has
    no weights. Raises ValueError for an optimizer that has state already; RuntimeError where this rank fails alone, so
    that nothing can be gathered: the model is lost, and the process should end.
    """
    if optimizer.state:
        raise ValueError("an optimizer that has stepped already cannot be sharded: make a new one")
    twin = _twin(model)
    own = dict(model.named_parameters())
    _shard_(twin, own)
    parts = dict(twin.named_parameters())
    _swap_(optimizer, {id(parameter): parts[name] for name, parameter in own.items()})
    mine: BaseException | None = None
    try:
        yield twin
    except BaseException as error:
        mine = None if ranks.all_failed() else error
        raise
    finally:
        if mine is not None:  # the others would wait in another collective than the one that gathers
            raise RuntimeError("this process failed alone, and the sharded model cannot be gathered") from mine
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.data = whole(parts[name]).detach()
        _swap_(optimizer, {id(parts[name]): parameter for name, parameter in own.items()})
        optimizer.state.clear()


@contextmanager
def unsent(twin: nn.Module) -> Generator[None]:
    """Context in which gradients of a sharded twin stay where they are formed; those of another model always do."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(twin, FSDPModule):
        yield
        return
    twin.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        twin.set_requires_gradient_sync(True)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered from all ranks, each of which has to ask; an ordinary one itself."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """A whole tensor, which every rank has, sharded as `part` is; itself where that is an ordinary one."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(part, DTensor):
        return tensor
    return distribute_tensor(tensor.to(part.device), part.device_mesh, part.placements, src_data_rank=None)


def _twin(model: nn.Module) -> nn.Module:
    """The same tree of modules, hooks and parametrizations around the very tensors of `model`."""
    shared: dict[int, object] = {}
    for module in model.modules():
        held = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        shared |= {id(each): each for each in held if isinstance(each, Tensor)}
    return copy.deepcopy(model, shared)


def _shard_(twin: nn.Module, own: dict[str, nn.Parameter]) -> None:
    """Shards block by block, so that each rank holds one block twice at most, and frees the data of `own` behind it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(iter(own.values())).device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for name in (*_units(twin), ""):
        unit = twin.get_submodule(name)
        unit.register_forward_hook(_own_output)  # before FSDP's own
        fully_shard(unit, mesh=mesh)
        for key, parameter in own.items():
            if not name or key.startswith(f"{name}."):
                parameter.data = torch.zeros((), dtype=parameter.dtype, device=device).expand(parameter.shape)


def _units(model: nn.Module) -> list[str]:
    """The names of what is gathered at once; the rest of the model is one more unit.

    Adapted models have no prunable layers any more, so that `find_blocks` refuses them.
    """
    names = [name for name in find_recomputing(model) if name]
    if len(names) > 1:
        return names
    try:
        return find_blocks(model)
    except ValueError:  # no chain of blocks: the whole is one unit
        return []


def _own_output(_module: nn.Module, _args: Any, output: Any) -> Any:
    """The output without views: where one is changed in place afterwards, FSDP's gathering in backward is lost."""
    return tree_map_only(Tensor, lambda each: each.clone() if each._is_view() else each, output)


def _swap_(optimizer: torch.optim.Optimizer, by: dict[int, nn.Parameter]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [by.get(id(parameter), parameter) for parameter in group["params"]]
