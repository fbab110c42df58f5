"""Exchanges of one kept weight for one pruned weight, each of which lowers a row's output error exactly.

With d = w * (1 - m) what a row w loses, r = d G and q_j = w_j^2 G_jj, pruning a kept weight i and restoring a pruned
weight j changes the error d G d^T by

    A_i + B_j - 2 w_i w_j G_ij,   A_i = q_i + 2 w_i r_i,   B_j = q_j - 2 w_j r_j

In groups of a few columns (N:M) the best pair of all is found. In a whole row that would take in^2 comparisons, so two
pairs are tried: the cheapest restoration with the pruning that then is best, and the cheapest pruning with the
restoration that then is best. A row stops when neither helps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["swap_"]

_CHUNK = 1 << 22  # entries worked on at once: bounds the temporaries, about ten times 16 MB
_LEAST = 1e-5  # share of its error that an exchange must save: float32 cannot tell less from nothing


@torch.no_grad()
def swap_(mask: Tensor, weight: Tensor, gram: Tensor, *, most: int, width: int | None = None) -> None:
    """Exchange weights in `mask` (out, in) bool, in place, until no row improves or each has made `most` exchanges.

    weight: (out, in) float32; gram: (in, in) float32, symmetric. width: exchanges stay within so many consecutive
    columns, so every N:M group keeps its count; None is the whole row. Every row keeps its count.

    >>> mask, gram = torch.tensor([[True, False, False]]), torch.tensor([[1, -1, 0], [-1, 1, 0], [0, 0, 0.8]])
    >>> swap_(mask, torch.ones(1, 3), gram, most=1)
    >>> mask.tolist()
    [[False, False, True]]
    """
    columns = weight.shape[1]
    for start in range(0, len(weight), max(1, _CHUNK // max(1, columns))):
        rows = slice(start, start + max(1, _CHUNK // max(1, columns)))
        _swap_chunk_(mask[rows], weight[rows], gram, most, width)


@dataclass(frozen=True)
class _Rows:
    """The rows of a chunk that still improve: where they are in it, and their w, m, r, q and error."""

    place: Tensor
    weight: Tensor
    mask: Tensor
    product: Tensor
    alone: Tensor
    error: Tensor

    def only(self, which: Tensor) -> _Rows:
        return _Rows(*(each[which] for each in vars(self).values()))


def _swap_chunk_(mask: Tensor, weight: Tensor, gram: Tensor, most: int, width: int | None) -> None:
    lost = weight * ~mask
    product = lost @ gram
    alone = weight.square().mul_(gram.diagonal())
    place = torch.arange(len(weight), device=weight.device)
    rows = _Rows(place, weight, mask.clone(), product, alone, (lost * product).sum(1))
    for _ in range(most):
        out, back, change = _best_in_row(rows, gram) if width is None else _best_in_group(rows, gram, width)
        better = change < -_LEAST * rows.error.abs()  # where all cancels, rounding can make it negative
        if not bool(better.all()):
            mask[rows.place] = rows.mask
            rows, out, back, change = rows.only(better), out[better], back[better], change[better]
        if len(out) == 0:
            return
        rows.mask.scatter_(1, out[:, None], False).scatter_(1, back[:, None], True)
        rows.product.addcmul_(rows.weight.gather(1, out[:, None]), gram[out])
        rows.product.addcmul_(rows.weight.gather(1, back[:, None]), gram[back], value=-1)
        rows.error.add_(change)
    mask[rows.place] = rows.mask


def _costs(rows: _Rows) -> tuple[Tensor, Tensor]:
    """A where a weight is kept and B where it is pruned, +inf elsewhere; (rows, in) each."""
    cross = 2 * rows.weight * rows.product
    return (rows.alone + cross).masked_fill_(~rows.mask, torch.inf), (rows.alone - cross).masked_fill_(
        rows.mask, torch.inf
    )


def _best_in_row(rows: _Rows, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which weight to prune, which to restore (rows,), and the change of the error, of the better of two pairs."""
    prune, restore = _costs(rows)
    first_back, then_out, one = _pair(restore, prune, rows.weight, gram)
    first_out, then_back, other = _pair(prune, restore, rows.weight, gram)
    out, back = torch.where(one <= other, then_out, first_out), torch.where(one <= other, first_back, then_back)
    return out, back, torch.minimum(one, other)


def _pair(cost: Tensor, partner: Tensor, weight: Tensor, gram: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entry of least `cost`, its best partner, and what both change together."""
    least, first = cost.min(1)
    given = weight.gather(1, first[:, None])
    both, second = torch.addcmul(partner, weight * given, gram[first], value=-2).min(1)
    return first, second, least + both


def _best_in_group(rows: _Rows, gram: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """As `_best_in_row`, of all pairs in groups of `width` columns; one entry of each group to restore at a time."""
    count, columns = rows.weight.shape
    groups = columns // width
    prune, restore = (each.view(count, groups, width) for each in _costs(rows))
    weight = rows.weight.view(count, groups, width)
    inside = gram.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (groups, width, width)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for j in range(width):
        pairs = torch.addcmul(prune + restore[..., j : j + 1], weight * weight[..., j : j + 1], inside[:, j], value=-2)
        change, out = pairs.view(count, columns).min(1)
        found.append((out, out // width * width + j, change))
    best = torch.stack([change for *_, change in found]).argmin(0, keepdim=True)
    out, back, change = (torch.stack(each).gather(0, best)[0] for each in zip(*found, strict=True))
    return out, back, change
