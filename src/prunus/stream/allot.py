"""How many entries each layer of a chain of blocks keeps, and what the dense blocks show for that.

    uniform ─▶ the pattern alone    erk ─▶ shapes    global, lamp ─▶ scores of all layers    owl ─▶ inputs of all layers

For scores and inputs the dense blocks run once, one at a time; a score is computed at each look, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.blocks import Arguments, Source, embed, find_blocks, run_block
from prunus.layers import Inputs, Layer, View, find_layers, parameter_shapes
from prunus.machine import Precision, autocast
from prunus.patterns import Pattern
from prunus.score import Allocation, Count, Criterion, Scored, Scores, allocation_of, counts_under, needed, observe
from prunus.stream.ahead import ahead
from prunus.stream.sources import Memory

__all__ = ["Place", "advance_", "counts_of", "placed", "survey"]


@dataclass(frozen=True, eq=False)
class Place:
    """A model whose blocks are brought to a device one by one: their names in order, the prunable layers of each, and
    those outside the blocks, which are only there when they are asked for by name."""

    model: nn.Module
    source: Source
    device: torch.device
    precision: Precision
    names: list[str]
    views: dict[str, list[View]]
    outer: list[View]

    @property
    def inner(self) -> list[View]:
        """The layers of all blocks."""
        return [view for name in self.names for view in self.views[name]]


def placed(
    model: nn.Module,
    source: Source | None,
    device: torch.device | str | None,
    precision: Precision,
    *,
    include: Sequence[str],
    exclude: Sequence[str],
) -> Place:
    """The model's blocks and layers. Raises ValueError when no blocks are found, or nothing is left to prune."""
    device = torch.device(device) if device is not None else next(model.parameters()).device
    names = find_blocks(model)
    views, outer = _views_by_block(model, names, include, exclude)
    return Place(model, source or Memory(model), device, precision, names, views, outer)


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
    """View name -> input norms (in,) of every prunable layer, in the dense blocks."""
    place = placed(model, source, device, precision, include=include, exclude=exclude)
    return _survey(place, tokens, batch_size, on_block=on_block)


def _survey(
    place: Place,
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
                advance_(block, hidden, arguments[name])
            seen.update(inputs)
            moving.release(name)
            if on_block is not None:
                on_block(name)
    return seen


@torch.no_grad()
def counts_of(
    place: Place,
    criterion: Criterion,
    pattern: Pattern,
    sparsity: float | None,
    allocation: Allocation | Count,
    *,
    tokens: Tensor,
    batch_size: int,
) -> dict[str, int]:
    """View name -> entries to keep. Layers outside the blocks keep the share that the sparsity says."""
    views = place.inner
    counts = {view.name: pattern.counts(view.shape, sparsity, name=view.name) for view in [*views, *place.outer]}
    asked = allocation_of(allocation)
    if asked.reads:
        needs = needed(criterion, asked) if asked.reads in ("scores", "inputs") else ""
        inputs = _survey(place, tokens, batch_size, gram=needs == "gram") if needs else {}
        layers = _Layers(place, {view.name: view for view in views}, inputs)
        shapes = parameter_shapes(dict(place.model.named_parameters()), views)
        alike = {view.name: torch.zeros(()).expand(view.shape) for view in views}  # scores that nobody compares
        found = Scored(layers, criterion) if asked.reads == "scores" else alike
        counts |= counts_under(pattern, Scores(found, shapes, layers), sparsity, asked)
    return counts


@dataclass(frozen=True, eq=False)
class _Layers(Mapping[str, Layer]):
    """Each layer on the device, brought at each look."""

    place: Place
    views: Mapping[str, View]
    inputs: Mapping[str, Inputs]

    def __getitem__(self, name: str) -> Layer:
        view = self.views[name]
        parameter = self.place.source.tensor(view.parameter, self.place.device)
        return Layer(name, view.matrix(parameter), self.inputs.get(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.views)

    def __len__(self) -> int:
        return len(self.views)


@torch.no_grad()
def advance_(block: nn.Module, hidden: list[Tensor], arguments: Sequence[Arguments]) -> None:
    """Each hidden state becomes what the block makes of it, where it lies."""
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
