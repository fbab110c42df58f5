"""Linear and convolution layers as two thinner ones, by truncated singular value decomposition.

    W (out, in * kernel) = U S V^T     in ──S^1/2 V^T, kernel, stride, padding, dilation──▶ rank ──U S^1/2, 1 x 1──▶ out

The first layer keeps everything that depends on place, the second the bias. Each group of a grouped convolution is
decomposed by itself, all to one rank. The product of the two is the nearest matrix of that rank (Eckart, Young 1936);
splitting S evenly leaves both factors of one scale for retraining.

Rank r costs r * groups * (in/groups * kernel + out/groups) weights: above the break-even it costs more than the layer,
which is then left alone and listed. Ranks are chosen by `ranks_by_share` or `ranks_by_budget`.
"""

from __future__ import annotations

import copy
import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from prunus.layers import matches

_Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Decomposed:
    """What became of one layer. rank: asked for; before, after: weights (without biases); kept: why it was left alone.

    error: the relative error ||W - W_r||_F / ||W||_F of its weight, 0 where it was left alone.
    """

    name: str
    rank: int
    before: int
    after: int
    error: float
    kept: str | None = None


@torch.no_grad()
def decompose(model: nn.Module, ranks: Mapping[str, int]) -> tuple[nn.Module, list[Decomposed]]:
    """A copy of the model with the named layers decomposed to these ranks, and what became of each.

    ranks: module name -> rank (of each group), as the `ranks_by_` functions return. Layers are replaced by
    `nn.Sequential` of two ordinary layers of the same dtype and device. Computed in float64. Left alone, and said so:
    layers that would not shrink, and those whose weight is tied to another. The given model is not changed, and no
    random number is drawn.
    Raises ValueError for a name that is no Linear or convolution layer, and a rank below 1.

    >>> small, report = decompose(nn.Sequential(nn.Linear(20, 30)), {"0": 3})
    >>> [tuple(p.shape) for p in small.parameters()], report[0].after
    ([(3, 20), (30, 3), (30,)], 150)
    """
    layers, tied = _layers(model), _tied(model)
    for name, rank in ranks.items():
        if name not in layers:
            raise ValueError(f"'{name}' is no Linear or convolution layer of the model that can be decomposed")
        if rank < 1:
            raise ValueError(f"The rank of '{name}' is at least 1; got {rank}")
    copied, report = copy.deepcopy(model), list[Decomposed]()
    for name, rank in ranks.items():
        layer = layers[name]
        size, after = layer.weight.numel(), rank * _cost(layer)
        if layer.weight in tied:
            kept = "its weight is tied to another module's"
        elif after >= size:
            kept = f"rank {rank} would cost {after} weights for its {size}"
        else:
            pair, error = _pair(layer, rank)
            copied = _replaced(copied, name, pair)
            report.append(Decomposed(name, rank, size, after, error))
            continue
        report.append(Decomposed(name, rank, size, size, 0.0, kept))
    return copied, report


def ranks_by_share(
    model: nn.Module, sparsity: float, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, int]:
    """Rank max(1, floor((1 - sparsity) * full rank)) for every layer, as in the paper's released code.

    sparsity: share of the ranks dropped, in [0, 1); not of the weights: below the break-even nothing is saved.

    >>> ranks_by_share(nn.Sequential(nn.Linear(20, 30)), 0.9)
    {'0': 2}
    """
    _check_share(sparsity)
    # The small addend: 0.7 * 10 is 7, whatever its last bit says.
    return {
        name: max(1, math.floor((1 - sparsity) * _full(layer) + 1e-9))
        for name, layer in _chosen(model, include, exclude).items()
    }


