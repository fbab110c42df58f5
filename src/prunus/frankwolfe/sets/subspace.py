"""Leading singular vectors by a subspace iteration that begins where the last one ended.

    Y = X V,  U = orth(Y),  Z = X^T U,  V <- orth(Z),  s = diag(V^T Z)          one iteration, four products

Momentum changes little from one step to the next, so one iteration a step follows its singular vectors. `orth` is a
shifted Cholesky QR: products and one small factorisation only, no host synchronisation. As in Gram-Schmidt
each column keeps only what earlier ones lack, so columns turn into single singular vectors, in order. Once is enough:
columns are nearly orthogonal as soon as they follow, and what the shift leaves is short of orthonormal by 1e-5; a
second factorisation changed no minimiser's value by 1e-4.

Accuracy, as share of the exact minimiser's value, on 128 x 576 matrices and K of 1, 12 and 38 (tests/laws/test_sets.py
holds it to nearly this). Cold, Gaussian: 0.96, 0.99, 0.99. Following a momentum of 0.9 with one iteration a step:
1.00, 0.98, 0.97 where a spectrum 1/i stands out of the noise; 0.90, 0.92, 0.95 in pure noise, where singular values
lie close and vectors turn fastest, and 0.95, 0.96, 0.98 there with two iterations. Columns to spare gained less than
0.01 and are left out. Whatever the accuracy, U and V are never longer than 1, so a minimiser made of them is feasible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Triple = tuple[Tensor, Tensor, Tensor]  # U, s, V

COLD = 12  # iterations from a random start
_SHIFT = 1e-5  # e, of a Gram matrix with unit diagonal: far above float32's rounding of it, for up to 1,000 columns


def make_basis(problems: int, rows: int, columns: int, k: int, *, device: torch.device, seed: int = 0) -> Tensor:
    """Random vectors (problems, min(rows, columns), k), float32, the same for a seed on every device.

    >>> make_basis(1, 4, 9, 2, device=torch.device("cpu")).shape
    torch.Size([1, 4, 2])
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(problems, min(rows, columns), k, generator=generator).to(device)


def follow_(bases: Sequence[Tensor], xs: Sequence[Tensor], iterations: int = 1) -> list[Triple]:
    """Turn the bases towards the xs' leading singular vectors; returns U (.., rows, k), s (.., k), V (.., columns, k).

    xs: (problems, rows, columns) float; bases: (problems, min(rows, columns), k) float, changed in place. Where an x
    has fewer than k singular values, columns of U shrink to zero and their s is 0. All go in step: factorisations of
    one width are done at once, for they are small and slow.
    """
    talls = [x if x.shape[1] >= x.shape[2] else x.mT for x in xs]
    largest = [torch.linalg.vector_norm(x, math.inf, (1, 2), keepdim=True) for x in xs]
    peaks = [each.clamp_min(torch.finfo(each.dtype).tiny) for each in largest]
    vs, us, zs, fresh = list(bases), list(bases), list(bases), list(bases)  # all but the first assigned in the loop
    for _ in range(max(1, iterations)):
        # Divided by x's largest entry, so that no square overflows or vanishes.
        us, _ = _orthonormal([tall @ (v / peak) for tall, v, peak in zip(talls, vs, peaks, strict=True)])
        zs = [tall.mT @ (u / peak) for tall, u, peak in zip(talls, us, peaks, strict=True)]
        fresh, lengths = _orthonormal(zs)
        # A column that vanished keeps its old direction, or the iteration would never find it again.
        vs = [torch.where(long > 0, new, old) for long, new, old in zip(lengths, fresh, vs, strict=True)]
    found: list[Triple] = []
    for basis, x, tall, peak, u, z, v, new in zip(bases, xs, talls, peaks, us, zs, fresh, vs, strict=True):
        basis.copy_(new)
        s = torch.linalg.vecdot(v, z, dim=1).clamp_min(0) * peak[:, 0]
        found.append((u, s, v) if tall is x else (v, s, u))
    return found


def _orthonormal(ys: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Orthonormal columns that span those of y, (problems, n, k), in Gram-Schmidt's order, never longer than 1; for
    each of many. Also how long the columns of y were, (problems, 1, k).

    With y^T y + e 1 = L L^T, q = y L^-T has q^T q = 1 - e (L^-1 L^-T) <= 1: short by e / p^2 in a column of which p, at
    most 1, is new.
    """
    lengths = [torch.linalg.vector_norm(y, dim=1, keepdim=True) for y in ys]
    qs = [y / length.clamp_min(torch.finfo(y.dtype).tiny) for y, length in zip(ys, lengths, strict=True)]
    alike: dict[object, list[int]] = {}
    for place, q in enumerate(qs):
        alike.setdefault((q.shape[2], q.dtype, q.device), []).append(place)
    grams = [q.mT @ q for q in qs]
    for places in alike.values():
        inverse = _inverse(torch.cat([grams[place] for place in places]))
        for place, part in zip(places, inverse.split([len(grams[place]) for place in places]), strict=True):
            qs[place] = qs[place] @ part.mT
    return qs, lengths


def _inverse(gram: Tensor) -> Tensor:
    """L^-1 of each Gram matrix (.., k, k) of columns no longer than 1, with the shift e."""
    eye = torch.eye(gram.shape[2], dtype=gram.dtype, device=gram.device)
    lower, failed = torch.linalg.cholesky_ex(gram + _SHIFT * eye)
    # If rounding made it indefinite: divide by a bound of the largest singular value, which stays feasible.
    bound = eye * (1.0001 * math.sqrt(gram.shape[2]))
    lower = torch.where((failed == 0)[:, None, None], lower, bound)
    return torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
