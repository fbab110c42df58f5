"""Filters and neurons that really go: a smaller network of ordinary layers, equal to the one where they are zero.

    find_channels ─▶ filter_norms ─▶ choose_filters ─▶ remove_filters

Channels are removed with everything that makes or reads them: filters and biases, BatchNorm entries, input channels of
the next layers. Which belong together, across residual sums and flattenings, is found by the dependency graph of
torch-pruning (extra `shrink`; Fang et al. 2023, DepGraph); tensors are cut here, so that grouped convolutions, whose
groups must stay equally wide, come out right too.

Left alone, and said why: the network's outputs, channels that pass through layers which mix them (LayerNorm), and those
that meet channels of a wider or narrower layer (a shortcut that pads zeros). Low rank is the affair of `lowrank`.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunus.layers import CONVOLUTIONS, Layer, matches
from prunus.machine import import_extra
from prunus.patterns import keep_largest, kept_of
from prunus.score import magnitude
from prunus.shrink.lowrank import _empty_pair, _replaced

_TOLERANCE = 1e-3  # of the largest output, float32: a check of the graph, not of the rounding


@dataclass(frozen=True)
class Channels:
    """Channels that stand or go together. layers: those whose outputs they are, the first of which gives the name.

    size: how many; blocks: of so many consecutive parts equally many must stay (the groups of grouped convolutions);
    kept: why they cannot go, or None; heads: of attention, which go whole: so many lie beside one another in each of
    `parts`, which are queries, keys and values where one layer makes them all.

    >>> Channels("conv1", ("conv1",), 64).kept is None
    True
    """

    name: str
    layers: tuple[str, ...]
    size: int
    blocks: int = 1
    kept: str | None = None
    heads: int = 0
    parts: int = 1

    def of_heads(self, chosen: Tensor) -> Tensor:
        """(heads,) of something for each head -> (size,) for each channel."""
        return chosen.repeat_interleave(self.size // self.parts // self.heads).repeat(self.parts)


def find_channels(
    model: nn.Module, example: Tensor, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Channels]:
    """Every set of channels that Linear and convolution layers make, in module order.

    example: an input (B, ...) of the model. include, exclude: globs of layers; a set stays if any of its layers is
    excluded, or none included. Raises ValueError for a glob that matches none, ImportError without torch-pruning.

    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> [(each.name, each.size, each.kept) for each in find_channels(model, torch.zeros(1, 8))]
    [('0', 6, None), ('2', 2, "its outputs are the network's")]
    """
    graph = _Graph(model, example)
    names = [name for name, module in graph.model.named_modules() if _makes(module)]
    for glob in (*include, *exclude):
        if not any(matches(name, glob) for name in names):
            raise ValueError(f"'{glob}' matches none of the {len(names)} Linear and convolution layers")
    found: list[Channels] = []
    seen: set[str] = set()
    for name in names:
        if name in seen or not graph.knows(name):
            continue
        each = graph.channels(name)
        seen |= set(each.layers)
        asked = not include or any(matches(layer, glob) for layer in each.layers for glob in include)
        if not asked or any(matches(layer, glob) for layer in each.layers for glob in exclude):
            each = Channels(each.name, each.layers, each.size, each.blocks, "it is excluded")
        found.append(each)
    return found


@torch.no_grad()
def filter_norms(
    model: nn.Module, channels: Sequence[Channels], criterion: Callable[[Layer], Tensor] = magnitude
) -> dict[str, Tensor]:
    """Name of a set -> L2 norm of the scores of each channel's filters, over all layers that make it, (size,) float32.

    criterion: layer -> score (out, in) of weights alone; by magnitude these are the norms of the filters.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> model[0].weight = nn.Parameter(torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
    >>> filter_norms(model, [Channels("0", ("0",), 2)])["0"].tolist()
    [5.0, 1.0]
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    for each in channels:
        if each.kept is None:
            layers = [Layer(layer, modules[layer].get_parameter("weight").flatten(1)) for layer in each.layers]
            rows = [criterion(layer) for layer in layers]
            found[each.name] = torch.linalg.vector_norm(torch.cat(rows, 1), dim=1)
    return found


def filter_taylor(
    model: nn.Module,
    channels: Sequence[Channels],
    batches: Iterable[Any],
    loss: Callable[[nn.Module, Any], Tensor],
) -> dict[str, Tensor]:
    """Name of a set -> what the loss would change by without each channel, to first order, (size,) float32.

        mean over batches of |sum over the channel's filters and biases of w dL/dw|    (Molchanov et al. 2019, Eq. 8)

    They square what is in bars. loss: (model, batch) -> scalar, in whatever mode the model is; its gradients and
    BatchNorm's statistics stay what they were. Raises ValueError where there is no batch.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    >>> filter_taylor(model, [Channels("0", ("0",), 2)], [torch.ones(1, 2)], lambda m, x: m(x).sum())["0"].shape
    torch.Size([2])
    """
    modules = dict(model.named_modules())
    named = {
        f"{layer}.{part}": parameter
        for each in channels if each.kept is None
        for layer in each.layers
        for part, parameter in modules[layer].named_parameters(recurse=False)
    }  # fmt: skip
    found = {each.name: torch.zeros(each.size) for each in channels if each.kept is None}
    count, buffers = 0, [(each, each.clone()) for each in model.buffers()]
    for batch in batches:
        try:
            grads = dict(zip(named, torch.autograd.grad(loss(model, batch), list(named.values())), strict=True))
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)
        with torch.no_grad():
            rows = {key: (grads[key] * each).reshape(len(each), -1).sum(1) for key, each in named.items()}
            for each in channels:
                own = [row for key, row in rows.items() if key.rpartition(".")[0] in each.layers]
                if each.kept is None:
                    found[each.name] += torch.stack(own).sum(0).abs().cpu()
        count += 1
    if not count:
        raise ValueError("filter_taylor: there is no batch; give at least one")
    return {name: each / count for name, each in found.items()}


