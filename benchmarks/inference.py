"""What zeros are worth when the model runs: 2:4 tensors on a GPU, sparse formats on a CPU, beside dense products.

    python benchmarks/inference.py                                  # GPU: prefill at real layer shapes, bf16
    python benchmarks/inference.py --device cpu --scale 0.1         # CPU: CSR and blocks at 50, 80, 95 %

On a GPU a weight (out, in) with two zeros in every four goes through both backends of torch's semi-structured tensors,
CUTLASS and cuSPARSELt, the latter with the fastest of its algorithms; what a linear layer does with 4,096 tokens
(prefill), with 64 (decoding a batch) and, at the shapes of Llama-3.1-8B, with one, rows in, rows out, is timed against
the dense product. The better backend counts, in a CUDA graph where it can be captured, as servers run it; the note has
all times. Llama's layers are timed in float8 as well, 2:4 against dense, by torchao where it is installed; the sums
over a block of four layers say what a model gains. On a CPU, which has
no 2:4 products, CSR and BSR (blocks of 32 x 32) are timed at the sparsities where they may begin to pay. A ratio below
one means that the dense product is faster: then nothing is gained, and the table says so.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from claims import Cost, Row, cost, floor_ms, main, sized
from torch import Tensor

from prunus.shrink import PRODUCTS, float8, float8_sparse

SHAPES = ((4096, 4096), (7168, 7168), (28672, 7168), (7168, 28672), (11008, 4096))
LLAMA = {"q, k, v": (6144, 4096), "o": (4096, 4096), "gate, up": (28672, 4096), "down": (4096, 14336)}


def measure(args: argparse.Namespace) -> Iterator[Row]:
    """The rows of this device."""
    torch.manual_seed(args.seed)
    works = _on_gpu(args) if torch.device(args.device).type == "cuda" else _on_cpu(args)
    for work in works:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # sparse tensors are announced as prototypes
            row = work()
        yield row


def _on_gpu(args: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    for out, in_ in ((sized(a, args), sized(b, args)) for a, b in SHAPES):
        weight = _semi_structured(torch.randn(out, in_, device=args.device).to(torch.bfloat16))
        for name, tokens in (("prefill", sized(4096, args)), ("decoding", 64)):
            x = torch.randn(tokens, in_, device=args.device).to(torch.bfloat16)
            yield lambda name=name, weight=weight, x=x: _semi_structured_row(f"2:4 {name}", weight, x, args)

    yield from _llama(args)


def _llama(args: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    """Layers of Llama-3.1-8B in bfloat16 and float8, and what they sum to."""
    for phase, tokens in (("prefill", sized(4096, args)), ("decoding 64", 64), ("decoding 1", 1)):
        found: dict[str, list[Row]] = {"bfloat16": [], "float8": []}
        for layer, (out, in_) in LLAMA.items():
            weight = _semi_structured(torch.randn(sized(out, args), sized(in_, args), device=args.device).bfloat16())
            x = torch.randn(tokens, weight.shape[1], device=args.device).bfloat16()
            for kind, make in (("bfloat16", _semi_structured_row), ("float8", _float8_row)):
                name = f"Llama 8B, {layer}, {phase}, {kind}, 2:4"
                yield partial(_kept, found[kind], make, name, weight, x, args)
        for kind, rows in found.items():
            yield partial(_sum, f"Llama 8B, block, {phase}, {kind}, 2:4", rows)


def _kept(rows: list[Row], make: Callable[..., Row], *said: Any) -> Row:
    rows.append(make(*said))
    return rows[-1]


def _sum(name: str, rows: list[Row]) -> Row:
    """A block's layers one after another, each dense where that is faster."""
    dense = [math.nan if row.reference_ms is None else row.reference_ms for row in rows]
    ours = [
        other if math.isnan(row.ours_ms) else min(row.ours_ms, other) for row, other in zip(rows, dense, strict=True)
    ]
    return Row(name, "four layers, each as it is faster", "dense products", sum(ours), sum(dense))


def _float8_row(name: str, weight: Tensor, x: Tensor, args: argparse.Namespace) -> Row:
    """2:4 in float8 with row scales beside dense float8, both as torchao has them, inputs rounded on the way."""
    tokens, (out, in_) = len(x), weight.shape
    shape = f"{out} x {in_}, {tokens} tokens, float8"
    found: dict[str, Cost] = {}
    plain = cost(lambda: F.linear(x, weight), args)
    for kind, convert in (("dense", float8), ("2:4", float8_sparse)):
        try:
            made = convert(weight)
            eager, graph = _costs(lambda made=made: F.linear(x, made), args)
            found[kind] = graph or eager
        except Exception as error:  # which one, depends on the builds; the other shapes are measured all the same
            why = f"{kind}: {' '.join(str(error).split())[:120]}"
            return Row(name, shape, "dense float8", math.nan, None, note=f"not possible here: {why}")
    note = f"dense bfloat16 {plain.ms:.3g} ms"
    if found["2:4"].ms > found["dense"].ms:
        note += "; no gain: the dense product is faster"
    return Row(name, shape, "dense float8", found["2:4"].ms, found["dense"].ms, note=note)


