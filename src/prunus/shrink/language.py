"""Language models that are really smaller: blocks, heads and neurons that go, in ordinary models of the same class.

    find_blocks ─▶ choose_blocks ─▶ remove_blocks
    stream(model, columns(width)) on what reads heads or neurons ─▶ masks ─▶ remove_heads, remove_neurons

A part of a block is found by what its matrices receive: those that are given the same tensor make its channels (query,
key, value; gate, up), the one that is given another reads them (out, down). What the reader keeps is fitted to its
dense outputs. Nothing is named by family: a number in the config is changed, an empty model made of it must have the
sizes that are left, and its outputs must be those of the model in which the same channels are zero. What a config
cannot say is refused, such as fewer heads where their size is not a number of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunus.blocks import Arguments, embed, find_blocks, finish, longest, run_block
from prunus.checkpoint import empty_model
from prunus.layers import Inputs
from prunus.machine import Precision, autocast, hooked, imported, in_mode
from prunus.patterns import Unstructured, keep_largest, kept_of
from prunus.score import Criterion
from prunus.shrink.columns import columns
from prunus.shrink.width import fit_readers_
from prunus.stream import Memory, stream

__all__ = [
    "blocks_without",
    "changed",
    "choose_blocks",
    "heads_of",
    "left_of",
    "other_attention",
    "pairs_left",
    "rebuilt",
    "remove_blocks",
    "remove_heads",
    "remove_neurons",
    "remove_width",
    "resized_config",
    "resizings",
    "run_hooked",
    "with_pairs",
]

_LOOK = 32  # tokens on which the smaller model is compared with the masked one
_EXACT, _ROUNDED = 1e-3, 0.1  # largest difference of logits, as a share of the largest: 32 bits, and fewer
_SIZES = ("inner", "intermediate", "ffn")  # in names of numbers that a config may leave open


@dataclass(frozen=True)
class _Part:
    """makers: the Linear or Conv1D modules whose outputs are channels; reader: the one that reads them."""

    makers: tuple[str, ...]
    reader: str


@torch.no_grad()
def remove_neurons(
    model: Any,
    tokens: Tensor,
    share: float,
    *,
    criterion: Criterion | None = None,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
) -> Any:
    """A smaller model without that share of the neurons of every MLP, one intermediate size for all blocks.

    tokens: (samples, length) int64, on which what stays of each down projection is fitted, as in `stream`. criterion:
    what chooses columns of the down projections, in place of `columns()`. The given model is used up: its down
    projections are those that were fitted.

    Raises ValueError for a share outside [0, 1) or by which none goes, for models without such MLPs (experts), with
    several sizes of them, and where the config does not say the size.

    >>> remove_neurons(model, torch.zeros(2, 8, dtype=torch.long), 0.25).config.ffn_dim
    6
    """
    parts = [part for part in _parts(model, tokens) if _is_mlp(model, part)]
    sizes = {_width(model, part.reader) for part in parts}
    if len(sizes) > 1:  # query, key and value in one matrix may be twice as many as the heads are wide
        sizes -= {math.prod(heads_of(model.config)[::2])}
        parts = [part for part in parts if _width(model, part.reader) in sizes]
    if len(sizes) != 1:
        raise ValueError(
            f"shrink.neurons: {type(model).__name__} has {len(parts)} plain MLPs, of sizes {sorted(sizes)}; one size "
            "for all is what configs say. Leave it out"
        )
    (size,) = sizes
    stay = left_of("neurons", "neurons of an MLP", size, share)
    if stay == size:
        return model
    cuts: dict[str, _Cut] = {}
    how = {"device": device, "batch_size": batch_size, "precision": precision}
    for part, kept in _fitted(model, tokens, parts, criterion or columns(), stay / size, how=how):
        both = torch.cat([kept, kept + size])  # of gate and up in one matrix
        rows = {maker: kept if _height(model, maker) == size else both for maker in part.makers}
        cuts |= {part.reader: _Cut(columns=kept)} | {maker: _Cut(rows=each) for maker, each in rows.items()}
    return _cut(model, tokens, cuts, lambda state: resized_config(model, size, stay, state, "neurons"), "neurons")


@torch.no_grad()
def remove_heads(
    model: Any,
    tokens: Tensor,
    share: float,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
) -> Any:
    """A smaller model without that share of the groups of heads that have a key and a value in common, at least one.

    As `remove_neurons`: what stays of each output projection is fitted. Raises ValueError for models whose config has
    no size of heads (then fewer of them cannot be said), for other attention than query, key, value and output, and
    for a share by which no group goes.
    """
    config, stay = model.config, pairs_left(model.config, share)
    heads, pairs, size = heads_of(config)
    parts = [part for part in _parts(model, tokens) if len(part.makers) == 3]
    found = {(*sorted(_height(model, maker) for maker in part.makers), _width(model, part.reader)) for part in parts}
    if found != {(pairs * size, pairs * size, heads * size, heads * size)}:
        raise other_attention(model)
    if stay == pairs:
        return model
    group = heads // pairs
    how = {"device": device, "batch_size": batch_size, "precision": precision}
    cuts: dict[str, _Cut] = {}
    for part, kept in _fitted(model, tokens, parts, columns(group * size), stay / pairs, how=how):
        own = kept.view(stay, group * size)[:, 0] // (group * size)  # which pairs of a key and a value
        few = (own[:, None] * size + torch.arange(size)).flatten()
        cuts |= {maker: _Cut(rows=kept if _height(model, maker) == heads * size else few) for maker in part.makers}
        cuts[part.reader] = _Cut(columns=kept)
    return _cut(model, tokens, cuts, lambda _: with_pairs(config, stay), "heads")


@torch.no_grad()
def remove_width(
    model: Any,
    tokens: Tensor,
    share: float,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
) -> Any:
    """A smaller model whose hidden states are without that share of their entries, the same ones everywhere.

        S_j = sum over the matrices W that read hidden states, the head too, of  ||W_:j||^2 * mean of x_j^2

    Those of least S go, from embeddings, norms, every matrix that reads hidden states or adds to them, and the head.
    RMS norms then divide by the root of another mean: sqrt(d / kept) goes into their weights, d / kept into their eps,
    so that the result is the model in which these entries are zero. Then the matrices in the blocks that read hidden
    states are fitted to what the dense ones make of all entries, block by block (see `width`). The given model stays
    as it is.

    Raises ValueError for a share outside [0, 1) or by which none goes, for LayerNorm, which subtracts a mean of what is
    left, and where the config does not say the size, or not that of heads beside it.
    """
    size = model.get_input_embeddings().weight.shape[1]
    stay = left_of("width", "entries of the hidden states", size, share)
    if stay == size:
        return model
    parts = _parts(model, tokens)
    reading = [part.makers for part in parts if _width(model, part.makers[0]) == size]
    readers = [maker for makers in reading for maker in makers]
    head = model.get_output_embeddings()
    named = {id(module): name for name, module in model.named_modules()}
    ends = {named[id(each)] for each in (model.get_input_embeddings(), head) if each is not None}
    place = torch.device(device) if device is not None else next(model.parameters()).device
    score = _worth(model, [*readers, named[id(head)]], tokens, place=place, batch_size=batch_size, precision=precision)
    kept = keep_largest(score[None], stay)[0].nonzero()[:, 0].cpu()
    norms = [name for name, each in model.named_modules() if _is_norm(each, size)]
    cuts = {name: _Cut(columns=kept) for name in (*readers, *ends)}
    cuts |= {part.reader: _Cut(rows=kept) for part in parts} | {name: _Cut(rows=kept) for name in norms}
    state = _sliced(model, cuts)
    for name in norms:
        state[f"{name}.weight"] = state[f"{name}.weight"] * (size / stay) ** 0.5
    config = resized_config(model, size, stay, state, "width")
    if getattr(config, "rms_norm_eps", None) is not None:
        config.rms_norm_eps *= size / stay
    small = rebuilt(model, config, state)
    _check_same(_without_entries(model, kept, [*norms, *(part.reader for part in parts)]), small, tokens, "width")
    by_block = {name: [each for each in reading if each[0].startswith(f"{name}.")] for name in find_blocks(model)}
    with in_mode(model, training=False):
        fit_readers_(small, model, by_block, kept, tokens, place=place, batch_size=batch_size, precision=precision)
    return small


@torch.no_grad()
def choose_blocks(
    model: Any,
    tokens: Tensor,
    count: int,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
) -> list[int]:
    """Which `count` blocks go, in order: one after another, that without which outputs stay nearest to the dense ones.

        sum over tokens of KL(softmax(z_dense) || softmax(z without the block))

    tokens: (samples, length) int64. Raises ValueError for a count that leaves no block.
    """
    names = blocks_without(model, count)
    place = torch.device(device) if device is not None else next(model.parameters()).device
    source, left = Memory(model), list(names)
    for name in names:
        source.load(name, place)
    with in_mode(model, training=False), autocast(place, precision):
        hidden, arguments = embed(model, names, tokens, source=source, device=place, batch_size=batch_size)
        with source.outside(place):
            batches = [
                _Batch(ids.to(place), entering.to(place), {name: arguments[name][index] for name in names})
                for index, (ids, entering) in enumerate(zip(tokens.split(batch_size), hidden, strict=True))
            ]
            for _ in range(count):
                costs = torch.zeros(len(left), dtype=torch.float64)
                for batch in batches:
                    costs += batch.costs(model, names, left)
                left.pop(int(costs.argmin()))
    for name in names:
        source.release(name)
    return [index for index, name in enumerate(names) if name not in left]


@torch.no_grad()
def remove_blocks(model: Any, gone: Sequence[int]) -> Any:
    """The model without these blocks; the others move up, and lists of the config that say something of each block too.

    Raises ValueError for a block that is not there, and for blocks that compute something else at another place.

    >>> remove_blocks(model, []).config.num_hidden_layers
    1
    """
    names = find_blocks(model)
    strange = [index for index in gone if not 0 <= index < len(names)]
    if strange or len(set(gone)) >= len(names):
        raise ValueError(f"shrink.blocks: {list(gone)} cannot go of {len(names)} blocks")
    stay = [index for index in range(len(names)) if index not in gone]
    moved = {names[old]: names[new] for new, old in enumerate(stay)}
    state: dict[str, Tensor] = {}
    for key, each in model.state_dict().items():
        block = next((name for name in names if key.startswith(f"{name}.")), None)
        if block is None:
            state[key] = each
        elif block in moved:
            state[moved[block] + key[len(block) :]] = each
    changes: dict[str, Any] = {"num_hidden_layers": len(stay)}
    for key, value in model.config.to_dict().items():
        if "layer" in key and isinstance(value, list) and len(value) == len(names):
            changes[key] = [value[index] for index in stay]
    small = rebuilt(model, changed(model.config, changes), state)
    apart = _apart(_logits_through(model, [names[index] for index in stay]), _logits_through(small, find_blocks(small)))
    if not apart <= _limit(model):
        raise ValueError(
            f"shrink.blocks: blocks of {type(model).__name__} compute something else at another place (by {apart:.2g} "
            "of the largest logit): leave it out"
        )
    return small


def _logits_through(model: Any, left: Sequence[str]) -> Tensor:
    """The logits (1, L, words) of some tokens that go through these blocks alone."""
    names, place, source = find_blocks(model), next(model.parameters()).device, Memory(model)
    count = min(_LOOK, longest(model.config) or _LOOK)
    ids = torch.arange(count, device=place)[None] % model.config.get_text_config().vocab_size
    with in_mode(model, training=False):
        (leaving,), arguments = embed(model, names, ids, source=source, device=place, batch_size=1)
        for name in left:
            leaving = run_block(model.get_submodule(name), leaving, arguments[name][0])
        return finish(model, names, ids, leaving).logits.float()


@dataclass(frozen=True)
class _Batch:
    """Windows (b, L), what enters the first block for them, and the arguments of each block."""

    ids: Tensor
    entering: Tensor
    arguments: Mapping[str, Arguments]

    def costs(self, model: Any, names: Sequence[str], left: Sequence[str]) -> Tensor:
        """The divergence from the dense model without each of the blocks that are left, (len(left),) float64."""
        dense = self._logits(model, names, self._run(model, self.entering, names)).log_softmax(-1)
        found, hidden = torch.zeros(len(left), dtype=torch.float64), self.entering
        for place, name in enumerate(left):
            leaving = self._run(model, hidden, left[place + 1 :])
            without = self._logits(model, names, leaving).log_softmax(-1)
            found[place] = F.kl_div(without, dense, reduction="sum", log_target=True).double()
            hidden = self._run(model, hidden, [name])
        return found

    def _run(self, model: Any, hidden: Tensor, names: Sequence[str]) -> Tensor:
        for name in names:
            hidden = run_block(model.get_submodule(name), hidden, self.arguments[name])
        return hidden

    def _logits(self, model: Any, names: Sequence[str], leaving: Tensor) -> Tensor:
        return finish(model, names, self.ids, leaving).logits.float()


@dataclass(frozen=True)
class _Cut:
    """Which outputs and which inputs of a module stay; None: all."""

    rows: Tensor | None = None
    columns: Tensor | None = None


def _parts(model: Any, tokens: Tensor) -> list[_Part]:
    """The parts of all blocks, in order."""
    received: dict[str, Tensor] = {}  # holds the tensors, so that no two have one id
    names = find_blocks(model)
    hooks = (
        (module, _remember(received, f"{block}.{name}"))
        for block in names
        for name, module in model.get_submodule(block).named_modules()
        if _is_matrix(module)
    )
    with in_mode(model, training=False), hooked(hooks):
        model(input_ids=tokens[:1, :_LOOK].to(next(model.parameters()).device), use_cache=False)
    return [part for block in names for part in _parts_of(model.get_submodule(block), block, received)]


def _parts_of(block: nn.Module, name: str, received: Mapping[str, Tensor]) -> Iterator[_Part]:
    order = {each: place for place, each in enumerate(received)}  # as they were called
    for path, module in block.named_modules(prefix=name):
        own = [f"{path}.{child}" for child, each in module.named_children() if _is_matrix(each)]
        own = sorted((each for each in own if each in received), key=order.__getitem__)
        makers = [each for each in own if received[each] is received[own[0]]]
        readers = [each for each in own if each not in makers]
        if len(readers) == 1 and len(makers) <= 3:
            yield _Part(tuple(makers), readers[0])


def blocks_without(model: Any, count: int) -> list[str]:
    """The names of all blocks, of which so many can go."""
    names = find_blocks(model)
    if not 0 <= count < len(names):
        raise ValueError(f"shrink.blocks: {count} of {len(names)} blocks cannot go; give at most {len(names) - 1}")
    return names


def pairs_left(config: Any, share: float) -> int:
    """How many keys and values stay without a share of the groups of heads that have one in common."""
    if getattr(config, "num_attention_heads", None) is None:
        raise ValueError(f"shrink.heads: {type(config).__name__} says no number of heads; leave it out")
    return left_of("heads", "groups of heads with a key and a value in common", heads_of(config)[1], share)


def left_of(key: str, things: str, count: int, share: float) -> int:
    """How many stay without that share of them, at least one. Raises ValueError for a share by which none goes."""
    stay = max(1, kept_of(count, share))
    if share and stay == count:
        raise ValueError(
            f"shrink.{key}: of {count} {things}, of which one stays, a share of {share:g} removes none; "
            + (f"one of them is {1 / count:.3g}" if count > 1 else "leave it out")
        )
    return stay


def with_pairs(config: Any, stay: int) -> Any:
    """The config of a model in which so many keys and values stay, each with its heads."""
    heads, pairs, size = heads_of(config)
    told = {"num_attention_heads": stay * (heads // pairs), "num_key_value_heads": stay, "head_dim": size}
    return changed(config, told)


def heads_of(config: Any) -> tuple[int, int, int]:
    """How many heads, how many keys and values, and the size of each."""
    heads = int(config.num_attention_heads)
    pairs = getattr(config, "num_key_value_heads", None) or heads
    return heads, int(pairs), int(getattr(config, "head_dim", None) or config.hidden_size // heads)


def _is_mlp(model: Any, part: _Part) -> bool:
    """One or two matrices make the channels, each as many, or both of them in one."""
    width = _width(model, part.reader)
    heights = [_height(model, maker) for maker in part.makers]
    return heights in ([width], [width, width], [2 * width])


def _remember(received: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        received[name] = args[0]

    return hook


def _is_matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or _is_transposed(module)


def _is_transposed(module: nn.Module) -> bool:
    return isinstance(module, imported("transformers.pytorch_utils", "Conv1D"))


def _shape(model: Any, name: str) -> tuple[int, int]:
    """(out, in)."""
    module = model.get_submodule(name)
    rows, width = module.weight.shape
    return (width, rows) if _is_transposed(module) else (rows, width)


def _height(model: Any, name: str) -> int:
    return _shape(model, name)[0]


def _width(model: Any, name: str) -> int:
    return _shape(model, name)[1]


def _fitted(
    model: Any, tokens: Tensor, parts: Sequence[_Part], criterion: Criterion, kept: float, *, how: Mapping[str, Any]
) -> Iterator[tuple[_Part, Tensor]]:
    """Each part and which inputs its reader keeps, after the model's readers were fitted in place."""
    readers = [part.reader for part in parts]
    masks = stream(model, criterion, Unstructured("layer"), 1 - kept, tokens=tokens, include=readers, **how).masks
    for part in parts:
        mask = masks[f"{part.reader}.weight"]
        stays = mask.any(1) if _is_transposed(model.get_submodule(part.reader)) else mask.any(0)
        yield part, stays.nonzero()[:, 0].cpu()


