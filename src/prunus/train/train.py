"""The one training loop: for language models, classifiers, adapters and single blocks alike.

A step t is a pure function of the state before it: its batches are `batches(t * accumulate + i)`, its learning rates
the groups' own times `lr(t)`. So a checkpoint (trainables, optimizer, methods, step, random state) resumes bit for bit.

    batches(micro step) -> loss -> gradients (accumulated) -> clip -> lr(t) -> optimizer -> masks re-applied

Methods that prune while training take part through the hooks of `hooks`. What is trained, and under which
masks, is decided elsewhere (`adapt`, `masks`); saving models too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, cast
from zlib import crc32

import torch
from accelerate.utils import send_to_device, slice_tensors
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from prunus.layers import View, find_layers
from prunus.machine import Precision, autocast, class_logits, in_mode, ranks
from prunus.masks import Masks, own_name, unwrapped
from prunus.train.capture import Capture, CapturedStep, Kept, captures, set_rates_, settled, unrecorded
from prunus.train.checkpoint import Checkpoint, Clock, held, options_of, resumable
from prunus.train.hooks import During, Plan
from prunus.train.next_token import answered, next_token_loss
from prunus.train.prepared import make_alike_, prepared
from prunus.train.sharded import asked, check_whole, unsent
from prunus.train.watch import Watch, Watched

_EVERY = 1.0  # seconds between two reports


@dataclass(frozen=True)
class Trace:
    """What a training run leaves besides the weights.

    losses: mean loss of each step; lrs: learning rate of the first parameter group in each step; tokens: integers in
    the first tensor of every batch (token ids; for other batches the number of samples), over all ranks; seconds: wall
    time of all parts of the run, the saving included; peak_bytes: most accelerator memory in use (0 on a CPU).
    watched: step and value of what a `Watch` measured.
    """

    losses: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    peak_bytes: int = 0
    watched: list[tuple[int, float]] = field(default_factory=list)


def classification_loss(smoothing: float = 0.0) -> Callable[[nn.Module, tuple[Any, Tensor]], Tensor]:
    """A loss of (model, (inputs, labels)): the mean cross-entropy in float32, with label smoothing in [0, 1).

    inputs: a tensor, or the keywords that a tokenizer made. Models that return logits (batch, classes), and those of
    transformers that return an object with `logits`, will do.

    >>> loss = classification_loss(smoothing=0.1)
    >>> loss(nn.Linear(4, 3), (torch.zeros(2, 4), torch.tensor([0, 1]))).shape
    torch.Size([])
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"Label smoothing lies in [0, 1); got {smoothing}.")

    def loss(model: nn.Module, batch: tuple[Any, Tensor]) -> Tensor:
        logits = class_logits(model, batch[0])
        return nn.functional.cross_entropy(logits.float(), batch[1], label_smoothing=smoothing)

    return loss


def regression_loss() -> Callable[[nn.Module, tuple[Any, Tensor]], Tensor]:
    """A loss of (model, (inputs, values)): the mean squared error in float32 of logits (batch, 1).

    values: (batch,) or (batch, 1). The loss raises ValueError for another number of them.

    >>> regression_loss()(nn.Linear(4, 1), (torch.zeros(2, 4), torch.zeros(2))).shape
    torch.Size([])
    """
    return lambda model, batch: squared_error(class_logits(model, batch[0]), batch[1])


def squared_error(logits: Tensor, values: Tensor) -> Tensor:
    """The mean squared error of logits (batch, 1) in float32, of values (batch,) or (batch, 1).

    Raises ValueError for another number of values: torch would compare each with each.

    >>> squared_error(torch.ones(2, 1), torch.zeros(2, 1))
    tensor(1.)
    """
    found, wanted = logits.float().flatten(), values.flatten()
    if found.shape != wanted.shape:
        raise ValueError(f"{len(found)} logits for {len(wanted)} values: give each sample one value, and one logit")
    return nn.functional.mse_loss(found, wanted)


