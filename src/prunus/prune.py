"""Pruning of any module in memory: look at every layer, allot the counts, choose the masks, apply them.

    views ─▶ inputs ─▶ score ─▶ allocation and pattern: counts ─▶ criterion: weights, masks ─▶ applied

Nothing changes before everything is chosen and checked. Models larger than memory are the affair of `stream`, pruning
again and again that of `soup.imp`.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from prunus.layers import Inputs, Layer, View, check_unwrapped, find_layers, parameter_shapes
from prunus.machine import called, hooked, in_mode
from prunus.masks import Masks, unwrapped
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
    check_within,
    compared,
    counts_under,
    criterion_of,
    global_,
    limited,
    magnitude,
    needed,
    observable,
    observe,
    rows_of,
    staying,
    uniform,
)

__all__ = ["prune", "prune_in_turn"]


@torch.no_grad()
def prune(
    model: nn.Module,
    criterion: Criterion | Score = magnitude,
    pattern: Pattern | None = None,
    sparsity: float | None = None,
    *,
    allocation: Allocation | Count | None = None,
    views: Sequence[View] | None = None,
    within: Masks | None = None,
    batches: Iterable[Any] | None = None,
) -> Masks:
    """Masks of the model's prunable weights, chosen and applied: pruned entries are +0.0 in the model.

    criterion: a `Criterion`, or a function layer -> score (out, in). One that moves weights changes those that stay.
    pattern: where zeros may lie; None is any entries of a row or a layer, as the criterion compares.
    sparsity: the share of zeros over all `views` together; may be left out where the pattern fixes it.
    allocation: how the zeros are shared out. None is `global_` where the criterion compares scores of a whole layer,
        and `uniform` where it compares those of a row, where it has no scores, and where the pattern fixes the counts.
    views: the prunable weights, by default `find_layers(model)`, without those whose inputs are needed and cannot be
        observed.
    within: earlier masks. What they prune stays pruned and counts as zero: the sparsity is that of the result.
    batches: calibration for criteria that need inputs, and allocations that try the model: x, tuples that begin with x
        (what follows is not given to the model), or mappings of keywords (a tokenizer's, or of all that your model is
        called with), given to the model in eval mode and on its device. Linear and convolutions of one group can be
        observed; positions that an attention_mask hides do not count.

    A model may be compiled, in DataParallel or AveragedModel; names are those of the ordinary one, unless `views` say
    others.

    Raises ValueError for a model without prunable weights, a sparsity outside [0, 1) or below that of `within`, a
    pattern that does not fit a layer or `within`, `within` or `views` of another model, scores with NaN, a criterion or
    allocation that needs inputs when there are no batches, none in them, or too little for the model's call, a model
    that is adapted, sharded or on meta, and one that cannot do what is asked of it (compare layers without scores; stay
    `within` masks).

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> prune(model, sparsity=0.75)
    Masks(2 parameters, sparsity 0.7500)
    """
    asked = criterion_of(criterion)
    check_sparsity(pattern or Unstructured("row"), sparsity)
    shared = _default(asked, pattern) if allocation is None else allocation_of(allocation)
    pattern = Unstructured(compared(asked, shared)) if pattern is None else pattern
    needs = needed(asked, shared)
    if views is None:
        model = unwrapped(model)
        check_unwrapped(model)
        views = observable(model, find_layers(model)) if needs else find_layers(model)
    if not views:
        raise ValueError(
            "nothing to prune: no Linear or convolution weight was found, or include and exclude left none"
        )
    check_comparable(asked, shared)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    _check_views(views, parameters)
    if within is not None:
        check_known(within, parameters)
        asked = staying(asked, views, within)
    if shared.reads == "loss" and batches is not None:
        batches = list(batches)
    absent = next((view.name for view in views if parameters[view.parameter].is_meta), None)
    if absent is not None:
        raise ValueError(f"'{absent}' is on the meta device: load its weights before pruning them")
    inputs = _inputs(model, views, batches, needs)
    layers = {
        view.name: Layer(view.name, view.matrix(parameters[view.parameter]), inputs.get(view.name)) for view in views
    }
    scores = _scores(asked, layers)
    if asked.score is None and within is not None:
        scores = {view.name: limited(scores[view.name], view, within) for view in views}
    found = Scores(scores, parameter_shapes(parameters, views), layers)
    if shared.reads == "loss":
        with _tried(model, views, inputs, (asked, pattern), batches) as loss:
            counts = counts_under(pattern, replace(found, loss=loss), sparsity, shared)
    else:
        counts = counts_under(pattern, found, sparsity, shared)
    if asked.score is None:
        solved = {name: asked.solve(layers[name], pattern, kept) for name, kept in counts.items()}
        matrices = {name: mask for name, (_, mask) in solved.items()}
    else:  # scores may be dear, and are there
        solved, matrices = {}, {name: pattern.mask(scores[name], kept, name=name) for name, kept in counts.items()}
        if within is not None:
            for name, mask in matrices.items():
                check_within(pattern, scores[name], mask, name=name)
    masks = Masks.of(views, matrices, {name: parameter.shape for name, parameter in parameters.items()})
    for view in views:
        if view.name in solved:
            view.write_(parameters[view.parameter], solved[view.name][0])
    masks.apply_(model)
    return masks


@torch.no_grad()
def prune_in_turn(
    model: nn.Module,
    criterion: Criterion | Score,
    pattern: Pattern | None = None,
    sparsity: float | None = None,
    *,
    batches: Iterable[Any],
    views: Sequence[View] | None = None,
) -> Masks:
    """Masks as `prune` chooses and applies them, a block after the other, each with what the pruned ones before make.

    Blocks are the repeated modules around the views, outermost, in the order in which a batch runs through them: the
    encoder's, and then the decoder's, whose cross-attention receives what the pruned encoder says. Every layer keeps
    the same share. The whole model runs over all batches once for each block; a chain of blocks on packed text is the
    affair of `stream`.
    Raises ValueError as `prune`, before anything changes where the pattern does not fit.

    >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> prune_in_turn(model, magnitude, sparsity=0.75, batches=[torch.ones(3, 8)])
    Masks(2 parameters, sparsity 0.7500)
    """
    asked = criterion_of(criterion)
    if views is None:
        model = unwrapped(model)
        check_unwrapped(model)
        views = observable(model, find_layers(model)) if asked.needs else find_layers(model)
    where, batches = Unstructured(compared(asked, uniform)) if pattern is None else pattern, list(batches)
    _check_views(views, dict(model.named_parameters()))
    alike = {view.name: torch.zeros(()).expand(view.shape) for view in views}
    counts = counts_under(where, alike, sparsity, uniform)
    own = Allocation(lambda scores, _: {name: counts[name] for name in scores}, reads="")
    masks: dict[str, Tensor] = {}
    for group in _turns(model, views, batches):
        masks |= prune(model, asked, where, sparsity, allocation=own, views=group, batches=batches)
    return Masks(masks)


def _turns(model: nn.Module, views: Sequence[View], batches: Sequence[Any]) -> list[list[View]]:
    """The views by block, blocks in the order in which the first batch runs through them; what does not run is last."""
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    block_of = {view.name: _block_of(view.name, lists) for view in views}
    order: dict[str, None] = {}
    modules = dict(model.named_modules())
    hooks = (
        (modules[name], lambda *_, name=name: order.setdefault(name))
        for name in dict.fromkeys(block_of.values())
        if name in modules
    )
    if not batches:
        raise ValueError("there is no calibration batch, which shows the order of the blocks")
    with in_mode(model, training=False), hooked(hooks):
        _run(model, batches[0])
    names = [*order, *(name for name in dict.fromkeys(block_of.values()) if name not in order)]
    return [[view for view in views if block_of[view.name] == name] for name in names]


def _block_of(view: str, lists: set[str]) -> str:
    """The outermost item of a list that holds a layer; the layer itself where there is none."""
    parts = view.partition("[")[0].split(".")
    inside = (".".join(parts[: end + 1]) for end in range(1, len(parts)) if ".".join(parts[:end]) in lists)
    return next(inside, ".".join(parts))


def _check_views(views: Sequence[View], parameters: Mapping[str, Tensor]) -> None:
    for view in views:
        found = parameters.get(view.parameter)
        if found is None or view.matrix(torch.empty(found.shape, device="meta")).shape != view.shape:
            said = "has none of that name" if found is None else f"has {tuple(found.shape)} there"
            raise ValueError(
                f"views name '{view.parameter}', with a matrix {view.shape}; the model {said}: use find_layers(model)"
            )


def _default(criterion: Criterion, pattern: Pattern | None) -> Allocation:
    open_ = pattern is None or pattern.sparsity is None
    return allocation_of(global_ if open_ and criterion.score is not None and criterion.compare == "layer" else uniform)


def _scores(criterion: Criterion, layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The score of each layer; all at once, because an allocation reads them several times. Of a criterion without
    scores, zeros that take no memory."""
    if criterion.score is None:
        return {name: torch.zeros(()).expand(layer.weight.shape) for name, layer in layers.items()}
    return {name: criterion.score(layer) for name, layer in layers.items()}


