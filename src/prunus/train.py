"""The one training loop, on accelerate: for language models, classifiers, adapters and single blocks alike.

A step t is a pure function of the state before it: its batches are `batches(t * accumulate + i)`, its learning rates
the groups' own times `lr(t)`. So a checkpoint (trainables, optimizer, step, random state) resumes bit for bit.

    batches(micro step) -> loss -> gradients (accumulated) -> clip -> lr(t) -> optimizer -> masks re-applied

What is trained, and under which masks, is decided elsewhere (`adapt`, `masks`); saving models too.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object, send_to_device, slice_tensors
from torch import Tensor, nn

from prunus import ranks
from prunus.precision import Precision

if TYPE_CHECKING:
    from prunus.masks import Masks

__all__ = ["Trace", "next_token_loss", "train"]

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trace:
    """What a training run leaves besides the weights.

    losses: mean loss of each step; lrs: learning rate of the first parameter group in each step; tokens: integers in
    the first tensor of every batch (token ids; for other batches the number of samples), over all ranks; seconds: wall
    time of all parts of the run, the saving included; peak_bytes: most accelerator memory in use (0 on a CPU).
    """

    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0


def next_token_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """The mean negative log-likelihood (scalar, float32) of tokens 1.. of every packed row, ids: (batch, length).

    >>> next_token_loss(model, torch.zeros(2, 8, dtype=torch.long)).shape
    torch.Size([])
    """
    logits = model(input_ids=ids, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train(
    model: nn.Module,
    batches: Callable[[int], Any],
    optimizer: torch.optim.Optimizer,
    lr: Callable[[int], float],
    *,
    steps: int,
    loss: Callable[[nn.Module, Any], Tensor] = next_token_loss,
    masks: Masks | None = None,
    accumulate: int = 1,
    precision: Precision = "fp32",
    clip: float | None = None,
    checkpoint: Path | None = None,
    save_every: int = 1000,
    report_every: int = 50,
    on_step: Callable[[int, float], None] | None = None,
    shared: bool = True,
) -> Trace:
    """Train the parameters that require gradients, in place, and return the trace of the run.

    batches: micro step -> batch (tensor, or tuple, list or dict of tensors), a pure function; under several processes
    the whole batch, of which each rank trains its slice. loss: (model, batch) -> scalar mean. lr: step -> multiplier of
    each parameter group's own learning rate. accumulate: micro batches per step. clip: largest gradient norm.
    checkpoint: a file, written every `save_every` steps and at the end, from which an interrupted call resumes.
    on_step(steps done, mean loss since the last call) is called every `report_every` steps and at the end: reading a
    loss makes the host wait for the device, so it is done no more often.
    shared: whether several processes train one model together; if not, each trains its own on the whole batches.

    The model is trained where it is (under several processes that share it, on the device of each), and ends in the
    mode (train or eval) in which it came; masks hold after every step.
    Raises: ValueError for a number of steps below 1, a model without trainable parameters, fp16 without an accelerator,
    a batch that the ranks cannot share, a checkpoint of another run; FloatingPointError for a loss that is not finite.

    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> train(model, batches, optimizer, linear_warmup_decay(100), steps=100).losses[-1]
    """
    if steps < 1 or accumulate < 1:
        raise ValueError(
            f"Training needs at least 1 step of 1 micro batch; got steps={steps}, accumulate={accumulate}."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("The model has no parameter that requires gradients: nothing would be trained.")
    accelerator = _accelerator(precision, accumulate, next(model.parameters()).device)
    shared = shared and accelerator.num_processes > 1
    started = time.perf_counter()
    with _prepared(model, optimizer, accelerator, masks, shared) as (wrapped, stepper):
        rates = [group["lr"] for group in optimizer.param_groups]
        run = _Run(accelerator, model, optimizer, accumulate, rates, next(model.parameters()).device, shared)
        first, past = run.resume(checkpoint, steps)
        losses = _Losses(past.losses, report_every, steps, on_step)
        lrs, tokens = list(past.lrs), past.tokens
        for step in range(first, steps):
            multiplier = lr(step)
            for group, base in zip(optimizer.param_groups, run.base_lrs, strict=True):
                group["lr"] = base * multiplier
            lrs.append(float(optimizer.param_groups[0]["lr"]))
            value, seen = _step(run, wrapped, stepper, step, batches, loss, clip)
            losses.add(value)
            tokens += seen
            if checkpoint is not None and ((step + 1) % save_every == 0 or step + 1 == steps):
                seconds = past.seconds + time.perf_counter() - started
                run.save(checkpoint, steps, Trace(losses.read(), lrs, tokens, seconds, run.peak(past)))
        trace = Trace(losses.read(), lrs, tokens, past.seconds + time.perf_counter() - started, run.peak(past))
    return trace


def _step(
    run: _Run,
    wrapped: nn.Module,
    stepper: torch.optim.Optimizer,
    step: int,
    batches: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    clip: float | None,
) -> tuple[Tensor, int]:
    """One optimizer step; returns its mean loss (scalar on the device, over all ranks) and the tokens it saw."""
    accelerator, total, tokens = run.accelerator, None, 0
    for part in range(run.accumulate):
        whole = batches(step * run.accumulate + part)
        tokens += _tokens(whole)
        batch = send_to_device(_share(whole, accelerator) if run.shared else whole, run.device)
        with accelerator.accumulate(wrapped):
            value = loss(wrapped, batch)
            accelerator.backward(value)  # divides by `accumulate`
            if clip is not None and accelerator.sync_gradients:
                accelerator.clip_grad_norm_([p for p in run.model.parameters() if p.requires_grad], clip)
            stepper.step()
            stepper.zero_grad()
        total = value.detach().float() if total is None else total + value.detach()
    assert total is not None
    mean = total / run.accumulate
    return accelerator.reduce(mean, reduction="mean") if run.shared else mean, tokens  # pyright: ignore[reportReturnType]


class _Losses:
    """Losses of a run, left on the device and read only every so often."""

    def __init__(self, past: list[float], every: int, steps: int, on_step: Callable[[int, float], None] | None) -> None:
        self.values = list(past)
        self.pending: list[Tensor] = []
        self.every, self.steps, self.on_step = every, steps, on_step
        self.reported = len(past)

    def add(self, value: Tensor) -> None:
        self.pending.append(value)
        done = len(self.values) + len(self.pending)
        if done % self.every and done != self.steps:
            return
        values = self.read()
        if self.on_step is not None:
            self.on_step(done, sum(values[self.reported :]) / (done - self.reported))
        self.reported = done

    def read(self) -> list[float]:
        if self.pending:
            fresh = torch.stack(self.pending).tolist()
            for place, value in enumerate(fresh, len(self.values)):
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"The loss of step {place} is {value}: lower the learning rate, clip gradients or use bf16."
                    )
            self.values += fresh
            self.pending = []
        return list(self.values)


@dataclass(frozen=True)
class _Run:
    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer
    accumulate: int
    base_lrs: list[float]
    device: torch.device
    shared: bool

    def _plan(self, steps: int) -> dict[str, Any]:
        # What must agree between the run that wrote a checkpoint and the one that reads it.
        return {"steps": steps, "accumulate": self.accumulate, "base_lrs": [float(lr) for lr in self.base_lrs]}

    def resume(self, checkpoint: Path | None, steps: int) -> tuple[int, Trace]:
        """Load the state of the checkpoint if there is one; returns the first step to do and the trace so far."""
        if checkpoint is None or not checkpoint.exists():
            return 0, Trace()
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        tensors = _resumable(self.model)
        found = {name: tuple(tensor.shape) for name, tensor in state["tensors"].items()}
        if state["plan"] != self._plan(steps) or found != {name: tuple(t.shape) for name, t in tensors.items()}:
            raise ValueError(
                f"{checkpoint} belongs to another run: it has {state['plan']} and {len(found)} tensors, this run "
                f"{self._plan(steps)} and {len(tensors)}. Delete it to start anew, or restore the run's settings."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(state["tensors"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        _set_random_state(state["random"][self.accelerator.process_index])
        _logger.info("Resuming from %s after step %d of %d.", checkpoint, state["step"], steps)
        return state["step"], Trace(**state["trace"])

    def save(self, checkpoint: Path, steps: int, trace: Trace) -> None:
        """Write the checkpoint beside its place and move it there, so that a kill leaves the old one or the new one."""
        random = gather_object([_random_state()]) if self.shared else [_random_state()]
        if self.accelerator.is_main_process:
            state = {
                "plan": self._plan(steps),
                "step": len(trace.losses),
                "trace": vars(trace),
                "tensors": {name: tensor.detach().cpu() for name, tensor in _resumable(self.model).items()},
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
                "random": random,
            }
            partial = checkpoint.with_name(checkpoint.name + ".partial")
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, partial)
            os.replace(partial, checkpoint)
        self.accelerator.wait_for_everyone()

    def peak(self, past: Trace) -> int:
        if self.device.type != "cuda":
            return 0
        return max(past.peak_bytes, torch.cuda.max_memory_allocated(self.device))


def _accelerator(precision: Precision, accumulate: int, device: torch.device) -> Accelerator:
    """An Accelerator of this precision and kind of device, although an earlier one of the process had others."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision is fp32, bf16 or fp16; got {precision!r}.")
    mixed = "no" if precision == "fp32" else precision
    # Precision and device are kept in process-wide singletons that refuse to change; a process group stays.
    state, alone = AcceleratorState._shared_state, ranks.count() == 1
    if state and alone and torch.device(state["device"]).type != device.type:
        AcceleratorState._reset_state(reset_partial_state=True)
    elif state and state.get("_mixed_precision", mixed) != mixed:
        AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=mixed,
        gradient_accumulation_steps=accumulate,
        cpu=alone and device.type == "cpu",
        device_placement=not alone,
    )
    if precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("precision='fp16' scales gradients on an accelerator, and this is a CPU; use bf16 or fp32.")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    return accelerator