def train(
    model: nn.Module,
    batches: Callable[[int], Any],
    optimizer: torch.optim.Optimizer,
    lr: Callable[[int], float],
    *,
    steps: int,
    loss: Callable[[nn.Module, Any], Tensor] = next_token_loss,
    masks: Masks | None = None,
    during: Sequence[During] = (),
    epoch_steps: int | None = None,
    views: Sequence[View] | None = None,
    accumulate: int = 1,
    precision: Precision = "fp32",
    clip: float | None = None,
    capture: Capture = False,
    watch: Watch | None = None,
    checkpoint: str | Path | None = None,
    save_seconds: float = 180.0,
    report_every: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
    shared: bool = True,
) -> Trace:
    """Train the parameters that require gradients, in place, and return the trace of the run.

    batches: micro step -> batch (tensor, or tuple, list or dict of tensors), a pure function; under several processes
    the whole batch, of which each rank trains its slice. loss: (model, batch) -> scalar mean; of a step it is the mean
    over micro batches and ranks, or, where batches are (ids, labels) as `next_token_loss` takes them, over all tokens
    that have a label. lr: step -> multiplier of each parameter group's own learning rate. accumulate: micro batches per
    step. clip: largest norm of the model's gradients; those of what methods train besides (gates, thresholds, logits)
    are not clipped.
    masks: pruned entries that stay zero. during: methods that take part; they are told `epoch_steps` (default: all
    steps) and the prunable `views` (default: `find_layers(model)`); the caller calls their `finish()` afterwards. Of a
    model that is compiled or in DataParallel they see the ordinary one, so their masks bear its names.
    capture: record the step as a CUDA graph and replay it, which helps where launches cost more than arithmetic
    (batches of one shape only), also of several processes, which then average their gradients in it; "auto" does so
    where it can be done and, of several processes, where gradients are at most 1 GiB, and logs why where it does not;
    a `Kept` does so in one process, and keeps the recorded step for the next run of this model and optimizer (without a
    checkpoint).
    watch: what is measured meanwhile, with the weights that methods give the model, and whether it keeps the best
    weights or ends the run early.
    checkpoint: a file, written when `save_seconds` have passed and at the end, from which an interrupted call resumes.
    on_step(steps done, mean loss since the last call) is called every `report_every` steps, or once a second where that
    is left out, and at the end: reading a loss makes the host wait for the device, so it is done no more often.
    log(values, steps done) gets then, too, `loss` and `lr` of each step since, `tokens_per_second`, what is watched.
    shared: whether several processes train one model together; if not, each trains its own on the whole batches.

    The model is trained where it is (under several processes that share it, on the device of each), and ends in the
    mode (train or eval) in which it came; masks hold after every step.
    Raises: ValueError for a number of steps below 1, a clip that is not positive, a model without trainable parameters,
    an optimizer of none of them, or that needs a closure, fp16 without an accelerator, a batch that the ranks cannot
    share, a step that cannot be captured, a checkpoint of another run (steps, rates, masks, settings of the optimizer,
    options of methods and what these are told are compared); FloatingPointError for a loss that is not finite.

    >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    >>> train(model, batches, optimizer, linear_warmup_decay(100), steps=100).losses[-1]
    """
    _check_numbers(steps, accumulate, clip, report_every)
    _check_parts(model, batches, optimizer, lr)
    if isinstance(capture, Kept) and checkpoint is not None:
        raise ValueError(f"A run whose recorded step is kept begins anew: leave out checkpoint={str(checkpoint)!r}.")
    device = next(model.parameters()).device
    scaler = _scaler(precision, device)
    shared = shared and ranks.count() > 1
    recorded = captures(capture, model, optimizer, shared=shared, scaled=precision == "fp16")
    _check_together(model, during, watch, precision, shared=shared)
    if ranks.count() > 1:
        device = ranks.join(torch.device(device.type))
        model.to(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    prunable = find_layers(unwrapped(model)) if during and views is None else _own_views(model, views or ())
    given = Masks({own_name(name): mask for name, mask in (masks or {}).items()})
    plan, started = Plan(steps, epoch_steps or steps, tuple(prunable), accumulate, given), time.perf_counter()
    options = options_of(during)
    with (
        _taking_part(during, unwrapped(model), optimizer, plan, shared=shared),
        prepared(model, optimizer, masks, precision, shared=shared, recorded=recorded) as (inner, wrapped),
        settled(device if recorded else None),
    ):
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        watched = Watched(watch, lambda: resumable(inner), shared)
        key = {"steps": steps, "accumulate": accumulate, "base_lrs": rates, "precision": precision, "clip": clip}
        key |= watched.plan | ({} if checkpoint is None else held(optimizer, masks)) | (_told(plan) if during else {})
        path = None if checkpoint is None else Path(checkpoint)
        saved = Checkpoint(path, key, inner, optimizer, scaler, during, options, watched, shared)
        first, past = saved.load()
        run = _Run(
            inner, wrapped, optimizer, scaler, loss, precision, clip, accumulate, tuple(during), shared, recorded
        )
        clock = Clock(save_seconds, first, shared=shared)
        step_of = run.step
        if recorded:
            agree = ranks.first_said if shared else str
            step_of = CapturedStep(run.step, device, done=first, forget=run.forget, must=capture is True, agree=agree)
            if isinstance(capture, Kept):
                kept, step_of = capture.captured is not None, capture.step(step_of, optimizer)
                warms, some, again = not kept, lambda _: capture.batch, capture.again
            else:
                warms, some, again = 0 < first < steps, batches, saved.load
            if warms:
                set_rates_(optimizer, [rate * lr(first) for rate in rates], recorded)
                step_of.warm_(run.parts(some, first)[0])
                again()
        own = next(inner.parameters()).device
        told: dict[str, Any] = {"every": report_every, "steps": steps, "on_step": on_step, "log": log}
        trace = _Log(Trace(**past), started=started, device=own, **told)
        if first == 0 and watch is not None and watch.keep_best:  # so that training can only help
            with in_mode(inner, training=False):
                watched.look(0)
        for step in range(first, first if watched.ended else steps):
            multiplier = lr(step)
            set_rates_(optimizer, [rate * multiplier for rate in rates], recorded)
            for method in during:
                method.before_step(step)
            parts, seen = run.parts(batches, step)
            value = step_of(parts)
            for method in during:
                method.after_step(step)
            trace.add(value, rates[0] * multiplier, seen)
            if watched.is_due(step + 1, steps):
                with in_mode(inner, training=False), _substituted(inner, run.effective()):
                    watched.look(step + 1)
                trace.note({"watched": watched.seen[-1][1]}, step + 1)
            last = step + 1 == steps or watched.ended
            if checkpoint is not None and (last or clock.is_due(step + 1)):
                saved.save(step + 1, vars(trace.read()))
                clock.restart(step + 1)
            if last:
                trace.report()
                break
        watched.finish_()
        if shared:  # BatchNorm's statistics, and means of them, are of a process's own part of the batches
            make_alike_(each for part in (inner, *during) for each in part.buffers() if each.device == own)
        return replace(trace.read(), watched=watched.seen)


def _check_numbers(steps: int, accumulate: int, clip: float | None, report_every: int | None) -> None:
    if steps < 1 or accumulate < 1:
        raise ValueError(
            f"Training needs at least 1 step of 1 micro batch; got steps={steps}, accumulate={accumulate}."
        )
    if (clip is not None and not clip > 0) or (report_every is not None and report_every < 1):
        raise ValueError(
            f"Training clips gradients to a norm > 0, reports every >= 1 steps; got {clip=}, {report_every=}."
        )


def _check_parts(model: nn.Module, batches: object, optimizer: torch.optim.Optimizer, lr: object) -> None:
    if not callable(batches) or not callable(lr):
        raise ValueError(
            "batches and lr are functions of the step, such as lambda step: parts[step % len(parts)] of "
            f"parts = list(loader), and lambda step: 1.0; got a {type(batches).__name__} and a {type(lr).__name__}."
        )
    closure = signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise ValueError(
            f"{type(optimizer).__name__} asks for the loss several times a step (a closure), and train gives it once: "
            "take an optimizer that steps by gradients alone, such as torch.optim.AdamW."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("The model has no parameter that requires gradients: nothing would be trained.")


def _check_together(
    model: nn.Module, during: Sequence[During], watch: Watch | None, precision: Precision, *, shared: bool
) -> None:
    """Raise ValueError where methods, a watch, 16 bits and sharded weights do not go together."""
    if during or shared:
        check_whole(model)
    if during and shared and asked():
        raise ValueError("Methods that take part in training need whole weights: launch without --use_fsdp.")
    if during and precision == "fp16":
        raise ValueError("Methods that take part in training read gradients, which fp16 scales: use bf16 or fp32.")
    if during and watch is not None and (watch.keep_best or watch.patience is not None):
        raise ValueError(
            "Masks of methods that take part are final at the end alone: leave out the watch's keep_best and patience."
        )
    if watch is not None and shared and asked():
        raise ValueError("A model is not measured while its weights are sharded: leave out watch, or --use_fsdp.")


def _told(plan: Plan) -> dict[str, Any]:
    """What methods were told besides the steps, as a checkpoint keeps it."""
    names = [(view.parameter, view.index) for view in plan.views]
    return {"epoch_steps": plan.epoch_steps, "views": f"{len(names)}, {crc32(repr(names).encode()):08x}"}


def _own_views(model: nn.Module, views: Sequence[View]) -> list[View]:
    """The views by the names that parameters have in the ordinary model, where they were found in one around it."""
    own = {id(each): name for name, each in unwrapped(model).named_parameters()}
    names = {name: own.get(id(each), name) for name, each in model.named_parameters()}
    return [replace(view, parameter=names.get(view.parameter, view.parameter)) for view in views]


@contextmanager
def _taking_part(
    during: Sequence[During], model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan, *, shared: bool
) -> Generator[None]:
    """Context in which methods take part; afterwards, also by an exception, what they froze is trained again, and the
    optimizer has the groups that it came with."""
    trained = [each for each in model.parameters() if each.requires_grad]
    groups = len(optimizer.param_groups)
    try:
        for method in during:
            method.attach(model, optimizer, plan)
        _check_own_parameters(during, shared)
        _check_trained(model, optimizer, during)
        yield
    finally:
        for each in trained:
            each.requires_grad_(True)
        for group in optimizer.param_groups[groups:]:
            for each in group["params"]:
                optimizer.state.pop(each, None)
        del optimizer.param_groups[groups:]


def _check_trained(model: nn.Module, optimizer: torch.optim.Optimizer, during: Sequence[During]) -> None:
    own = (each for module in (model, *during) for each in module.parameters() if each.requires_grad)
    trained = {id(each) for each in own}
    if not any(id(each) in trained for group in optimizer.param_groups for each in group["params"]):
        raise ValueError(
            "The optimizer has none of the parameters that require gradients, so nothing would be trained: make it "
            "after the model is adapted, of adaptation.param_groups(lr)"
        )


def _check_own_parameters(during: Sequence[During], shared: bool) -> None:
    owner = next((method for method in during if any(True for _ in method.parameters())), None)
    if shared and owner is not None:
        raise ValueError(
            f"{type(owner).__name__} trains parameters of its own, which several processes would not share: "
            "run it in one process."
        )


def _scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler | None:
    """What keeps fp16 gradients in range. Raises ValueError for another word, and for fp16 on a CPU."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise ValueError(f"precision is fp32, bf16 or fp16; got {precision!r}.")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision='fp16' scales gradients on an accelerator, and this is a CPU; use bf16 or fp32.")
    return torch.amp.GradScaler(device.type) if precision == "fp16" else None


@dataclass(frozen=True)
class _Run:
    """One optimizer step, and what it needs."""

    model: nn.Module
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    loss: Callable[[nn.Module, Any], Tensor]
    precision: Precision
    clip: float | None
    accumulate: int
    during: tuple[During, ...]
    shared: bool
    recorded: bool

    def parts(self, batches: Callable[[int], Any], step: int) -> tuple[list[Any], int]:
        """The micro batches of a step, this rank's share of each on the device, and how many tokens all ranks see."""
        device = next(self.model.parameters()).device
        whole = [batches(step * self.accumulate + part) for part in range(self.accumulate)]
        mine = [send_to_device(_share(each) if self.shared else each, device) for each in whole]
        return mine, sum(_tokens(each) for each in whole)

    def step(self, parts: list[Any]) -> Tensor:
        """One optimizer step; returns its mean loss (scalar on the device, over all ranks), without penalties."""
        device = next(self.model.parameters()).device
        total = torch.zeros((), device=device)
        shares = self._shares(parts)
        for part, batch in enumerate(parts, 1):
            with self._sending(last=part == len(parts)), ExitStack() as backward_too:
                # Around the model's own: a teacher runs in here, too.
                with nullcontext() if self.precision == "fp32" else autocast(device, self.precision):
                    backward_too.enter_context(_substituted(self.model, self._weights()))
                    value = self.loss(self.wrapped, batch)
                value = value if shares is None else value * shares[part - 1]
                total += value.detach()
                for method in self.during:
                    penalty = method.penalty()
                    value = value if penalty is None else value + penalty
                value = value / self.accumulate
                (value if self.scaler is None else self.scaler.scale(value)).backward()
        self._before_optimizer()
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        for method in self.during:
            method.follow()
        self.optimizer.zero_grad()
        mean = total / self.accumulate
        if self.shared:
            ranks.sum_(mean)
            mean /= ranks.count()
        return mean

    def _shares(self, parts: list[Any]) -> Tensor | None:
        """What the loss of each micro batch counts for, (accumulate,), so that all answers of the step, over all ranks,
        count alike: the mean is 1, and so is each share where as many are answered everywhere. None: they are alike."""
        counts = [count for part in parts if (count := answered(part)) is not None]
        if len(counts) < len(parts) or (len(parts) == 1 and not self.shared):
            return None
        each = torch.stack(counts)
        every = each.sum()
        if self.shared:
            ranks.sum_(every)
        return each * (len(parts) * (ranks.count() if self.shared else 1)) / every

    def forget(self) -> None:
        """Drop what a step left that was begun and not done: its gradients."""
        self.optimizer.zero_grad()

    def _sending(self, *, last: bool) -> AbstractContextManager[Any]:
        """Gradients are sent to the other processes with a step's last micro batch alone."""
        if last or not self.shared:
            return nullcontext()
        if isinstance(self.wrapped, DistributedDataParallel):
            return self.wrapped.no_sync()
        return unsent(self.wrapped)

    def _before_optimizer(self) -> None:
        if self.shared and self.recorded:  # else a hook of the wrapped model did
            ranks.mean_(each.grad for each in self.model.parameters() if each.grad is not None)
        if self.clip is not None:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], self.clip)
        for method in self.during:
            method.gradients()

    @torch.no_grad()
    def effective(self) -> dict[str, Tensor]:
        """What methods put in place of the model's own weights, to be measured."""
        with unrecorded():
            return self._weights()

    def _weights(self) -> dict[str, Tensor]:
        """What methods put in place of the model's own weights for this forward pass and the backward pass after it."""
        weights, by = dict[str, Tensor](), dict[str, str]()
        for method in self.during:
            own, kind = method.weights(), type(method).__name__
            if name := next((name for name in own if name in by), None):
                raise ValueError(f"{by[name]} and {kind} both put other weights in place of '{name}': take one of them")
            weights |= own
            by |= dict.fromkeys(own, kind)
        return weights


