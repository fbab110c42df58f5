"""Prune a language model block by block: calibrate, solve, fit, hand on, write, free.

Only one block and the activations entering it live on the device; the other weights stay where they are (memory, or
safetensors shards for a model built on the meta device). Finished blocks are written at once, so a killed run goes on
after its last one:

    hidden_0 = embed(tokens);  for each block l:  W_l <- solve(W_l, inputs);  hidden_l+1 = block_l(hidden_l)

Before the first block, counts say how many entries each layer keeps. For an allocation that compares scores or inputs
of all layers the dense blocks run once, one at a time; a score is computed at each look, a layer at a time.

The layers of a block are solved by one process, or shared among several:

    inputs_r = statistics of rank r's windows;   inputs = sum_r inputs_r;   each layer is solved by one rank and sent

A weight that several blocks share is solved once, in the first of them, with what all of them receive in the dense
model: the dense blocks run once before, and the later ones are given the solved weight.

Every rank ends with the same bits: sums come out alike everywhere, and weights and masks are their solver's.

How a block is run is in `blocks`, where it comes from in `sources`; the fit of a pruned block is in `reconstruct`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunus.blocks import Arguments, Source, embed, find_blocks, finish, run_block, uncompiled
from prunus.layers import Inputs, Layer, Lookup, View, check_unwrapped, find_layers, parameter_shapes
from prunus.machine import Precision, autocast, in_mode, ranks
from prunus.masks import Masks, count_kept, unwrapped
from prunus.patterns import Pattern, Unstructured, check_sparsity
from prunus.score import (
    Allocation,
    Count,
    Criterion,
    Score,
    Scores,
    Tried,
    allocation_of,
    check_comparable,
    check_known,
    compared,
    counts_under,
    criterion_of,
    limited,
    needed,
    observable,
    observe,
    rows_of,
    staying,
    uniform,
)
from prunus.stream.reconstruct import Fit, Passing, reconstruct
from prunus.stream.sources import Ahead, Memory, ahead
from prunus.stream.work import BlockReport, Work
from prunus.train import StandIns

__all__ = ["Streamed", "stream", "survey"]

_TRIED = 1 << 28  # logits of the dense model that are kept while allocations are tried: 1 GiB
_PARTS = 16  # batches of those windows: searches look at a part first


@dataclass(frozen=True)
class Streamed:
    """The masks (parameter name -> bool) and one report a block."""

    masks: Masks
    reports: list[BlockReport] = field(default_factory=list)


def stream(
    model: nn.Module,
    criterion: Criterion | Score,
    pattern: Pattern | None = None,
    sparsity: float | None = None,
    *,
    tokens: Tensor,
    allocation: Allocation | Count = uniform,
    within: Masks | None = None,
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

    criterion: a `Criterion`, or a function layer -> score (out, in). It says which statistics of the inputs are taken.
    pattern: where zeros may lie; None is any entries of a row or a layer, as the criterion compares.
    sparsity: the share of zeros; may be left out where the pattern fixes it.
    tokens: (samples, length) int64 calibration windows, run `batch_size` at a time.
    allocation: how the zeros are shared out. For one that compares scores or inputs the dense blocks run once before;
        one that asks for the loss runs the whole model, which must be in memory.
    within: earlier masks. What they prune stays pruned and counts as zero: the sparsity is that of the result.
    fit: how a pruned block is fitted to its dense outputs; None leaves it.
    precision: autocast in which blocks run; statistics and solvers are float32 throughout.
    source: where weights come from when `model` is on the meta device.
    work: folder of finished blocks; blocks already there are replayed, not solved again.
    shared: whether the launched processes share the windows and the layers (each calls this alike, and ends alike);
        not with a fit.

    The next block is brought, and the last one is saved and freed, while one is solved (`ahead`).
    Raises ValueError for a model whose blocks are not found, a criterion that is none, a pattern that does not fit a
    layer, a sparsity that does not fit the pattern or exceeds what `within` left, an allocation that has nothing to
    compare, or a criterion without a score that is to stay `within` masks, before any work is done; for a pattern that
    cannot, when it comes to the layer.

    >>> windows = torch.randint(100, (4, 16))
    >>> streamed = stream(model, wanda, NM(2, 4), tokens=windows)
    >>> streamed.reports[0].sparsity
    0.5
    """
    asked = criterion_of(criterion)
    pattern = Unstructured(compared(asked, allocation)) if pattern is None else pattern
    check_sparsity(pattern, sparsity)
    check_comparable(asked, allocation)
    needs = needed(asked, allocation_of(allocation))
    place = _placed(model, source, device, precision, include=include, exclude=exclude, observed=bool(needs))
    if within is not None:
        check_known(within, dict(place.model.named_parameters()))
        asked = staying(asked, [*place.inner, *place.outer], within)
    with uncompiled(place.model) as model, in_mode(model, training=False):  # dropout is of training
        counts = _counts_of(
            place, asked, pattern, sparsity, allocation, within=within, tokens=tokens, batch_size=batch_size, work=work
        )
        task = _Task(asked, pattern, counts)
        if shared:
            tokens = _own_share(tokens, fit)
        names = place.names
        done = ranks.agree([work is not None and work.has(name) for name in names]) if shared else None
        begin = partial(embed, model, names, tokens, source=place.source, device=place.device, batch_size=batch_size)
        hidden, arguments = begin()
        dense = (list(hidden), begin()[1]) if fit is not None and fit.inputs == "dense" else None
        flow = _Flow(hidden, arguments, dense, _survey_tied(place, asked.needs, tokens, batch_size))
        flow.stand_ins.wanted = len(names) > 1
        reports: list[BlockReport] = []
        with ahead(place.source, names, place.device) as moving:
            for index, name in enumerate(names):
                step = _Step(place, name, moving, shared)
                saving = None
                if work is not None and (work.has(name) if done is None else done[index]):
                    report = step.replay_(work, flow)
                else:
                    report = step.solve_(task, fit, flow)
                    saving = partial(_finish_, work, step, flow.masks, report)
                reports.append(report)
                moving.release(name, saving)
                if on_block is not None:
                    on_block(report)
        if place.outer:
            batches = list(zip(tokens.split(batch_size), hidden, strict=True))
            with place.source.outside(place.device), autocast(place.device, precision):
                reports += _solve_outside_(place, task, batches, flow.masks, work, shared=shared)
    return Streamed(Masks(flow.masks), reports)


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
    """View name -> input norms (in,) of every prunable layer, in the dense blocks.

    >>> seen = survey(model, tokens=torch.randint(100, (4, 16)))
    >>> seen["model.decoder.layers.0.fc1"].norms.shape
    torch.Size([8])
    """
    place = _placed(model, source, device, precision, include=include, exclude=exclude)
    with uncompiled(place.model) as plain, in_mode(plain, training=False):
        return _survey(place, tokens, batch_size, on_block=on_block)


