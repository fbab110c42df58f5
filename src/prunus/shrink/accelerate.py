"""2:4 weights as the tensors that a GPU multiplies faster, where a benchmark on the spot says that they are faster.

    dense (out, in), two zeros in every four ─▶ torch's semi-structured tensors: CUTLASS, cuSPARSELt
                                             ─▶ torchao's float8 with a scale for each row (Hopper), if asked for

What is faster depends on the card, the shape, the number of tokens at once and the versions of both libraries, so it is
tried rather than known. What is converted computes, and is neither trained nor saved.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from prunus.layers import matches
from prunus.machine import import_extra

__all__ = ["PRODUCTS", "Accelerated", "accelerate_", "float8", "float8_sparse", "is_two_four"]

_GAIN = 1.02  # times are medians of a tenth of a second: less is noise
_SECONDS = 0.1
_NEAR, _NEAR_FLOAT8 = 1e-2, 1e-1  # relative error of a product, as a check of layouts


@dataclass(frozen=True)
class Accelerated:
    """What was found for the layers of one shape (out, in).

    times: kind -> milliseconds of a product with `tokens` rows; chosen: the fastest kind, or "dense"; why: what could
    not be tried, or why nothing was.
    """

    layers: tuple[str, ...]
    shape: tuple[int, int]
    tokens: int
    chosen: str
    times: Mapping[str, float] = field(default_factory=dict[str, float])
    why: str = ""


def is_two_four(weight: Tensor) -> bool:
    """Whether of every four consecutive entries of a row at least two are zero.

    >>> is_two_four(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 1.0]]))
    True
    """
    if weight.ndim != 2 or weight.shape[1] % 4:
        return False
    return bool(((weight != 0).unflatten(1, (-1, 4)).sum(-1) <= 2).all())


def float8(weight: Tensor) -> Tensor:
    """The dense weight in float8 with a scale for each row; what it meets is made so as well."""
    return _float8(weight, "plain")


def float8_sparse(weight: Tensor) -> Tensor:
    """The 2:4 weight in float8 with a scale for each row."""
    return _float8(weight, "sparse_2d_data_2d_metadata")


PRODUCTS: dict[str, Callable[[Tensor], Tensor]] = {  # what makes a weight ready for the products of each
    "CUTLASS": torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense,
    "cuSPARSELt": torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense,
}


@torch.no_grad()
def accelerate_(
    model: nn.Module, *, tokens: int = 4096, float8: bool = False, exclude: Sequence[str] = ()
) -> list[Accelerated]:
    """What was found for each shape of the model's 2:4 Linear layers, whose weights become the fastest kind, in place.

    tokens: rows of the products that are timed: of a prompt, or of as many sequences as are decoded together. Times are
    those of calls from Python. float8: also float8 with 2:4, which rounds weights and inputs (needs torchao). exclude:
    globs of layers. On a CPU, or where nothing is faster by 2 %, layers stay as they are, and `why` says so.

    Raises ValueError for a model without a 2:4 layer.

    >>> model = nn.Sequential(nn.Linear(8, 2))
    >>> model[0].weight = nn.Parameter(torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 1]] * 2))
    >>> accelerate_(model)[0].chosen
    'dense'
    """
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    found = {
        name: each
        for name, each in layers.items()
        if is_two_four(each.weight) and not any(matches(name, glob) for glob in exclude)
    }
    if not found:
        raise ValueError(f"none of the {len(layers)} Linear layers is 2:4; prune with pattern '2:4' first")
    alike: dict[tuple[tuple[int, int], torch.dtype, torch.device], list[str]] = {}
    for name, each in found.items():
        shape = (each.weight.shape[0], each.weight.shape[1])
        alike.setdefault((shape, each.weight.dtype, each.weight.device), []).append(name)
    rows: list[Accelerated] = []
    for (shape, dtype, device), names in alike.items():
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(tokens, shape[1], device=device, dtype=dtype, generator=generator)
        row = _tried(tuple(names), found[names[0]].weight, x, float8=float8)
        rows.append(row)
        for name in names if row.chosen != "dense" else ():
            weight = _kinds(float8)[row.chosen](found[name].weight.detach())
            found[name].weight = nn.Parameter(weight, requires_grad=False)
    return rows


def _kinds(with_float8: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    return {**PRODUCTS, **({"float8, 2:4": float8_sparse} if with_float8 else {})}


def _tried(names: tuple[str, ...], weight: Tensor, x: Tensor, *, float8: bool) -> Accelerated:
    """The times of every kind that works here."""
    shape = (weight.shape[0], weight.shape[1])
    if not weight.is_cuda:
        return Accelerated(names, shape, len(x), "dense", why=f"torch has no 2:4 products on {weight.device.type}")
    expected = F.linear(x, weight)
    times, troubles = {"dense": _milliseconds(x, weight)}, list[str]()
    for kind, convert in _kinds(float8).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # sparse tensors are announced as prototypes
                sparse = convert(weight.detach())
                _check(F.linear(x, sparse), expected, _NEAR_FLOAT8 if "float8" in kind else _NEAR)
                times[kind] = _milliseconds(x, sparse)
        except (RuntimeError, NotImplementedError, ImportError, AssertionError, ValueError) as error:
            troubles.append(f"{kind}: {' '.join(str(error).split())[:120]}")
    best = min(times, key=times.__getitem__)
    if times["dense"] < _GAIN * times[best]:
        best = "dense"
    return Accelerated(names, shape, len(x), best, times, "; ".join(troubles))


def _milliseconds(x: Tensor, weight: Tensor) -> float:
    timer = Timer("linear(x, weight)", globals={"linear": F.linear, "x": x, "weight": weight})
    return 1e3 * timer.blocked_autorange(min_run_time=_SECONDS).median


def _check(found: Tensor, expected: Tensor, near: float) -> None:
    apart = float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))
    if not apart < near:
        raise ValueError(f"the product differs by {apart:.2g}")


def _float8(weight: Tensor, packing: str) -> Tensor:
    api = import_extra("torchao.quantization", "float8", "float8 needs torchao")
    how = api.Float8DynamicActivationFloat8WeightConfig(granularity=api.PerRow(), packing_format=packing)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    api.quantize_(layer, how)
    return layer.weight