class Substituted(nn.Module):
    """A model run with other weights (parameter name -> weight) than its own, which it keeps.

    >>> Substituted(nn.Linear(1, 1, bias=False), {"weight": torch.ones(1, 1)})(torch.ones(1))
    tensor([1.])
    """

    def __init__(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output."""
        with _substituted(self.model, self.weights):
            return self.model(*args, **kwargs)


@contextmanager
def _substituted(model: nn.Module, weights: Mapping[str, Tensor]) -> Generator[None]:
    """Context in which a model has other weights (parameter name -> weight), also where a parameter is tied.

    In training it is around the backward pass as well, in which blocks that recompute themselves read weights again.
    """
    by = {id(unwrapped(model).get_parameter(name)): weight for name, weight in weights.items()}
    modules = model.modules() if by else ()
    places = [(module, key, each) for module in modules for key, each in module._parameters.items() if id(each) in by]
    try:
        for module, key, each in places:
            module._parameters[key] = by[id(each)]  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for module, key, each in places:
            module._parameters[key] = each


class _Log:
    """The trace of a run: losses are left on the device and read only every so often."""

    def __init__(
        self,
        past: Trace,
        *,
        every: int | None,
        steps: int,
        on_step: Callable[[int, float], None] | None,
        log: Callable[[dict[str, float], int], None] | None,
        started: float,
        device: torch.device,
    ) -> None:
        self.past, self.every, self.steps, self.on_step = past, every, steps, on_step
        self.note = log or (lambda values, step: None)
        self.started, self.device = started, device
        self.losses, self.lrs, self.tokens = list(past.losses), list(past.lrs), past.tokens
        self.pending: list[Tensor] = []
        self.reported, self.told, self.read_at = len(past.losses), past.tokens, started

    def add(self, loss: Tensor, lr: float, tokens: int) -> None:
        """One more step; now and then its losses are read and reported."""
        self.pending.append(loss)
        self.lrs.append(lr)
        self.tokens += tokens
        done = len(self.losses) + len(self.pending)
        if done == self.steps or self._is_due(done):
            self.report()

    def report(self) -> None:
        """Read and report what was not yet."""
        self._settle()
        done = len(self.losses)
        if done == self.reported:
            return
        passed, self.read_at = time.perf_counter() - self.read_at, time.perf_counter()
        if self.on_step is not None:
            self.on_step(done, sum(self.losses[self.reported :]) / (done - self.reported))
        for step in range(self.reported, done):
            self.note({"loss": self.losses[step], "lr": self.lrs[step]}, step + 1)
        self.note({"tokens_per_second": (self.tokens - self.told) / passed}, done)
        self.reported, self.told = done, self.tokens

    def _is_due(self, done: int) -> bool:
        return time.perf_counter() - self.read_at >= _EVERY if self.every is None else done % self.every == 0

    def read(self) -> Trace:
        """The trace up to the last step; waits for the device."""
        self._settle()
        seconds, peak = self.past.seconds + time.perf_counter() - self.started, self.past.peak_bytes
        if self.device.type == "cuda":
            peak = max(peak, torch.cuda.max_memory_allocated(self.device))
        return Trace(list(self.losses), list(self.lrs), self.tokens, seconds, peak)

    def _settle(self) -> None:
        fresh = torch.stack(self.pending).tolist() if self.pending else []
        for place, value in enumerate(fresh, len(self.losses)):
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"The loss of step {place} is {value}: lower the learning rate, clip gradients or use bf16."
                )
        self.losses += fresh
        self.pending = []


def _share(batch: Any) -> Any:
    world, rows = ranks.count(), _first_tensor(batch).shape[0]
    if rows % world:
        raise ValueError(f"A batch of {rows} cannot be shared by {world} processes; use a multiple of {world}.")
    return slice_tensors(batch, ranks.share(rows))


def _tokens(batch: Any) -> int:
    first = _first_tensor(batch)
    return first.numel() if first.dtype in (torch.int32, torch.int64) else first.shape[0]


def _first_tensor(batch: Any) -> Tensor:
    found = next(_tensors(batch), None)
    if found is None or not found.numel():
        said = "without a tensor" if found is None else f"whose first tensor is empty, {tuple(found.shape)}"
        raise ValueError(f"a batch is a tensor, or a tuple, list or dict of some; got a {type(batch).__name__} {said}")
    return found


def _tensors(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch, in order; a tokenizer's are in a mapping that is no dict."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        parts = cast("Iterable[Any]", batch.values() if isinstance(batch, Mapping) else batch)
        for each in parts:
            yield from _tensors(each)