@dataclass(frozen=True, eq=False)
class _Place:
    """A model whose blocks are brought to a device one by one: their names in order, the prunable layers of each, and
    those outside the blocks, which are only there when they are asked for by name."""

    model: nn.Module
    source: Source
    device: torch.device
    precision: Precision
    names: list[str]
    views: dict[str, list[View]]
    outer: list[View]
    tied: dict[str, dict[str, View]]  # name of a view whose weight several blocks have -> block -> the view there
    common: dict[str, dict[str, str]]  # block -> its parameters that several have -> their name in the first of those

    @property
    def inner(self) -> list[View]:
        """The layers of all blocks."""
        return [view for name in self.names for view in self.views[name]]


def _placed(
    model: nn.Module,
    source: Source | None,
    device: torch.device | str | None,
    precision: Precision,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
    observed: bool = True,
) -> _Place:
    """The model's blocks and layers, if `observed` those whose inputs can be.

    Raises ValueError when no blocks are found, or nothing is left to prune.
    """
    model = unwrapped(model)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    check_unwrapped(model)
    names = find_blocks(model)
    found = find_layers(model, include=include, exclude=exclude)
    views, outer = _views_by_block(observable(model, found, include) if observed else found, names, include, exclude)
    places = _places(model, names)
    tied, common = _tied_views(model, views, places), _common_parameters(names, places)
    return _Place(model, source or Memory(model), device, precision, names, views, outer, tied, common)