def _semi_structured_row(name: str, weight: Tensor, x: Tensor, args: argparse.Namespace) -> Row:
    """The better of torch's two backends, in CUDA graphs where it can be captured, beside the dense product in one."""
    tokens, (out, in_) = len(x), weight.shape
    moved = weight.nbytes * 9 // 16 + 2 * (tokens * in_ + tokens * out)
    floor = floor_ms(args, moved=moved, operations=tokens * out * in_)  # half of the dense products
    shape = f"{out} x {in_}, {tokens} tokens, bfloat16"
    dense, dense_graph = _costs(lambda: F.linear(x, weight), args)
    base, said = dense_graph or dense, [f"dense {_both(dense, dense_graph)}"]
    best: Cost | None = None
    for backend, convert in BACKENDS.items():
        try:
            sparse, how = convert(weight, x)
            _check(F.linear(x, sparse), F.linear(x, weight))
            eager, graph = _costs(lambda sparse=sparse: F.linear(x, sparse), args)
        except (RuntimeError, NotImplementedError) as error:
            said.append(f"{backend}: {' '.join(str(error).split())[:100]}")
            continue
        said.append(f"{backend}{how} {_both(eager, graph)}")
        own = graph or eager
        best = own if best is None or own.ms < best.ms else best
    if best is None:
        note = f"not possible here: {'; '.join(said)}"
        return Row(name, shape, "dense product", math.nan, base.ms, floor, note=note)
    note = "; ".join(["no gain: the dense product is faster", *said] if best.ms > base.ms else said)
    return Row(name, shape, "dense product", best.ms, base.ms, floor, best.extra_bytes, base.extra_bytes, 1.3, note)


def _cutlass(weight: Tensor, _: Tensor) -> tuple[Tensor, str]:
    return PRODUCTS["CUTLASS"](weight), ""


def _cusparselt(weight: Tensor, x: Tensor) -> tuple[Tensor, str]:
    """With the algorithm that is fastest for these tokens, of the product that a linear layer does: (W x^T)^T."""
    packed = torch._cslt_compress(weight)
    found = torch._cslt_sparse_mm_search(packed, x.t(), transpose_result=True)
    sparse: Any = PRODUCTS["cuSPARSELt"](weight)
    sparse.alg_id_cusparselt = found  # an argument of from_dense in later versions only
    return sparse, f" (algorithm {found})"


BACKENDS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, str]]] = {
    "CUTLASS": _cutlass,
    "cuSPARSELt": _cusparselt,
}


def _costs(run: Callable[[], object], args: argparse.Namespace) -> tuple[Cost, Cost | None]:
    """Launched from Python, which takes half a millisecond for some backends; and replayed, None if it cannot be."""
    eager = cost(run, args)
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()
    except RuntimeError:
        return eager, None
    replayed = cost(graph.replay, args)
    del kept
    return eager, Cost(replayed.ms, eager.extra_bytes)


def _both(eager: Cost, graph: Cost | None) -> str:
    return f"{eager.ms:.3g} ms from Python, " + ("not captured" if graph is None else f"{graph.ms:.3g} ms in a graph")


def _on_cpu(args: argparse.Namespace) -> Iterator[Callable[[], Row]]:
    out, in_ = sized(4096, args), sized(4096, args)
    for sparsity in (0.5, 0.8, 0.95):
        scattered = torch.randn(out, in_) * (torch.rand(out, in_) >= sparsity)
        blocks = (torch.rand(out // 32, in_ // 32) >= sparsity).repeat_interleave(32, 0).repeat_interleave(32, 1)
        made: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
            "CSR": (scattered, lambda w: w.to_sparse_csr()),
            "BSR 32 x 32": (torch.randn(out, in_) * blocks, lambda w: w.to_sparse_bsr((32, 32))),
        }
        for name, (weight, convert) in made.items():
            for tokens in (1, 128):
                x = torch.randn(tokens, in_)
                shape = f"{out} x {in_}, {tokens} tokens, float32, {sparsity:.0%} zeros"
                yield lambda name=name, shape=shape, w=weight, c=convert, x=x: _row(name, shape, c, w, x, args)


def _row(
    name: str, shape: str, convert: Callable[[Tensor], Tensor], weight: Tensor, x: Tensor, args: argparse.Namespace
) -> Row:
    """Sparse against dense; where this build of torch cannot, the dense time alone and why."""
    dense = cost(lambda: F.linear(x, weight), args)
    try:
        sparse = convert(weight)
        _check(_times(sparse, x), F.linear(x, weight))
        ours = cost(lambda: _times(sparse, x), args)
    except Exception as error:  # which one, depends on the build; the other shapes are measured all the same
        reason = " ".join(str(error).split())[:120]
        return Row(name, shape, "dense product", math.nan, dense.ms, note=f"not possible here: {reason}")
    note = "no gain: the dense product is faster" if ours.ms > dense.ms else ""
    return Row(name, shape, "dense product", ours.ms, dense.ms, note=note)


def _times(sparse: Tensor, x: Tensor) -> Tensor:
    """x W^T of a sparse W as (W x^T)^T."""
    return (sparse @ x.t()).t()


def _semi_structured(weight: Tensor) -> Tensor:
    """The weight with the two smallest of every four columns zeroed."""
    groups = weight.unflatten(1, (-1, 4))
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, groups.abs().topk(2, dim=-1).indices, True)
    return groups.where(kept, 0).flatten(1)


def _check(found: Tensor, expected: Tensor) -> None:
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    if not error < 1e-2:
        raise RuntimeError(f"the sparse product differs by {error:.2g}")


if __name__ == "__main__":
    main(__doc__, measure)
