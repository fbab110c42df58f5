"""Prune a language model block by block: calibrate, solve, fit, hand on, write, free.

Only one block and the activations entering it live on the device; the other weights stay where they are (memory, or
safetensors shards for a model built on the meta device). Finished blocks are written at once, so a killed run goes on
after its last one:

    hidden_0 = embed(tokens);  for each block l:  W_l <- solve(W_l, inputs);  hidden_l+1 = block_l(hidden_l)

What a block is asked, and how it is run, is in `blocks.py`; the fit of a pruned block is in `reconstruct.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from prunus.blocks import Arguments, Source, embed, find_blocks, finish, run_block
from prunus.layers import Inputs, View, find_layers
from prunus.machine import Precision, autocast, ranks
from prunus.masks import Masks, count_kept
from prunus.patterns import Pattern, check_sparsity
from prunus.score import observe
from prunus.solve import Solver
from prunus.stream.ahead import Ahead, ahead
from prunus.stream.layerwise import add_up_, solve_layers_
from prunus.stream.reconstruct import Fit, reconstruct
from prunus.stream.sources import Memory
from prunus.stream.work import BlockReport, Work

__all__ = ["Streamed", "stream", "survey"]


@dataclass(frozen=True)
class Streamed:
    """The masks (parameter name -> bool) and one report a block."""

    masks: Masks
    reports: list[BlockReport] = field(default_factory=list)


def stream(
    model: nn.Module,
    solver: Solver,
    pattern: Pattern,
    sparsity: float,
    *,
    tokens: Tensor,
    counts: Mapping[str, int] | None = None,
    gram: bool = True,
    fit: Fit | None = None,
    source: Source | None = None,
    work: Work | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
    shared: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_block: Callable[[BlockReport], None] | None = None,
) -> Streamed:
    """Masks and reports after pruning `model` in place, block by block.

    tokens: (samples, length) int64 calibration windows, run `batch_size` at a time.
    counts: view name -> entries to keep, for non-uniform allocations; uniform otherwise.
    gram: whether the solver needs input Gram matrices (SparseGPT) or only norms (Wanda).
    fit: how a pruned block is fitted to its dense outputs; None leaves it.
    precision: autocast in which blocks run; statistics and solvers are float32 throughout.
    source: where weights come from when `model` is on the meta device.
    work: folder of finished blocks; blocks already there are replayed, not solved again.
    shared: whether the launched processes share the windows and the layers (each calls this alike, and ends alike);
        not with a fit.

    The next block is brought, and the last one is saved and freed, while one is solved (`ahead`).
    Raises ValueError for a model whose blocks are not found, a pattern that does not fit a layer, or a sparsity
    that does not fit the pattern, before any work is done.
    """
    check_sparsity(pattern, sparsity)
    source = source or Memory(model)
    device = torch.device(device) if device is not None else _device_of(model)
    names = find_blocks(model)
    views, outer = _views_by_block(model, names, include, exclude)
    todo = {
        view.name: counts[view.name] if counts else pattern.counts(view.shape, sparsity, name=view.name)
        for view in [*(view for group in views.values() for view in group), *outer]
    }
    if shared:
        tokens = _own_share(tokens, fit)
    done = ranks.agree([work is not None and work.has(name) for name in names]) if shared else None
    hidden, arguments = embed(model, names, tokens, source=source, device=device, batch_size=batch_size)
    dense = list(hidden) if fit is not None and fit.inputs == "dense" else None
    masks: dict[str, Tensor] = {}
    reports: list[BlockReport] = []
    with ahead(source, names, device) as moving:
        for index, name in enumerate(names):
            step = _Step(model, name, views[name], device, moving, precision, shared)
            saving = None
            if work is not None and (work.has(name) if done is None else done[index]):
                report = step.replay_(work, masks, hidden, arguments, dense)
            else:
                report = step.solve_(solver, pattern, todo, gram, fit, masks, hidden, arguments, dense)
                saving = partial(_finish_, work, step, masks, report)
            reports.append(report)
            moving.release(name, saving)
            if on_block is not None:
                on_block(report)
    if outer:
        batches = list(zip(tokens.split(batch_size), hidden, strict=True))
        with source.outside(device), autocast(device, precision):
            reports += _solve_outside_(
                model, names, outer, solver, pattern, todo, gram, batches, masks, work, shared=shared
            )
    return Streamed(Masks(masks), reports)


def survey(
    model: nn.Module,
    *,
    tokens: Tensor,
    source: Source | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    on_block: Callable[[str], None] | None = None,
) -> dict[str, Inputs]:
    """View name -> input norms of every prunable layer in the dense blocks, for allocations that look at all layers."""
    source = source or Memory(model)
    device = torch.device(device) if device is not None else _device_of(model)
    names = find_blocks(model)
    views, _ = _views_by_block(model, names, include, exclude)
    hidden, arguments = embed(model, names, tokens, source=source, device=device, batch_size=batch_size)
    seen: dict[str, Inputs] = {}
    with ahead(source, names, device) as moving:
        for name in names:
            block = moving.load(name, device)
            with torch.no_grad(), observe(block, views[name], gram=False) as inputs, autocast(device, precision):
                _advance_(block, hidden, arguments[name])
            seen.update(inputs)
            moving.release(name)
            if on_block is not None:
                on_block(name)
    return seen


class _Step:
    """One block on its way through the device."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        views: list[View],
        device: torch.device,
        source: Ahead,
        precision: Precision,
        shared: bool,
    ) -> None:
        self.name, self.views, self.device, self.shared = name, views, device, shared
        self.precision: Precision = precision
        self.block = source.load(name, device)
        self.started = time.perf_counter()

    def solve_(
        self,
        solver: Solver,
        pattern: Pattern,
        todo: Mapping[str, int],
        gram: bool,
        fit: Fit | None,
        masks: dict[str, Tensor],
        hidden: list[Tensor],
        arguments: Mapping[str, list[Arguments]],
        dense: list[Tensor] | None,
    ) -> BlockReport:
        """Prune the block from what reaches it, fit it, and replace `hidden` by what leaves it."""
        own = arguments[self.name]
        before = copy.deepcopy(self.block) if fit is not None else None
        with torch.no_grad(), observe(self.block, self.views, gram=gram) as inputs, self._autocast():
            leaving: list[Tensor] = []
            for x, call in zip(hidden, own, strict=True):
                y = run_block(self.block, x, call)
                if fit is not None and dense is None:  # what the dense block makes of the pruned inputs is the target
                    leaving.append(y.to(x.device))
        parameters = dict(self.block.named_parameters(prefix=self.name))
        if self.shared:
            add_up_(self.views, inputs)
        chosen, fallback = solve_layers_(parameters, self.views, solver, pattern, todo, inputs, shared=self.shared)
        masks.update(chosen)
        del inputs
        errors = None
        if fit is not None and before is not None:
            entering = None if dense is None else list(dense)
            if dense is not None:
                with self._autocast():
                    _advance_(before, dense, own)
            targets = leaving if dense is None else dense
            mine = Masks(chosen)
            errors = reconstruct(
                self.block, before, self.views, mine, fit, hidden, own, targets, entering, prefix=self.name
            )
        del leaving
        with self._autocast():
            _advance_(self.block, hidden, own)
        return _report(self.name, self.views, masks, self.started, errors, fallback)

    def replay_(
        self,
        work: Work,
        masks: dict[str, Tensor],
        hidden: list[Tensor],
        arguments: Mapping[str, list[Arguments]],
        dense: list[Tensor] | None,
    ) -> BlockReport:
        """Take the finished block from the work folder and only run it."""
        with self._autocast():
            if dense is not None:
                _advance_(self.block, dense, arguments[self.name])
            report = work.restore_(self.name, self.block, masks)
            _advance_(self.block, hidden, arguments[self.name])
        return report

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.device, self.precision)


