"""Members trained together: m copies of one small network as one vectorised network, with torch.func.

    parameters of the members ─ stack ─▶ (m, ...) ─ vmap(loss) ─▶ losses (m,) ─ sum ─▶ each member's own gradient

Each member keeps its own modules, so that it has parameter groups, masks and a state dict of its own: what is stacked
is made anew in each step, a copy of the parameters that a step's arithmetic dwarfs. BatchNorm in training mode uses
each member's own batch. One launch serves m members, but their convolutions become grouped ones: on an H100 ResNet-18
is slower so than one member after another (docs/results/soups.md), and threads with a stream each are faster.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.masks import Masks

__all__ = ["Stacked", "member_batches", "together"]

Loss = Callable[[nn.Module, Any], Tensor]


class Stacked(nn.Module):
    """m networks of one architecture that `train` trains as one model; `members` are the networks themselves.

    Equal to members trained alone up to rounding, under an optimizer that works entry by entry (SGD, Adam): one
    parameter group a member gives each its own learning rate and weight decay. Not equal: dropout draws other numbers,
    and `clip` is over all members together.
    With 16-bit precision products are 16-bit, but biases and BatchNorm give float32 activations when they are
    vectorised; on a CPU convolutions are float32 as well.
    Operations without a batching rule are done member by member, with a warning of torch; so is nn.AdaptiveAvgPool2d(1)
    of channels-last images: pool with F.avg_pool2d.
    Raises ValueError for members of different architectures, for parameters that they share, and for modules that
    cannot be vectorised: recurrent ones, SyncBatchNorm, BatchNorm with momentum None. What else torch.func.vmap cannot
    do (branches on values, say) raises its own RuntimeError in the first step.

    >>> stacked = Stacked([nn.Linear(4, 3), nn.Linear(4, 3)])
    >>> stacked(classification_loss(), (torch.zeros(2, 8, 4), torch.zeros(2, 8, dtype=torch.long))).shape
    torch.Size([2])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        _check(members)
        self.members = nn.ModuleList(members)

    def forward(self, loss: Loss, batch: Any) -> Tensor:
        """The loss of each member, (m,): member i on item i along the first dimension of every tensor of the batch."""
        first, members = self.members[0], list(self.members)
        parameters = _stacked([dict(member.named_parameters()) for member in members])
        own = [dict(member.named_buffers()) for member in members]
        buffers = _stacked(own)

        def of_one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], batch: Any) -> Tensor:
            return loss(_With(first, {**parameters, **buffers}), batch)

        losses: Tensor = torch.func.vmap(of_one, randomness="different")(parameters, buffers, batch)
        if self.training:
            _write_back_(own, buffers)
        return losses

    def masks(self, masks: Masks) -> Masks:
        """One member's masks as those of all, under the names of this module's parameters: for `train` to hold.

        >>> Stacked([nn.Linear(2, 2), nn.Linear(2, 2)]).masks(masks).keys()
        """
        places = range(len(self.members))
        return Masks({f"members.{place}.{name}": mask for place in places for name, mask in masks.items()})


def together(loss: Loss) -> Callable[[Stacked, Any], Tensor]:
    """A loss for `train` of a `Stacked`: it reads as the mean over the members, and gives each its own gradient.

    >>> train(Stacked(members), member_batches(each), optimizer, lr, steps=10, loss=together(classification_loss()))
    """

    def total(stacked: nn.Module, batch: Any) -> Tensor:
        losses: Tensor = stacked(loss, batch)
        # The gradient is that of the sum, so that learning rates mean what they mean for one member.
        return losses.sum() - (losses.sum() - losses.mean()).detach()

    return total


def member_batches(each: Sequence[Callable[[int], Any]]) -> Callable[[int], Any]:
    """micro step -> the members' batches of that step, stacked along a new first dimension; nests of tensors alike.

    Members that see the same data are given the same callable. Raises ValueError for batches of unequal shapes.

    >>> member_batches([lambda step: torch.zeros(8, 4), lambda step: torch.ones(8, 4)])(0).shape
    torch.Size([2, 8, 4])
    """
    sources = list(each)

    def batches(step: int) -> Any:
        made: dict[int, Any] = {}
        for source in sources:
            if id(source) not in made:
                made[id(source)] = source(step)
        return _zipped([made[id(source)] for source in sources])

    return batches


class _With(nn.Module):
    """A module run with the given tensors in place of its own."""

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._model, self._tensors = [model], tensors  # in a list: not a submodule, so nothing is registered twice

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._model[0], self._tensors, args, kwargs)


def _stacked(tensors: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([each[name] for each in tensors]) for name in tensors[0]}


@torch.no_grad()
def _write_back_(own: Sequence[Mapping[str, Tensor]], stacked: Mapping[str, Tensor]) -> None:
    """Buffers that the forward changed (BatchNorm's statistics) to the members they belong to."""
    pairs = [(each[name], value) for name, values in stacked.items() for each, value in zip(own, values, strict=True)]
    for dtype in {buffer.dtype for buffer, _ in pairs} - {torch.bool}:  # boolean ones are masks, and fixed
        alike = [(buffer, value) for buffer, value in pairs if buffer.dtype == dtype]
        torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
            [buffer for buffer, _ in alike], [value for _, value in alike]
        )


def _zipped(batches: Sequence[Any]) -> Any:
    first = batches[0]
    if isinstance(first, Tensor):
        shapes = {tuple(batch.shape) for batch in batches}
        if len(shapes) > 1:
            raise ValueError(f"members trained together need batches of one shape; got {sorted(shapes)}")
        return torch.stack(list(batches))
    if isinstance(first, dict):
        return {key: _zipped([batch[key] for batch in batches]) for key in first}
    return type(first)(_zipped(parts) for parts in zip(*batches, strict=True))


def _check(members: Sequence[nn.Module]) -> None:
    if not members:
        raise ValueError("members trained together: give at least one")
    shapes = [_shapes(member) for member in members]
    for place, (member, found) in enumerate(zip(members, shapes, strict=True)):
        if repr(member) != repr(members[0]):  # strides, momenta, dropout: what the tensors do not show
            raise ValueError(
                f"member {place} is another architecture than member 0 (compare their print): train it apart"
            )
        if found != shapes[0]:
            name = min(name for name in found.keys() | shapes[0].keys() if found.get(name) != shapes[0].get(name))
            raise ValueError(
                f"member {place} has {name!r} as {found.get(name)}, member 0 as {shapes[0].get(name)}: members trained "
                "together have one architecture"
            )
    for path, module in members[0].named_modules():
        trouble = _trouble(module)
        if trouble:
            raise ValueError(f"{path or 'the network'!r} ({type(module).__name__}) {trouble}: train its members apart")
    seen = [id(parameter) for member in members for parameter in member.parameters()]
    if len(set(seen)) != len(seen):
        raise ValueError("members share parameters: give each a copy of its own (copy.deepcopy)")


def _shapes(member: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype, bool]]:
    """What must agree between members, parameters with whether they are trained."""
    tensors = {**dict(member.named_parameters()), **dict(member.named_buffers())}
    return {name: (tuple(each.shape), each.dtype, each.requires_grad) for name, each in tensors.items()}


def _trouble(module: nn.Module) -> str:
    if isinstance(module, nn.RNNBase):
        return "is recurrent, which torch.func does not vectorise"
    if isinstance(module, nn.SyncBatchNorm):
        return "gathers statistics over processes"
    if isinstance(module, _BatchNorm) and module.track_running_stats and module.momentum is None:
        return "averages its statistics by a counter that would be read on the host; give it a momentum"
    return ""
