"""What zeros are worth when the model runs: 2:4 tensors on a GPU, sparse formats on a CPU, beside dense products.

    python benchmarks/inference.py                                  # GPU: prefill at real layer shapes, bf16
    python benchmarks/inference.py --device cpu --scale 0.1         # CPU: CSR and blocks at 50, 80, 95 %

On a GPU a weight (out, in) with two zeros in every four goes through torch.sparse.to_sparse_semi_structured; the
product with 4,096 tokens (prefill) and with 64 (decoding a batch) is timed against the dense one. On a CPU, which has
no 2:4 products, CSR and BSR (blocks of 32 x 32) are timed at the sparsities where they may begin to pay. A ratio below
one means that the dense product is faster: then nothing is gained, and the table says so.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from claims import Row, cost, floor_ms, main, sized
from torch import Tensor

SHAPES = ((4096, 4096), (7168, 7168), (28672, 7168), (7168, 28672), (11008, 4096))


def measure(args: argparse.Namespace) -> list[Row]:
    """The rows of this device."""
    torch.manual_seed(args.seed)
    rows = _on_gpu if torch.device(args.device).type == "cuda" else _on_cpu
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse tensors are announced as prototypes
        return rows(args)


def _on_gpu(args: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for out, in_ in ((sized(a, args), sized(b, args)) for a, b in SHAPES):
        weight = _semi_structured(torch.randn(out, in_, device=args.device).to(torch.bfloat16))
        for name, tokens in (("prefill", sized(4096, args)), ("decoding", 64)):
            x = torch.randn(tokens, in_, device=args.device).to(torch.bfloat16)
            moved = weight.nbytes * 9 // 16 + 2 * (tokens * in_ + tokens * out)
            floor = floor_ms(args, moved=moved, operations=tokens * out * in_)  # half of the dense products
            shape = f"{out} x {in_}, {tokens} tokens, bfloat16"
            rows.append(_row(f"2:4 {name}", shape, lambda w=weight: _sparse(w), weight, x, args, floor, target=1.3))
    return rows


def _on_cpu(args: argparse.Namespace) -> list[Row]:
    out, in_ = sized(4096, args), sized(4096, args)
    rows: list[Row] = []
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
                rows.append(_row(name, shape, lambda w=weight, c=convert: c(w), weight, x, args, None))
    return rows


def _row(
    name: str,
    shape: str,
    convert: Callable[[], Tensor],
    weight: Tensor,
    x: Tensor,
    args: argparse.Namespace,
    floor: float | None,
    target: float | None = None,
) -> Row:
    """Sparse against dense; where this build of torch cannot, the dense time alone and why."""
    dense = cost(lambda: F.linear(x, weight), args)
    try:
        sparse = convert()
        _check(_times(sparse, x), F.linear(x, weight))
        ours = cost(lambda: _times(sparse, x), args)
    except Exception as error:  # which one, depends on the build; the other shapes are measured all the same
        reason = " ".join(str(error).split())[:120]
        return Row(name, shape, "dense product", math.nan, dense.ms, floor, note=f"not possible here: {reason}")
    note = "no gain: the dense product is faster" if ours.ms > dense.ms else ""
    return Row(
        name, shape, "dense product", ours.ms, dense.ms, floor, ours.extra_bytes, dense.extra_bytes, target, note
    )


def _times(sparse: Tensor, x: Tensor) -> Tensor:
    """x W^T of a sparse W: as F.linear where it is one, else as (W x^T)^T."""
    return (sparse @ x.t()).t() if sparse.layout in (torch.sparse_csr, torch.sparse_bsr) else F.linear(x, sparse)


def _sparse(weight: Tensor) -> Tensor:
    return torch.sparse.to_sparse_semi_structured(weight)


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