def _cut(
    model: Any, tokens: Tensor, cuts: Mapping[str, _Cut], config_of: Callable[[dict[str, Tensor]], Any], what: str
) -> Any:
    """The model with less of these modules. Raises ValueError where its outputs are not those of the masked one."""
    state = _sliced(model, cuts)
    small = rebuilt(model, config_of(state), state)
    _check_same(model, small, tokens, what)
    return small


def _sliced(model: Any, cuts: Mapping[str, _Cut]) -> dict[str, Tensor]:
    """The state dict without what goes."""
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, cut in cuts.items():
        turned = _is_transposed(model.get_submodule(name))
        for stays, dim in ((cut.rows, int(turned)), (cut.columns, 1 - int(turned))):
            if stays is not None:
                weight = state[f"{name}.weight"]
                state[f"{name}.weight"] = weight.index_select(dim, stays.to(weight.device))
        if cut.rows is not None and f"{name}.bias" in state:
            state[f"{name}.bias"] = state[f"{name}.bias"][cut.rows.to(state[f"{name}.bias"].device)]
    return state


def _without_entries(model: Any, kept: Tensor, makers: Sequence[str]) -> Any:
    """A copy in which other entries of hidden states are zero everywhere: nobody makes them or lets them through."""
    masked = copy.deepcopy(model)
    for module in (masked.get_submodule(name) for name in makers):
        for tensor in module.parameters(recurse=False):
            rows = tensor.T if tensor.ndim > 1 and _is_transposed(module) else tensor
            gone = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            gone[kept.to(rows.device)] = False
            rows[gone] = 0
    embedding = masked.get_input_embeddings().weight
    left = torch.zeros_like(embedding)
    left[:, kept] = embedding[:, kept]
    embedding.copy_(left)
    return masked