def _finish_(work: Work | None, step: _Step, masks: dict[str, Tensor], report: BlockReport) -> None:
    """What is done with a solved block beside the next one: its masks go to the host, and it is saved.

    All bool masks would not fit beside a large model, and the device need not wait while one block's are copied.
    """
    mine = {view.parameter: masks[view.parameter].cpu() for view in step.views}
    masks.update(mine)
    if work is not None:
        work.save(step.name, step.block, mine, report)


@torch.no_grad()
def _solve_outside_(
    model: nn.Module,
    names: Sequence[str],
    outer: Sequence[View],
    solver: Solver,
    pattern: Pattern,
    todo: Mapping[str, int],
    gram: bool,
    batches: Sequence[tuple[Tensor, Tensor]],
    masks: dict[str, Tensor],
    work: Work | None,
    *,
    shared: bool,
) -> list[BlockReport]:
    """Prune what was asked for outside the blocks (the head), from what the pruned blocks hand to it.

    batches: (token ids, hidden state that left the last block), on any device.
    """
    started, device = time.perf_counter(), next(iter(model.get_submodule(outer[0].name).parameters())).device
    with observe(model, outer, gram=gram) as inputs:
        for ids, leaving in batches:
            finish(model, names, ids.to(device), leaving.to(device))
    if shared:
        add_up_(outer, inputs)
    reports: list[BlockReport] = []
    for view in outer:
        module = model.get_submodule(view.name)
        done = work is not None and work.has(view.name)
        if work is not None and (ranks.agree(done) if shared else done):
            reports.append(work.restore_(view.name, module, masks))
            continue
        parameters = dict(model.named_parameters())
        chosen, fallback = solve_layers_(parameters, [view], solver, pattern, todo, inputs, shared=shared)
        masks.update({key: mask.cpu() for key, mask in chosen.items()})
        reports.append(_report(view.name, [view], chosen, started, None, fallback))
        if work is not None:
            work.save(view.name, module, chosen, reports[-1])
    return reports