def ranks_by_budget(
    model: nn.Module, sparsity: float, *, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, int]:
    """Ranks over all layers for a total number of weights: at most a share 1 - sparsity of what the layers have now.

    Every layer begins at rank 1; then the singular value goes in that keeps the largest share of its layer's energy
    sigma^2 / ||W||^2 per weight that it costs, as long as the budget lasts. A layer whose next rank would reach its
    break-even is bought whole instead, and left out of the result. Shares of the layer's own energy, because the scale
    of a layer means little under normalisation. A weight that is tied to another module's is bought whole, and once.
    sparsity: share of weights saved, in [0, 1). Raises ValueError when not even rank 1 fits.

    >>> ranks_by_budget(nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)), 0.5)["0"] < 20
    True
    """
    _check_share(sparsity)
    layers, tied = _once(_chosen(model, include, exclude)), _tied(model)
    left = math.floor((1 - sparsity) * sum(layer.weight.numel() for layer in layers.values()) + 1e-9)
    ladders = {name: [_whole(layer)] if layer.weight in tied else _ladder(layer) for name, layer in layers.items()}
    left -= sum(ladder[0].cost for ladder in ladders.values())
    if left < 0:
        raise ValueError(
            f"{sparsity:.0%} fewer weights is less than rank 1 in all {len(layers)} layers costs, by {-left} weights: "
            "ask for less, or exclude small layers"
        )
    taken = dict.fromkeys(ladders, 0)
    queue = [(-ladder[1].worth, name) for name, ladder in ladders.items() if len(ladder) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        rung = ladders[name][taken[name] + 1]
        if rung.cost > left:
            continue  # this layer stops here; cheaper ones go on
        left -= rung.cost
        taken[name] += 1
        if taken[name] + 1 < len(ladders[name]):
            heapq.heappush(queue, (-ladders[name][taken[name] + 1].worth, name))
    ranks = {name: ladders[name][place].rank for name, place in taken.items()}
    return {name: rank for name, rank in ranks.items() if rank is not None}


@dataclass(frozen=True)
class _Rung:
    """One more rank of a layer (None: the layer whole): its further cost, and the energy share it brings per weight."""

    rank: int | None
    cost: int
    worth: float


def _ladder(layer: _Layer) -> list[_Rung]:
    energies, unit = _energies(layer), _cost(layer)
    shares = (energies / energies.sum().clamp_min(1e-300)).tolist()
    size = layer.weight.numel()
    ranks = range(1, min(len(shares), (size - 1) // unit) + 1)
    rungs = [_Rung(rank, unit, shares[rank - 1] / unit) for rank in ranks]
    rest = size - len(rungs) * unit
    if not rungs:  # even rank 1 does not save anything
        return [_whole(layer)]
    last = sum(shares[len(rungs) :]) / rest
    return [*rungs, _Rung(None, rest, min(last, rungs[-1].worth))]


def _whole(layer: _Layer) -> _Rung:
    return _Rung(None, layer.weight.numel(), math.inf)


def _check_share(sparsity: float) -> None:
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is the share that goes, in [0, 1); got {sparsity}")


def _layers(model: nn.Module) -> dict[str, _Layer]:
    """Module name -> each Linear and convolution, once. Subclasses are left out: others may read their weights."""
    return {name: module for name, module in model.named_modules() if type(module) in _KINDS}  # pyright: ignore[reportReturnType]


def _chosen(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, _Layer]:
    layers = _layers(model)
    for glob in (*include, *exclude):
        if not any(matches(name, glob) for name in layers):
            raise ValueError(f"'{glob}' matches none of the {len(layers)} Linear and convolution layers")
    found = {
        name: layer
        for name, layer in layers.items()
        if (not include or any(matches(name, glob) for glob in include))
        and not any(matches(name, glob) for glob in exclude)
    }
    if not found:
        raise ValueError("The model has no Linear or convolution layer to decompose; check include and exclude")
    return found


def _once(layers: Mapping[str, _Layer]) -> dict[str, _Layer]:
    """Of layers with one weight the first."""
    first = dict[Tensor, str]()
    return {name: layer for name, layer in layers.items() if first.setdefault(layer.weight, name) == name}


def _tied(model: nn.Module) -> set[Tensor]:
    """Parameters that several modules hold."""
    seen: set[Tensor] = set()
    twice: set[Tensor] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (twice if parameter in seen else seen).add(parameter)
    return twice


def _groups(layer: _Layer) -> int:
    return 1 if isinstance(layer, nn.Linear) else layer.groups


def _matrices(layer: _Layer) -> Tensor:
    """The weight as (groups, out / groups, in / groups * kernel), float32 or wider."""
    weight = layer.weight.detach()
    matrices = weight.flatten(1).unflatten(0, (_groups(layer), -1))
    return matrices if weight.dtype == torch.float64 else matrices.float()


def _full(layer: _Layer) -> int:
    return min(_matrices(layer).shape[1:])


def _cost(layer: _Layer) -> int:
    """Weights of one rank in every group."""
    groups, out, columns = _matrices(layer).shape
    return groups * (out + columns)


def _energies(layer: _Layer) -> Tensor:
    """sigma_i^2 summed over groups, float64, on the CPU."""
    return torch.linalg.svdvals(_matrices(layer)).double().square().sum(0).cpu()


def _pair(layer: _Layer, rank: int) -> tuple[nn.Sequential, float]:
    """The two layers in place of one, and the relative error of their product."""
    u, vt, error = _leading(_matrices(layer).double(), rank)
    first, second = vt.flatten(0, 1), u.flatten(0, 1)  # (groups * rank, in / groups * kernel), (out, rank)
    one, two = _empty_pair(layer, rank * _groups(layer))
    one.weight.copy_(first.reshape(one.weight.shape))
    two.weight.copy_(second.reshape(two.weight.shape))
    if isinstance(two.bias, Tensor):
        two.bias.copy_(layer.bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(one, two).train(layer.training), error


def _empty_pair(layer: _Layer, middle: int) -> tuple[Any, Any]:
    """Two layers without initialisation, for which no random number is drawn."""
    options: dict[str, Any] = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    bias = isinstance(layer.bias, Tensor)
    if isinstance(layer, nn.Linear):
        one = skip_init(nn.Linear, layer.in_features, middle, bias=False, **options)
        return one, skip_init(nn.Linear, middle, layer.out_features, bias=bias, **options)
    placed = {name: getattr(layer, name) for name in ("stride", "padding", "dilation", "groups", "padding_mode")}
    one = skip_init(type(layer), layer.in_channels, middle, layer.kernel_size, bias=False, **placed, **options)
    return one, skip_init(type(layer), middle, layer.out_channels, 1, groups=layer.groups, bias=bias, **options)


def _replaced(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """The model with `layer` wherever the module of this name is used, which may be several places, or the whole."""
    old = model.get_submodule(name)
    if old is model:
        return layer
    for module in list(model.modules()):
        for child, value in list(module._modules.items()):  # named_children() names a shared module once
            if value is old:
                setattr(module, child, layer)
    return model


def _leading(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """U S^1/2 (groups, out, rank) and S^1/2 V^T (groups, rank, in) of the leading singular values; the relative error.

    Through the smaller Gram matrix, which a GPU decomposes many times faster than the matrix: in float64 the values are
    exact to 1e-8 of the largest, and projecting on the vectors loses nothing more.
    """
    if matrices.shape[1] > matrices.shape[2]:
        vt, u, error = _leading(matrices.mT, rank)
        return u.mT, vt.mT, error
    squares, vectors = torch.linalg.eigh(matrices @ matrices.mT)  # ascending
    u = vectors.flip(2)[:, :, :rank]
    projected = u.mT @ matrices
    root = torch.linalg.vector_norm(projected, dim=2).sqrt()
    tail = squares.clamp_min(0)[:, : squares.shape[1] - rank].sum()
    error = math.sqrt(float(tail / squares.sum().clamp_min(1e-300)))
    return u * root[:, None], projected / root.clamp_min(1e-150)[..., None], error
