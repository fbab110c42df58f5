"""Activations recomputed in backward, but no more of them than memory asks for.

    [block][block][block][block]      the first blocks keep their input alone and run again in backward;
     again  again  kept   kept        the last ones keep what they computed, as many as there is room for

A block that runs again costs a third of its products. Where weights are frozen a kept block holds little: what its
norms, attention and activation need, no input of a linear layer. The last blocks are the ones kept, because backward
frees them first. What a block holds is measured, in the first forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import psutil
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunus.blocks.chain import find_recomputing
from prunus.machine import local_part, with_forwards

_MARGIN = 0.9  # of the memory there is: the allocator cannot use the last bits of it
_STATE = 16  # bytes a trainable: gradient, two moments, and what the optimizer's step forms on the way


@contextmanager
def recomputed(model: Any, *, spare: int | Literal["free"] = 0) -> Generator[None]:
    """Context in which a transformers model keeps only what enters its blocks, and recomputes the rest in backward.

    spare: bytes that may be spent on blocks which keep all they computed and do not run again, at any batch of the
        first one's shape; or "free": what the device has left after the first forward and backward pass.
    Gradients are the same. Afterwards, also by an exception, blocks recompute themselves or not as before.

    >>> with recomputed(model):
    ...     train(model, batches, optimizer, lr, steps=100)
    """
    options = {"use_reentrant": False}
    before = {each: _how(each) for each in model.modules() if hasattr(each, "gradient_checkpointing")}
    entering = getattr(model, "_require_grads_hook", None) is not None
    if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.2x; the older name warns there
        model.activation_checkpointing_enable(options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    if getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()  # only reentrant recomputation needs gradients of what enters a block
    with _watched(model, spare) if spare else nullcontext():
        try:
            yield
        finally:
            if hasattr(model, "activation_checkpointing_disable"):
                model.activation_checkpointing_disable()
            else:
                model.gradient_checkpointing_disable()
            for module, how in before.items():
                vars(module).update(how)
            if entering:
                model.enable_input_require_grads()


def _how(module: Any) -> dict[str, Any]:
    """Whether and how a module recomputes itself."""
    own = {"gradient_checkpointing": module.gradient_checkpointing}
    return own | {key: each for key, each in vars(module).items() if key == "_gradient_checkpointing_func"}


def kept_blocks(model: nn.Module) -> int:
    """How many blocks of a model inside `recomputed` keep what they computed."""
    return sum(not block.gradient_checkpointing for block in recomputing(model))


@contextmanager
def _watched(model: nn.Module, spare: int | Literal["free"]) -> Generator[None]:
    """Context with a hook on the model that measures a block in the first pass and then decides.

    It outlives copies of the model.
    """
    measured: list[int] = []
    undo: list[Callable[[], None]] = []
    state = {"passes": 0}

    def before(module: nn.Module, *_: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        state["passes"] += 1
        blocks = recomputing(module) if state["passes"] <= 2 else []
        if state["passes"] == 1 and blocks:
            blocks[0].gradient_checkpointing = False
            undo.append(_measure_once(blocks[0], lambda size: decide(blocks, size)))
        elif state["passes"] == 2 and measured and spare == "free":
            _keep_last_(blocks, _left(module) // measured[0])

    def decide(blocks: list[Any], size: int) -> None:
        measured.append(max(1, size))
        _keep_last_(blocks, 0 if spare == "free" else int(spare) // measured[0])

    handle = model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
        for each in undo:
            each()


def _measure_once(block: nn.Module, then: Callable[[int], None]) -> Callable[[], None]:
    """Calls `then` with the bytes that the block's next forward pass keeps for backward; what it returns undoes it."""
    own, until_then = block.forward, ExitStack()

    def forward(*args: Any, **kwargs: Any) -> Any:
        until_then.close()
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[_place(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = own(*args, **kwargs)
        held = [tree_leaves(vars(module)) for module in block.modules()]  # also masks and kept weights, no buffers
        lives = {_place(each) for each in _tensors((args, kwargs, held))}
        then(sum(size for place, size in sizes.items() if place not in lives))
        return output

    until_then.enter_context(with_forwards({block: forward}))
    return until_then.close


def _keep_last_(blocks: list[Any], count: int) -> None:
    for place, block in enumerate(blocks):
        block.gradient_checkpointing = place < len(blocks) - max(0, count)


def _left(model: nn.Module) -> int:
    """Bytes of the model's device that nothing needs: neither what was there at the peak, nor the optimizer."""
    trained = sum(local_part(each).numel() for each in model.parameters() if each.requires_grad)
    device = next(model.parameters()).device
    if device.type != "cuda":
        return int(_MARGIN * psutil.virtual_memory().available) - _STATE * trained
    room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return int(_MARGIN * room) - torch.cuda.max_memory_allocated(device) - _STATE * trained


def recomputing(model: nn.Module) -> list[Any]:
    """The blocks that can recompute themselves, in order.

    >>> recomputing(nn.Linear(2, 2))
    []
    """
    return [model.get_submodule(name) for name in find_recomputing(model)]


def _place(tensor: Tensor) -> int:
    return local_part(tensor).untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]