def _report(
    name: str,
    views: Sequence[View],
    masks: Mapping[str, Tensor],
    started: float,
    errors: tuple[float, float] | None,
    fallback: Sequence[str],
) -> BlockReport:
    names = list(dict.fromkeys(view.parameter for view in views))
    return BlockReport(
        name,
        {name: count_kept(masks[name]) for name in names},
        {name: masks[name].numel() for name in names},
        time.perf_counter() - started,
        errors[0] if errors else None,
        errors[1] if errors else None,
        fallback,
    )


@torch.no_grad()
def _advance_(block: nn.Module, hidden: list[Tensor], arguments: Sequence[Arguments]) -> None:
    for i, args in enumerate(arguments):
        home = hidden[i].device
        hidden[i] = run_block(block, hidden[i], args).to(home)


def _views_by_block(
    model: nn.Module, names: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, list[View]], list[View]]:
    """The views of each block, and those outside, which are only there when `include` names them."""
    whole = find_layers(model, include=include, exclude=exclude)
    views = {name: [view for view in whole if view.name.startswith(name + ".")] for name in names}
    inside = {view.name for group in views.values() for view in group}
    if not whole:
        raise ValueError(
            f"nothing to prune: include={list(include)}, exclude={list(exclude)} leave no layer of "
            f"{names[0]} .. {names[-1]}"
        )
    return views, [view for view in whole if view.name not in inside]


def _own_share(tokens: Tensor, fit: Fit | None) -> Tensor:
    """This rank's windows."""
    if fit is not None:
        raise ValueError("processes do not share the fit of a block: leave out fit, or call stream with shared=False")
    if len(tokens) < ranks.count():
        raise ValueError(f"{len(tokens)} windows cannot be shared by {ranks.count()} processes: take at least as many")
    return tokens[ranks.share(len(tokens))]


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