def _worth(
    model: Any, names: Sequence[str], tokens: Tensor, *, place: torch.device, batch_size: int, precision: Precision
) -> Tensor:
    """S of each entry of the hidden states, (size,) float32 on the CPU."""
    modules = {name: model.get_submodule(name) for name in names}
    inputs = {name: Inputs(_width(model, name), device=place) for name in names}
    hooks = [(module, lambda _, args, name=name: inputs[name].add_(args[0])) for name, module in modules.items()]
    run_hooked(model, hooks, tokens, place=place, batch_size=batch_size, precision=precision)
    found = torch.zeros(_width(model, names[0]))
    for name, module in modules.items():
        squares = module.weight.float().square().sum(1 if _is_transposed(module) else 0).cpu()
        found += squares * (inputs[name].squares / max(1, inputs[name].tokens)).cpu()
    return found


def run_hooked(
    model: Any,
    hooks: Sequence[tuple[nn.Module, Callable[..., Any]]],
    tokens: Tensor,
    *,
    place: torch.device,
    batch_size: int,
    precision: Precision,
) -> None:
    """Run the whole model over all windows on a device, with hooks before these modules; then it is where it was."""
    home = next(model.parameters()).device
    model.to(place)
    with in_mode(model, training=False), autocast(place, precision), hooked(hooks):
        for ids in tokens.split(batch_size):
            model(input_ids=ids.to(place), use_cache=False)
    model.to(home)