@torch.no_grad()
def _counts_of(
    place: _Place,
    criterion: Criterion,
    pattern: Pattern,
    sparsity: float | None,
    allocation: Allocation | Count,
    *,
    within: Masks | None,
    tokens: Tensor,
    batch_size: int,
    work: Work | None,
) -> dict[str, int]:
    """View name -> entries to keep. Layers outside the blocks keep the share that the sparsity says."""
    views, asked = place.inner, allocation_of(allocation)
    for view in [*views, *place.outer]:  # what does not fit is refused before anything is measured
        pattern.counts(view.shape, sparsity, name=view.name)
    counts = counts_under(pattern, _scores_of(place, place.outer, within), sparsity, uniform)
    needs = needed(criterion, asked) if asked.reads in ("scores", "inputs", "loss") else ""
    inputs = _survey(place, tokens, batch_size, gram=needs == "gram") if needs else {}
    layers, scores = _layers(place, views, inputs), _scores_of(place, views, within)
    found = Lookup(layers, lambda name: criterion(layers[name])) if asked.reads == "scores" else scores.found
    trying = _tried(place, inputs, (criterion, pattern), tokens, work) if asked.reads == "loss" else nullcontext()
    with trying as loss:
        return counts | counts_under(pattern, replace(scores, found=found, layers=layers, loss=loss), sparsity, asked)