@contextmanager
def _tried(
    model: nn.Module,
    views: Sequence[View],
    inputs: Mapping[str, Inputs],
    how: tuple[Criterion, Pattern],
    batches: Iterable[Any] | None,
) -> Generator[Tried]:
    """The loss of counts, by the model's logits over the batches; its weights are dense again afterwards."""
    if batches is None:
        raise ValueError("the allocation tries the whole model: pass calibration batches")
    served = list(batches)

    def outputs(batch: int) -> Tensor:
        return rows_of(_run(model, served[batch]))

    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with in_mode(model, training=False):
        tried = Tried(parameters, views, inputs, how, (outputs, len(served)))
        try:
            yield tried
        finally:
            tried.restore_()


def _inputs(model: nn.Module, views: Sequence[View], batches: Iterable[Any] | None, needs: str) -> Mapping[str, Inputs]:
    """What each layer receives over the batches, the model in eval mode meanwhile; nothing where nothing is needed."""
    if not needs:
        return {}
    if batches is None:
        raise ValueError("criterion or allocation need what the layers receive: pass calibration batches")
    plain, served = unwrapped(model), False  # a compiled program calls no hooks
    with in_mode(plain, training=False), observe(plain, views, gram=needs == "gram") as inputs:
        for batch in batches:
            _run(plain, batch)
            served = True
    if not served:
        raise ValueError("there is no calibration batch: a generator that was read before is empty; pass a list")
    return inputs


def _run(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch: x, or a tuple that begins with x; x a tensor, or a mapping of keywords."""
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(inputs, Mapping):
        arguments = inspect.signature(model.forward)
        try:
            arguments.bind(inputs)
        except TypeError as error:
            raise ValueError(
                f"{type(model).__name__} is called with a batch's first item alone ({error}): make each batch a "
                f"mapping of its arguments {', '.join(arguments.parameters)}"
            ) from None
    return called(model, inputs)