def _is_norm(module: nn.Module, size: int) -> bool:
    """Whether the module has one weight for each entry of the hidden states, and nothing else."""
    own = dict(module.named_parameters(recurse=False))
    return set(own) <= {"weight", "bias"} and "weight" in own and own["weight"].shape == (size,)


def _check_same(model: Any, small: Any, tokens: Tensor, what: str) -> None:
    ids = tokens[:1, :_LOOK].to(next(model.parameters()).device)
    with in_mode(model, training=False):
        masked = model(input_ids=ids, use_cache=False).logits.float()
        try:
            found = small(input_ids=ids, use_cache=False).logits.float()
        except RuntimeError as error:  # of a norm over all heads, whose size the config does not say
            raise ValueError(
                f"shrink: {type(model).__name__} does not run with the sizes that are left ({error}): leave out heads"
            ) from None
    apart = _apart(masked, found)
    if not apart <= _limit(model):
        raise ValueError(
            f"shrink.{what}: the smaller {type(model).__name__} differs from the one with zeros by {apart:.2g} of the "
            "largest logit: what went is mixed with the rest, or counted, elsewhere. Leave it out"
        )


def _apart(expected: Tensor, found: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))


def _limit(model: Any) -> float:
    return _EXACT if model.dtype.itemsize >= 4 else _ROUNDED