@contextmanager
def _prepared(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: Accelerator,
    masks: Masks | None,
    shared: bool,
) -> Generator[tuple[nn.Module, torch.optim.Optimizer], None, None]:
    """The model and optimizer as accelerate wraps them; on the way out everything is as before, but for the weights."""
    modes = {module: module.training for module in model.modules()}
    own_forward = model.__dict__.get("forward")
    rates = [group["lr"] for group in optimizer.param_groups]
    # Masks are the same everywhere: sending them with every step would cost more than the gradients.
    model.__dict__["_ddp_params_and_buffers_to_ignore"] = _masks_of(model)
    wrapped: nn.Module = accelerator.prepare_model(model, evaluation_mode=not shared)  # "evaluation": not in parallel
    stepper: Any = accelerator.prepare_optimizer(optimizer)
    held = None
    try:
        if masks is not None:
            held = masks.hold(model, optimizer)
        model.train()
        optimizer.zero_grad()
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
        for module, mode in modes.items():
            module.training = mode


def _masks_of(model: nn.Module) -> list[str]:
    return [name for name, buffer in model.named_buffers() if buffer.dtype == torch.bool]


def _resumable(model: nn.Module) -> dict[str, Tensor]:
    """What training can change: parameters that require gradients, and buffers (boolean ones are masks, and fixed)."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return trained | {name: buffer for name, buffer in model.named_buffers() if buffer.dtype != torch.bool}


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _share(batch: Any, accelerator: Accelerator) -> Any:
    world = accelerator.num_processes
    if world == 1:
        return batch
    rows = _first_tensor(batch).shape[0]
    if rows % world:
        raise ValueError(f"A batch of {rows} cannot be shared by {world} processes; use a multiple of {world}.")
    start = accelerator.process_index * (rows // world)
    return slice_tensors(batch, slice(start, start + rows // world))


def _tokens(batch: Any) -> int:
    first = _first_tensor(batch)
    return first.numel() if first.dtype in (torch.int32, torch.int64) else first.shape[0]


def _first_tensor(batch: Any) -> Tensor:
    if isinstance(batch, Tensor):
        return batch
    return _first_tensor(next(iter(batch.values() if isinstance(batch, dict) else batch)))
