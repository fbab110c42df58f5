"""The model and optimizer as accelerate wraps them while they are trained, and as they were again afterwards."""

from __future__ import annotations

import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from prunus.machine import Precision, in_mode, ranks
from prunus.train.sharded import asked, sharded

if TYPE_CHECKING:
    from prunus.masks import Masks

_MAKING = threading.Lock()  # accelerate's singletons are half made for a moment


def make_accelerator(precision: Precision, accumulate: int, device: torch.device) -> Accelerator:
    """An Accelerator of this precision and kind of device, although an earlier one of the process had others."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision is fp32, bf16 or fp16; got {precision!r}.")
    with _MAKING:
        accelerator = _make(precision, accumulate, device)
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision='fp16' scales gradients on an accelerator, and this is a CPU; use bf16 or fp32.")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return accelerator


def _make(precision: Precision, accumulate: int, device: torch.device) -> Accelerator:
    mixed = "no" if precision == "fp32" else precision
    # Precision and device are kept in process-wide singletons that refuse to change; a process group stays.
    state, single = AcceleratorState._shared_state, ranks.count() == 1
    if state and single and torch.device(state["device"]).type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    elif state and state.get("_mixed_precision", mixed) != mixed:
        AcceleratorState._reset_state()
    return Accelerator(
        mixed_precision=mixed,
        gradient_accumulation_steps=accumulate,
        cpu=single and device.type == "cpu",
        device_placement=not single,
    )


@contextmanager
def prepared(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    masks: Masks | None,
    *,
    shared: bool,
    recorded: bool,
) -> Generator[tuple[nn.Module, nn.Module, torch.optim.Optimizer], None, None]:
    """What is trained, that as accelerate wraps it, and the optimizer; then all as before, but for the weights.

    What is trained is the model itself, or its sharded twin where the launch asked for FSDP2. Steps that are recorded
    average gradients themselves: DistributedDataParallel would in hooks, at its own times and on streams of its own.
    """
    apart = shared and asked()
    if apart and accelerator.device.type != "cpu":  # replicated models are moved by accelerate
        model.to(accelerator.device)
    with ExitStack() as stack:
        inner = stack.enter_context(sharded(model, optimizer)) if apart else model
        replicated = shared and not apart and not recorded
        outer, stepper = stack.enter_context(_wrapped(inner, optimizer, accelerator, masks, replicated))
        if shared and recorded:
            _make_alike_(inner)
        yield inner, outer, stepper


@contextmanager
def _wrapped(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    masks: Masks | None,
    replicated: bool,
) -> Generator[tuple[nn.Module, torch.optim.Optimizer], None, None]:
    own_forward = model.__dict__.get("forward")
    rates = [group["lr"] for group in optimizer.param_groups]
    # Masks are the same everywhere: sending them with every step would cost more than the gradients.
    model.__dict__["_ddp_params_and_buffers_to_ignore"] = _masks_of(model)
    wrapped: nn.Module = accelerator.prepare_model(
        model, evaluation_mode=not replicated
    )  # "evaluation": not in parallel
    stepper: Any = accelerator.prepare_optimizer(optimizer)
    held = None
    try:
        if masks is not None:
            held = masks.hold(model, optimizer)
        optimizer.zero_grad()
        with in_mode(model, training=True):
            yield wrapped, stepper
    finally:
        if held is not None:
            held.remove()
        # prepare() put an autocasting forward over the model's own. unwrap_model() would also strip the decorators of
        # the class's forward and leave the rest as an attribute, so what prepare() added is taken away here.
        for added in ("_original_forward", "forward", "_ddp_params_and_buffers_to_ignore", "_is_accelerate_prepared"):
            model.__dict__.pop(added, None)
        if own_forward is not None:
            model.forward = own_forward
        optimizer.zero_grad()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@torch.no_grad()
def _make_alike_(model: nn.Module) -> None:
    """Every process begins with the first one's weights, as with DistributedDataParallel; masks are the same anyway."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype != torch.bool:
            sent = tensor.detach().contiguous()
            ranks.send_(sent, 0)
            tensor.copy_(sent)


def _masks_of(model: nn.Module) -> list[str]:
    return [name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool]