def rebuilt(model: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    """A model of the config with these tensors. Raises ValueError where they have other sizes."""
    small = empty_model(config, model.dtype)
    wrong = _other_sizes(small, state)
    if wrong is not None:
        raise ValueError(f"shrink: the config of {type(model).__name__} cannot say the sizes that are left: {wrong}")
    small.load_state_dict(dict(state), assign=True)
    small.tie_weights()
    small.generation_config = model.generation_config
    return small.to(next(model.parameters()).device)


def _other_sizes(small: Any, state: Mapping[str, Tensor]) -> str | None:
    own = {key: tuple(each.shape) for key, each in small.state_dict().items()}
    left = {key: tuple(each.shape) for key, each in state.items()}
    wrong = [key for key in own | left if own.get(key) != left.get(key)]
    return f"'{wrong[0]}' is {own.get(wrong[0])} there and {left.get(wrong[0])} here" if wrong else None


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """The config in which these entries say something else."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        setattr(config, key, value)
    return config


def resized_config(model: Any, old: int, new: int, state: Mapping[str, Tensor], what: str) -> Any:
    """The config in which one number, or several of one value, is another, so that a model of it has these tensors.

    Raises ValueError, which names `what`, where there is no such number.
    """
    for config in resizings(model.config, old, new):
        if _other_sizes(empty_model(config, model.dtype), state) is None:
            return config
    raise ValueError(f"shrink.{what}: no number in the config of {type(model).__name__} says that there are {old}")


def other_attention(model: Any) -> ValueError:
    """What is said of attention that is not of query, key, value and output, each a matrix of its own."""
    heads, pairs, size = heads_of(model.config)
    return ValueError(
        f"shrink.heads: the attention of {type(model).__name__} is not of {heads} heads of {size} with {pairs} "
        "keys and values, each a matrix of its own; leave it out"
    )


def resizings(config: Any, old: int, new: int) -> Iterator[Any]:
    """The configs in which one number of that value, or several, is another."""
    said: dict[str, Any] = config.to_dict()
    keys = [key for key, value in said.items() if type(value) is int and value == old]
    keys += [key for key, value in said.items() if value is None and any(word in key for word in _SIZES)]
    for count in range(1, len(keys) + 1):
        for some in combinations(keys, count):
            yield changed(config, dict.fromkeys(some, new))