@contextmanager
def _tried(
    place: _Place, inputs: Mapping[str, Inputs], how: tuple[Criterion, Pattern], tokens: Tensor, work: Work | None
) -> Generator[Tried]:
    """The loss of counts, on so many of the windows as have 2^28 logits; the model is whole on the device meanwhile.

    Raises ValueError for a model that is not in memory.
    """
    if not isinstance(place.source, Memory):
        raise ValueError("the allocation tries the whole model: leave out streaming, or take another allocation")
    model, home = place.model, next(place.model.parameters()).device

    def logits(windows: Tensor) -> Tensor:
        with autocast(place.device, place.precision):
            return rows_of(model(input_ids=windows.to(place.device), use_cache=False))

    try:
        model.to(place.device)
        parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
        with in_mode(model, training=False):
            with torch.no_grad():
                count = max(1, min(len(tokens), _TRIED // logits(tokens[:1]).numel()))
            parts = tokens[:count].split(-(-count // _PARTS))
            outputs = (lambda part: logits(parts[part]), len(parts))
            known = None if work is None else work.tries()
            tried = Tried(parameters, place.inner, inputs, how, outputs, known=known)
            try:
                yield tried
            finally:
                tried.restore_()
    finally:
        model.to(home)


def _scores_of(place: _Place, views: Sequence[View], within: Masks | None) -> Scores:
    """Scores that are all alike, but -inf where earlier masks prune."""
    by_name = {view.name: view for view in views}
    alike = {name: torch.zeros(()).expand(view.shape) for name, view in by_name.items()}
    shapes = parameter_shapes(dict(place.model.named_parameters()), views)
    if within is None:
        return Scores(alike, shapes)
    return Scores(alike, shapes, change=lambda name, score: limited(score, by_name[name], within))


@torch.no_grad()
def _advance_(block: nn.Module, hidden: list[Tensor], arguments: Sequence[Arguments]) -> None:
    """Each hidden state becomes what the block makes of it, where it lies."""
    for i, args in enumerate(arguments):
        home = hidden[i].device
        hidden[i] = run_block(block, hidden[i], args).to(home)


@dataclass(frozen=True)
class _Task:
    """What is done with every layer: counts has view name -> entries to keep."""

    criterion: Criterion
    pattern: Pattern
    counts: Mapping[str, int]


@torch.no_grad()
def _add_up_(views: Sequence[View], inputs: Mapping[str, Inputs]) -> None:
    """What all ranks' windows taught about the inputs of these views, in place of this rank's own."""
    for each in {id(inputs[view.name]): inputs[view.name] for view in views if view.name in inputs}.values():
        tokens = torch.tensor([each.tokens], dtype=torch.int64, device=each.squares.device)
        ranks.sum_(tokens)
        each.tokens = int(tokens)
        if each.gram is None:
            ranks.sum_(each.squares)
        else:
            ranks.sum_(each.gram)
            each.squares.copy_(each.gram.diagonal())


def _owners(views: Sequence[View], inputs: Mapping[str, Inputs], world: int) -> dict[str, int]:
    """View name -> rank that solves it: groups of one input, the dearest first, each to the rank with least to do.

    A group of inputs n costs a factorisation and sweeps, n^3 + sum of out * n^2.
    """
    groups: dict[int, list[View]] = {}  # a layer whose inputs nobody asked for stands alone
    for view in views:
        groups.setdefault(id(inputs.get(view.name, view)), []).append(view)
    costs = [(sum(v.shape[0] for v in group) + group[0].shape[1]) * group[0].shape[1] ** 2 for group in groups.values()]
    load = [0] * world
    found: dict[str, int] = {}
    for cost, group in sorted(zip(costs, groups.values(), strict=True), key=lambda each: -each[0]):
        rank = load.index(min(load))
        load[rank] += cost
        found |= {view.name: rank for view in group}
    return found


@torch.no_grad()
def _solve_layers_(
    parameters: Mapping[str, nn.Parameter],
    views: Sequence[View],
    task: _Task,
    inputs: Mapping[str, Inputs],
    *,
    shared: bool = False,
) -> dict[str, Tensor]:
    """Parameter name -> mask, beside the weights, which were solved in place.

    shared: whether the ranks share the views; their `inputs` are added up before.
    """
    by = _owners(views, inputs, ranks.count() if shared else 1)
    masks: dict[str, Tensor] = {}
    for view in views:
        parameter = parameters[view.parameter]
        whole = masks.setdefault(view.parameter, torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device))
        if shared and by[view.name] != ranks.index():
            continue
        layer = Layer(view.name, view.matrix(parameter.data), inputs.get(view.name))
        with torch.autocast(parameter.device.type, enabled=False):
            weight, mask = task.criterion.solve(layer, task.pattern, task.counts[view.name])
        view.write_(parameter.data, weight.masked_fill(~mask, 0.0))
        view.write_(whole, mask)
    if shared:
        for view in views:
            for stored in (parameters[view.parameter].data, masks[view.parameter]):
                matrix = view.matrix(stored).contiguous()
                ranks.send_(matrix, by[view.name])
                view.write_(stored, matrix)
    return masks


def _seen(views: Sequence[View], inputs: Mapping[str, Inputs]) -> tuple[list[str], dict[str, list[int]]]:
    """Layers that no token reached, and stack of experts -> the tokens that each of them saw."""
    tokens = {view.name: inputs[view.name].tokens for view in views if view.name in inputs}
    routed: dict[str, list[int]] = {}
    for view in views:
        if view.index is not None and view.name in tokens:
            routed.setdefault(view.parameter, []).append(tokens[view.name])
    return [name for name, count in tokens.items() if count == 0], routed


@dataclass(eq=False)
class _Flow:
    """What runs through the blocks: per batch the hidden state (b, length, d) and the arguments of each block's calls,
    both also of the dense network where a fit asks for them; the masks so far; what blocks are fitted through."""

    hidden: list[Tensor]
    arguments: Mapping[str, list[Arguments]]
    dense: tuple[list[Tensor], Mapping[str, list[Arguments]]] | None
    tied: Mapping[str, Inputs] = field(default_factory=dict)  # of views whose weights several blocks have
    solved: dict[str, Tensor] = field(default_factory=dict)  # parameters of several blocks, as the first one left them
    unpruned: dict[str, Tensor] = field(default_factory=dict)  # and as they were, on the host
    masks: dict[str, Tensor] = field(default_factory=dict)
    stand_ins: StandIns = field(default_factory=StandIns)


class _Step:
    """One block on its way through the device."""

    def __init__(self, place: _Place, name: str, source: Ahead, shared: bool) -> None:
        self.place, self.name, self.views, self.shared = place, name, place.views[name], shared
        self.block = source.load(name, place.device)
        self.started = time.perf_counter()

    def solve_(self, task: _Task, fit: Fit | None, flow: _Flow) -> BlockReport:
        """Prune the block from what reaches it, fit it, and replace `flow.hidden` by what leaves it."""
        before = self._dense(flow) if fit is not None else None
        self._take_tied_(flow)
        inputs, leaving = self._observe(task, flow, keep=fit is not None and flow.dense is None)
        inputs |= {view.name: flow.tied[view.name] for view in self.views if view.name in flow.tied}
        parameters = dict(self.block.named_parameters(prefix=self.name))
        if self.shared:
            _add_up_(self.views, inputs)
        chosen = _solve_layers_(parameters, self.views, task, inputs, shared=self.shared)
        flow.masks.update(chosen)
        seen = _seen(self.views, inputs)
        del inputs
        errors = None
        if fit is not None and before is not None:
            errors = self._fit_(before, fit, Masks(chosen), flow, leaving)
        del leaving
        self._leave_tied_(flow)
        self._advance_(self.block, flow.hidden, flow.arguments)
        return _report(self.name, self.views, flow.masks, started=self.started, seen=seen, errors=errors)

    def replay_(self, work: Work, flow: _Flow) -> BlockReport:
        """Take the finished block from the work folder and only run it."""
        dense = self._dense(flow) if self.place.common[self.name] else self.block
        if flow.dense is not None:
            self._advance_(dense, *flow.dense)
        del dense
        report = work.restore_(self.name, self.block, flow.masks)
        self._leave_tied_(flow)
        self._advance_(self.block, flow.hidden, flow.arguments)
        return report

    @torch.no_grad()
    def _dense(self, flow: _Flow) -> nn.Module:
        """A copy of the block, before it is pruned, with dense weights where it shares some with one before."""
        twin, earlier = copy.deepcopy(self.block), self._earlier
        for key, first in self.place.common[self.name].items():
            weight = twin.get_parameter(key)
            if key in earlier:
                weight.copy_(flow.unpruned[first])
            else:
                flow.unpruned[first] = weight.to("cpu", copy=True)
        return twin

    @torch.no_grad()
    def _take_tied_(self, flow: _Flow) -> None:
        """Give the block what it shares with one before, as that left it; its source may have read dense weights."""
        for key, first in self._earlier.items():
            self.block.get_parameter(key).copy_(flow.solved[first])

    def _leave_tied_(self, flow: _Flow) -> None:
        earlier = self._earlier
        for key, first in self.place.common[self.name].items():
            if key not in earlier:
                flow.solved[first] = self.block.get_parameter(key).detach().clone()

    @property
    def _earlier(self) -> dict[str, str]:
        """The block's parameters that one before it has, too -> their name there."""
        common = self.place.common[self.name]
        return {key: first for key, first in common.items() if first != f"{self.name}.{key}"}

    @torch.no_grad()
    def _observe(self, task: _Task, flow: _Flow, *, keep: bool) -> tuple[dict[str, Inputs], list[Tensor]]:
        """What the criterion needs of the layers' inputs, and what leaves the dense block where it is to be kept.

        The block does not run where neither is asked for.
        """
        needs, leaving = task.criterion.needs, list[Tensor]()
        if not needs and not keep:
            return {}, leaving
        seeing = observe(self.block, self.views, gram=needs == "gram") if needs else nullcontext(dict[str, Inputs]())
        with seeing as inputs, self._autocast():
            for x, call in zip(flow.hidden, flow.arguments[self.name], strict=True):
                y = run_block(self.block, x, call)
                if keep:
                    leaving.append(y.to(x.device))
        return inputs, leaving

    def _fit_(
        self, before: nn.Module, fit: Fit, masks: Masks, flow: _Flow, leaving: list[Tensor]
    ) -> tuple[float, float]:
        """The block's error before and after its fit to what the dense block makes of pruned or of dense inputs."""
        entering, targets = None, leaving
        if flow.dense is not None:
            hidden, arguments = flow.dense
            entering, targets = list(zip(hidden, arguments[self.name], strict=True)), hidden
            self._advance_(before, hidden, arguments)
        passing = Passing(flow.hidden, flow.arguments[self.name], targets, entering)
        how: dict[str, Any] = {"masks": masks, "prefix": self.name, "fixed": tuple(self._earlier)}
        how["stand_ins"] = flow.stand_ins
        return reconstruct(self.block, before, fit, passing, views=self.views, **how)

    def _advance_(self, block: nn.Module, hidden: list[Tensor], arguments: Mapping[str, list[Arguments]]) -> None:
        with self._autocast():
            _advance_(block, hidden, arguments[self.name])

    def _autocast(self) -> AbstractContextManager[object]:
        return autocast(self.place.device, self.place.precision)


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
    place: _Place,
    task: _Task,
    batches: Sequence[tuple[Tensor, Tensor]],
    masks: dict[str, Tensor],
    work: Work | None,
    *,
    shared: bool,
) -> list[BlockReport]:
    """Prune what was asked for outside the blocks (the head), from what the pruned blocks hand to it.

    batches: (token ids, hidden state that left the last block), on any device.
    """
    started, model, outer = time.perf_counter(), place.model, place.outer
    device = next(iter(model.get_submodule(outer[0].name).parameters())).device
    inputs: dict[str, Inputs] = {}
    if task.criterion.needs:
        with observe(model, outer, gram=task.criterion.needs == "gram") as inputs:
            for ids, leaving in batches:
                finish(model, place.names, ids.to(device), leaving.to(device))
    if shared:
        _add_up_(outer, inputs)
    reports: list[BlockReport] = []
    for view in outer:
        module = model.get_submodule(view.name)
        done = work is not None and work.has(view.name)
        if work is not None and (ranks.agree(done) if shared else done):
            reports.append(work.restore_(view.name, module, masks))
            continue
        parameters = dict(model.named_parameters())
        chosen = _solve_layers_(parameters, [view], task, inputs, shared=shared)
        masks.update({key: mask.cpu() for key, mask in chosen.items()})
        reports.append(_report(view.name, [view], chosen, started=started, seen=_seen([view], inputs)))
        if work is not None:
            work.save(view.name, module, chosen, reports[-1])
    return reports


def _report(
    name: str,
    views: Sequence[View],
    masks: Mapping[str, Tensor],
    *,
    started: float,
    seen: tuple[Sequence[str], Mapping[str, Sequence[int]]],
    errors: tuple[float, float] | None = None,
) -> BlockReport:
    names = list(dict.fromkeys(view.parameter for view in views))
    return BlockReport(
        name,
        {name: count_kept(masks[name]) for name in names},
        {name: masks[name].numel() for name in names},
        time.perf_counter() - started,
        errors[0] if errors else None,
        errors[1] if errors else None,
        *seen,
    )


def _own_share(tokens: Tensor, fit: Fit | None) -> Tensor:
    """This rank's windows."""
    if fit is not None:
        raise ValueError("processes do not share the fit of a block: leave out fit, or call stream with shared=False")
    if len(tokens) < ranks.count():
        raise ValueError(f"{len(tokens)} windows cannot be shared by {ranks.count()} processes: take at least as many")
    return tokens[ranks.share(len(tokens))]


def _places(model: nn.Module, names: Sequence[str]) -> dict[int, list[tuple[str, str]]]:
    """Id of each parameter of the blocks -> its names, each with its block."""
    places: dict[int, list[tuple[str, str]]] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        block = next((name for name in names if key.startswith(f"{name}.")), None)
        if block is not None:
            places.setdefault(id(parameter), []).append((block, key))
    return places


def _common_parameters(names: Sequence[str], places: Mapping[int, list[tuple[str, str]]]) -> dict[str, dict[str, str]]:
    """Block -> its parameters, by their names in it, that several blocks have -> their name in the first of those."""
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for (owner, first), *others in places.values():
        later = [(block, key) for block, key in others if block != owner]
        for block, key in [(owner, first), *later] if later else []:
            found[block][key.removeprefix(f"{block}.")] = first
    return found


def _tied_views(
    model: nn.Module, views: Mapping[str, Sequence[View]], places: Mapping[int, list[tuple[str, str]]]
) -> dict[str, dict[str, View]]:
    """Name of each view whose parameter is in several blocks -> block -> the view with its names there."""
    found: dict[str, dict[str, View]] = {}
    for view in (view for each in views.values() for view in each):
        named = dict(places[id(model.get_parameter(view.parameter))])
        if len(named) > 1:
            ends = [
                (block, key, key if view.index is not None else key.rpartition(".")[0]) for block, key in named.items()
            ]
            tail = f"[{view.index}]" if view.index is not None else ""
            found[view.name] = {block: replace(view, name=name + tail, parameter=key) for block, key, name in ends}
    return found


def _survey_tied(place: _Place, needs: str, tokens: Tensor, batch_size: int) -> dict[str, Inputs]:
    """Name of each view whose weight several blocks have -> what it receives in all of them, in the dense model."""
    if not place.tied or not needs:
        return {}
    views = {block: [each[block] for each in place.tied.values() if block in each] for block in place.names}
    seen = _survey(replace(place, views=views), tokens, batch_size, gram=needs == "gram")
    return {name: Inputs.together([seen[view.name] for view in places.values()]) for name, places in place.tied.items()}


def _survey(
    place: _Place,
    tokens: Tensor,
    batch_size: int,
    *,
    gram: bool = False,
    on_block: Callable[[str], None] | None = None,
) -> dict[str, Inputs]:
    model, names, device = place.model, place.names, place.device
    hidden, arguments = embed(model, names, tokens, source=place.source, device=device, batch_size=batch_size)
    seen: dict[str, Inputs] = {}
    with ahead(place.source, names, device) as moving:
        for name in names:
            block = moving.load(name, device)
            with (
                torch.no_grad(),
                observe(block, place.views[name], gram=gram) as inputs,
                autocast(device, place.precision),
            ):
                _advance_(block, hidden, arguments[name])
            seen.update(inputs)
            moving.release(name)
            if on_block is not None:
                on_block(name)
    return seen


def _layers(place: _Place, views: Sequence[View], inputs: Mapping[str, Inputs]) -> Mapping[str, Layer]:
    """Each layer on the device, brought at each look."""
    by_name = {view.name: view for view in views}

    def layer(name: str) -> Layer:
        parameter = place.source.tensor(by_name[name].parameter, place.device)
        return Layer(name, by_name[name].matrix(parameter), inputs.get(name))

    return Lookup(by_name, layer)


def _views_by_block(
    whole: Sequence[View], names: Sequence[str], include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, list[View]], list[View]]:
    """The views of each block, and those outside, which are only there when `include` names them."""
    views = {name: [view for view in whole if view.name.startswith(name + ".")] for name in names}
    inside = {view.name for group in views.values() for view in group}
    if not whole:
        raise ValueError(
            f"nothing to prune: include={list(include)}, exclude={list(exclude)} leave no layer of "
            f"{names[0]} .. {names[-1]}"
        )
    return views, [view for view in whole if view.name not in inside]
