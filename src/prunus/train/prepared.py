"""The model as it is while it is trained, by one process or by several together, and as it was again afterwards.

Nothing here is kept for the whole process, so threads train side by side, each with a precision and an accumulation of
its own. accelerate's Accelerator keeps both in singletons, and empties the environment while it is made.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import convert_to_fp32
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunus.machine import Precision, autocast, in_mode, ranks, with_forwards
from prunus.train.sharded import asked, sharded

if TYPE_CHECKING:
    from prunus.masks import Masks


@contextmanager
def prepared(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    masks: Masks | None,
    precision: Precision,
    *,
    shared: bool,
    recorded: bool,
) -> Generator[tuple[nn.Module, nn.Module], None, None]:
    """What is trained, and what is called for it; then all as before, but for the weights.

    What is trained is the model itself, or its sharded twin where the launch asked for FSDP2. Steps that are recorded
    average gradients themselves: DistributedDataParallel would in hooks, at its own times and on streams of its own.
    """
    apart = shared and asked()
    # A recorded step's learning rate is a tensor, and filled.
    rates = [copy.deepcopy(group["lr"]) for group in optimizer.param_groups]
    with ExitStack() as stack:
        inner = stack.enter_context(sharded(model, optimizer)) if apart else model
        stack.enter_context(_in_precision(inner, precision))
        wrapped = stack.enter_context(_replicated(inner)) if shared and not apart and not recorded else inner
        if masks is not None:
            stack.callback(masks.hold(inner, optimizer).remove)
        stack.callback(_leave_, optimizer, rates)
        optimizer.zero_grad()
        stack.enter_context(in_mode(inner, training=True))
        if shared and recorded:
            make_alike_((*inner.parameters(), *inner.buffers()))
        yield inner, wrapped


def _in_precision(model: nn.Module, precision: Precision) -> AbstractContextManager[None]:
    """Context in which the model runs in autocast, whoever calls it, and returns float32; "fp32" changes nothing."""
    if precision == "fp32":
        return nullcontext()
    # As a method: copies of the model that are made meanwhile run themselves.
    return with_forwards({model: MethodType(_cast(model.forward, next(model.parameters()).device, precision), model)})


def _cast(forward: Callable[..., Any], device: torch.device, precision: Precision) -> Callable[..., Any]:
    """The same in autocast, as a function of the module too, of which a copy hands itself on."""
    function: Callable[..., Any] | None = getattr(forward, "__func__", None)

    @functools.wraps(function or forward)
    def cast(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with autocast(device, precision):
            out = forward(*args, **kwargs) if function is None else function(model, *args, **kwargs)
        return convert_to_fp32(out)

    return cast


@contextmanager
def _replicated(model: nn.Module) -> Generator[nn.Module]:
    # Masks are the same everywhere: sending them with every step would cost more than the gradients.
    model.__dict__["_ddp_params_and_buffers_to_ignore"] = _masks_of(model)
    try:
        yield DistributedDataParallel(model)
    finally:
        del model.__dict__["_ddp_params_and_buffers_to_ignore"]


def _leave_(optimizer: torch.optim.Optimizer, rates: list[Any]) -> None:
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


@torch.no_grad()
def make_alike_(tensors: Iterable[Tensor]) -> None:
    """Every process has the first one's tensors, as with DistributedDataParallel; masks are the same anyway.

    >>> make_alike_([torch.ones(2)])  # a single process
    """
    for tensor in tensors:
        if tensor.dtype != torch.bool:
            sent = tensor.detach().contiguous()
            ranks.send_(sent, 0)
            tensor.copy_(sent)


def _masks_of(model: nn.Module) -> list[str]:
    return [name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool]