def choose_filters(
    scores: Mapping[str, Tensor],
    channels: Sequence[Channels],
    sparsity: float,
    *,
    allocation: Literal["uniform", "global"] = "uniform",
) -> dict[str, Tensor]:
    """Name of a set -> which of its channels go (sorted int64), those with the lowest scores; of equal ones the later.

    sparsity: the share of channels that go, in [0, 1): of each set ("uniform"), or of all together by score / mean
    score of the set ("global"; sets with blocks and heads keep the uniform share). Every set keeps at least one channel
    in each block. Heads go whole, by the sum of the squared scores of their channels. scores: name -> (size,), as
    `filter_norms` makes them. Raises ValueError for a sparsity outside [0, 1).

    >>> sets = [Channels("a", ("a",), 4), Channels("b", ("b",), 2, kept="it is excluded")]
    >>> choose_filters({"a": torch.tensor([3.0, 1.0, 2.0, 0.0])}, sets, 0.5)
    {'a': tensor([1, 3])}
    """
    free = {each.name: each for each in channels if each.kept is None}
    counts = {name: each.blocks * max(1, kept_of(each.size // each.blocks, sparsity)) for name, each in free.items()}
    if allocation == "global":
        counts |= _global_counts(
            {name: scores[name] for name, each in free.items() if each.blocks == 1 and not each.heads}, sparsity
        )
    gone: dict[str, Tensor] = {}
    for name, each in free.items():
        if each.heads:
            worth = scores[name].detach().float().view(each.parts, each.heads, -1).square().sum((0, 2))
            stays = keep_largest(worth[None], max(1, kept_of(each.heads, sparsity)))[0]
            gone[name] = each.of_heads(~stays).nonzero()[:, 0].cpu()
            continue
        rows = scores[name].detach().float().view(each.blocks, -1)
        stays = torch.stack([keep_largest(row[None], counts[name] // each.blocks)[0] for row in rows]).view(-1)
        gone[name] = (~stays).nonzero()[:, 0].cpu()
    return gone


@torch.no_grad()
def remove_filters(model: nn.Module, example: Tensor, gone: Mapping[str, Tensor]) -> nn.Module:
    """A smaller copy of the model, without the channels that `gone` names; outputs are those of these at zero.

    Layers stay of their kind, names stay; dtype, device and mode too. The copy is run beside the masked one on random
    inputs of the example's shape: should they differ, the graph was wrong about this model, and ValueError is raised,
    as for a set that is not there or cannot go. The given model is not changed.

    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> remove_filters(model, torch.zeros(1, 8), {"0": torch.tensor([1, 4])})[2].weight.shape
    torch.Size([2, 4])
    """
    cuts, small = _Graph(model, example).cuts(gone), copy.deepcopy(model)
    for name, cut in cuts.items():
        _cut_(small.get_submodule(name), cut)
    _fit_heads_(model, small)
    _check_same(small, _masked(model, cuts), example)
    return small


@torch.no_grad()
def resized(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model whose layers have the sizes of a state dict, loaded with it.

    state: of what `remove_filters` or `lowrank.decompose` made of such a model; names say which layers are two.
    Raises ValueError for a state dict that is of no such network.

    >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    >>> small = remove_filters(model, torch.zeros(1, 8), {"0": torch.tensor([1, 4])})
    >>> resized(model, small.state_dict())[0]
    Linear(in_features=8, out_features=4, bias=True)
    """
    copied = copy.deepcopy(model)
    for name, module in list(copied.named_modules()):
        prefix = f"{name}." if name else ""
        pair = f"{prefix}0.weight" in state and f"{prefix}1.weight" in state
        if pair and isinstance(module, (nn.Linear, *CONVOLUTIONS)):
            two = _empty_pair(module, state[f"{prefix}0.weight"].shape[0])
            copied = _replaced(copied, name, nn.Sequential(*two).train(module.training))
        elif _makes(module) or isinstance(module, _BatchNorm):
            _shape_(module, {part: state[prefix + part] for part in module.state_dict() if prefix + part in state})
    _fit_heads_(model, copied)
    try:
        copied.load_state_dict(dict(state))
    except RuntimeError as error:
        raise ValueError(f"the state dict is not of a smaller {type(model).__name__}: {error}") from None
    return copied


@dataclass(frozen=True)
class _Cut:
    """Which outputs and which inputs of a module go."""

    out: set[int]
    into: set[int]


class _Graph:
    """torch-pruning's graph of a copy of the model on the CPU, with names for modules."""

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        torch_pruning = import_extra("torch_pruning", "shrink", "removing filters needs the extra")
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(True)
        self.names = {module: name for name, module in self.model.named_modules()}
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")  # of parameters outside modules, which are left alone here
            self.graph: Any = torch_pruning.DependencyGraph()
            x = _as_float(example.detach().cpu())
            self.graph.build_dependency(self.model, example_inputs=x, output_transform=_first)

    def knows(self, name: str) -> bool:
        """Whether the example reached the layer."""
        return self.model.get_submodule(name) in self.graph.module2node

    def members(self, name: str, indices: Sequence[int]) -> list[tuple[nn.Module, bool, list[int]]]:
        """(module, whether its outputs are meant, which of them) for everything that goes with these channels."""
        module = self.model.get_submodule(name)
        cut = self.graph.get_pruner_of_module(module).prune_out_channels
        group = self.graph.get_pruning_group(module, cut, list(indices))
        return [(dep.target.module, "out" in dep.handler.__name__, list(idxs)) for dep, idxs in group]

    def channels(self, name: str) -> Channels:
        """The set of channels that the layer makes."""
        size = _width(self.model.get_submodule(name))
        members = self.members(name, range(size))
        makers = {each for each, out, _ in members if out and _makes(each)}
        layers = tuple(name for module, name in self.names.items() if module in makers)
        grouped = [each for each, _, _ in members if isinstance(each, CONVOLUTIONS) and not _is_depthwise(each)]
        blocks = math.lcm(*(each.groups for each in grouped)) if grouped else 1
        heads, parts, strange = self._heads(layers, members, size)
        return Channels(name, layers, size, blocks, self._why_kept(members, size, blocks) or strange, heads, parts)

    def _heads(
        self, layers: Sequence[str], members: Sequence[tuple[nn.Module, bool, list[int]]], size: int
    ) -> tuple[int, int, str | None]:
        """How many heads the channels of attention make, in how many parts, and why they cannot go, or None."""
        above = {name.rpartition(".")[0] for name in layers}
        found = _heads_of(self.model.get_submodule(above.pop())) if len(above) == 1 else None
        read = [len(indices) for each, out, indices in members if not out and _makes(each)]
        if found is None or not read or (len(layers) == 1 and 3 * read[0] != size):
            return 0, 1, None
        heads = found[1]
        if read[0] % heads or size != read[0] * (3 if len(layers) == 1 else 1):
            return 0, 1, f"its {size} channels are not of {heads} heads alike"
        return heads, size // read[0], None

    def _why_kept(self, members: Sequence[tuple[nn.Module, bool, list[int]]], size: int, blocks: int) -> str | None:
        if not any(not out and isinstance(each, (nn.Linear, *CONVOLUTIONS)) for each, out, _ in members):
            return "its outputs are the network's"
        for each, out, indices in members:
            if each in self.names and not isinstance(each, (nn.Linear, *CONVOLUTIONS, _BatchNorm)):
                return f"its channels pass through '{self.names[each]}', a {type(each).__name__}"
            if isinstance(each, nn.Parameter):
                return "its channels meet a parameter that is in no layer"
            if out and _makes(each) and sorted(indices) != list(range(_width(each))):
                return f"its channels meet those of '{self.names[each]}', which has {_width(each)}"
            if blocks > 1 and isinstance(each, CONVOLUTIONS) and each.groups > 1 and indices != list(range(size)):
                return f"its channels are a part of what the grouped '{self.names[each]}' reads"
        return None

    def cuts(self, gone: Mapping[str, Tensor]) -> dict[str, _Cut]:
        """Module name -> what goes of it. Raises ValueError for a set that cannot go, or would go as a whole."""
        found: dict[str, _Cut] = {}
        for name, indices in gone.items():
            if name not in self.names.values() or not self.knows(name) or not _makes(self.model.get_submodule(name)):
                raise ValueError(f"'{name}' is no Linear or convolution layer that the example reaches")
            chosen, known = sorted(int(i) for i in indices), self.channels(name)
            if chosen and (known.kept is not None or len(chosen) >= known.size):
                raise ValueError(f"channels of '{name}' cannot go: {known.kept or 'none would be left'}")
            if not chosen:
                continue
            if known.heads and not _whole_heads(known, chosen):
                raise ValueError(f"channels of '{name}' go by whole heads, of which there are {known.heads}")
            for module, out, places in self.members(name, chosen):
                if module in self.names:
                    cut = found.setdefault(self.names[module], _Cut(set(), set()))
                    (cut.out if out or _is_depthwise(module) else cut.into).update(places)
        return found


def _masked(model: nn.Module, cuts: Mapping[str, _Cut]) -> nn.Module:
    copied = copy.deepcopy(model)
    for name, cut in cuts.items():
        module = copied.get_submodule(name)
        parts = ("weight", "bias", "running_mean") if isinstance(module, _BatchNorm) else ("weight", "bias")
        for part in parts:
            value = getattr(module, part)
            if isinstance(value, Tensor) and cut.out:
                value[torch.tensor(sorted(cut.out), device=value.device)] = 0
    return copied


def _global_counts(scores: Mapping[str, Tensor], sparsity: float) -> dict[str, int]:
    """How many channels each set keeps when all compete by score / mean score; the best of each set always stays."""
    norms = {name: score.detach().float().cpu() for name, score in scores.items()}
    ratios = {name: norm / norm.mean().clamp_min(1e-30) for name, norm in norms.items()}
    if not ratios:
        return {}
    for ratio in ratios.values():
        ratio[ratio.argmax()] = torch.inf
    joined = torch.cat(list(ratios.values()))
    stays = keep_largest(joined[None], max(len(ratios), kept_of(joined.numel(), sparsity)))[0]
    sizes = [ratio.numel() for ratio in ratios.values()]
    return {name: int(part.sum()) for name, part in zip(ratios, stays.split(sizes), strict=True)}


def _makes(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, *CONVOLUTIONS))


def _width(module: nn.Module) -> int:
    return module.get_parameter("weight").shape[0]


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, CONVOLUTIONS) and module.groups == module.out_channels == module.in_channels > 1


def _cut_(module: nn.Module, cut: _Cut) -> None:
    """Take the outputs and inputs out of a layer, in place."""
    if isinstance(module, _BatchNorm):
        _keep_(module, _left(module.num_features, cut.out))
        module.num_features -= len(cut.out)
        return
    assert isinstance(module, (nn.Linear, *CONVOLUTIONS))
    outputs = _left(_width(module), cut.out)
    if _is_depthwise(module):
        _keep_(module, outputs)
        assert not isinstance(module, nn.Linear)
        module.groups = module.in_channels = module.out_channels = len(outputs)
        return
    groups = 1 if isinstance(module, nn.Linear) else module.groups
    inputs = _left(module.weight.shape[1] * groups, cut.into)
    _keep_(module, outputs, inputs, groups)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = len(outputs), len(inputs)
    else:
        module.out_channels, module.in_channels = len(outputs), len(inputs)


def _shape_(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Cut a layer or a BatchNorm down to the shapes of `state`, in place, wherever: other values will be loaded."""
    known = state.get("weight", state.get("running_mean"))
    if known is None:
        return
    into = set[int]()
    if not isinstance(module, _BatchNorm) and not _is_depthwise(module):
        weight, groups = module.get_parameter("weight"), getattr(module, "groups", 1)
        width = weight.shape[1]
        into = {width * group + place for group in range(groups) for place in range(known.shape[1], width)}
    size = module.num_features if isinstance(module, _BatchNorm) else _width(module)
    _cut_(module, _Cut(set(range(known.shape[0], size)), into))


def _whole_heads(channels: Channels, chosen: Sequence[int]) -> bool:
    gone = torch.zeros(channels.size, dtype=torch.bool)
    gone[torch.tensor(chosen)] = True
    return torch.equal(gone, channels.of_heads(gone.view(channels.parts, channels.heads, -1)[0, :, 0]))


def _heads_of(module: nn.Module) -> tuple[str, int] | None:
    """Name and value of the number by which a module says how many heads it has."""
    for key, value in vars(module).items():
        if type(value) is int and value > 0 and "heads" in key and "key_value" not in key and "kv" not in key:
            return key, value
    return None


def _fit_heads_(old: nn.Module, new: nn.Module) -> None:
    """Say in every attention of `new` how many heads are left, and how wide they are together, in place."""
    for name, module in old.named_modules():
        found = _heads_of(module)
        if found is None:
            continue
        after = new.get_submodule(name)
        sizes = [
            (each.out_features, getattr(after, child).out_features)
            for child, each in module.named_children()
            if isinstance(each, nn.Linear)
        ]
        changed = next(((before, left) for before, left in sizes if before != left), None)
        if changed is None:
            continue
        whole, heads = Fraction(changed[1], changed[0]), found[1]
        width = next(size for size, left in sizes if size != left)
        for key, value in list(vars(module).items()):
            counts = "heads" in key and value == heads
            if type(value) is int and (counts or (value in (width, width // 3) and ("dim" in key or "size" in key))):
                setattr(after, key, int(value * whole))


def _left(size: int, gone: set[int]) -> Tensor:
    return torch.tensor([place for place in range(size) if place not in gone], dtype=torch.int64)


def _keep_(module: nn.Module, outputs: Tensor, inputs: Tensor | None = None, groups: int = 1) -> None:
    """Cut every tensor of the module down to these outputs; the weight to these inputs as well, group by group."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if tensor.ndim == 0:  # num_batches_tracked
            continue
        new = tensor.detach()[outputs.to(tensor.device)]
        if name == "weight" and inputs is not None:
            rows = new.unflatten(0, (groups, -1))  # (groups, out / groups, in / groups, ...)
            width = tensor.shape[1]
            places = inputs.to(tensor.device).view(groups, -1) % width  # of each group's own inputs
            new = torch.cat([row.index_select(1, place) for row, place in zip(rows, places, strict=True)])
        new = new.clone(memory_format=torch.preserve_format)
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, nn.Parameter(new, requires_grad=tensor.requires_grad))
        else:
            module.register_buffer(name, new, persistent=name not in module._non_persistent_buffers_set)


def _as_float(example: Tensor) -> Tensor:
    return example.float() if example.is_floating_point() else example  # token ids stay


def _first(output: Any) -> Tensor:
    """What a network gives, or the first of what it gives: models of transformers give several things."""
    return output if isinstance(output, Tensor) else output[0]


def _check_same(small: nn.Module, masked: nn.Module, example: Tensor) -> None:
    x = example.detach().cpu()
    if x.is_floating_point():
        x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    one, other = (_first(copy.deepcopy(each).cpu().float().eval()(x)) for each in (small, masked))
    apart = math.inf
    if one.shape == other.shape:
        apart = float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))
    if not apart <= _TOLERANCE:
        raise ValueError(
            f"the smaller network does not compute what the masked one does (relative difference {apart:.1e}): the "
            "dependency graph does not understand this model; exclude layers around unusual shortcuts"
        )
