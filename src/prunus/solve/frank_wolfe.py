"""Masks chosen for a layer's output: Frank-Wolfe on the reconstruction error over the relaxed masks of a pattern.

A mask m in {0, 1}^in of a row w leaves d = w * (1 - m) out, which costs f(m) = ||d X^T||^2 = d G d^T with G = X^T X.
Relaxed to 0 <= m <= 1 with the pattern's counts, f is convex, but its minimum is spread thinly over all weights and
loses much when it is rounded. So a concave term that is zero at every mask grows while the iterations go on:

    F_c(m) = d G d^T + c sum_j q_j (m_j - m_j^2),   q_j = w_j^2 G_jj,   gradient = -2 w * (d G) + c q * (1 - 2 m)

F_0 = f. F_1(m) is the expected error of a mask whose entries are drawn independently with the probabilities m (its
count is right on average only): unlike f it promises between masks nothing that masks do not keep.

    Wanda's mask ─▶ m <- m + s (v - m), v the pattern's best mask for -gradient, s by exact line search ─▶ rounded
                 ─▶ swaps ─▶ compared with Wanda's, row by row where the pattern chooses by row

A swap exchanges one kept weight for one pruned weight and lowers a row's error exactly. With r = d G, pruning a kept
weight i and restoring a pruned weight j changes the error by

    A_i + B_j - 2 w_i w_j G_ij,   A_i = q_i + 2 w_i r_i,   B_j = q_j - 2 w_j r_j

In groups of a few columns (N:M) the best pair of all is found. In a whole row that would take in^2 comparisons, so two
pairs are tried: the cheapest restoration with the pruning that then is best, and the cheapest pruning with the
restoration that then is best. A row stops when neither helps.

The weights that are kept stay as they are; `reconstruct` or a retraining may move them afterwards.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.patterns import Pattern, Unstructured
from prunus.score import Criterion, magnitude, wanda
from prunus.solve.quadratic import row_errors, row_slices, scaled_gram, seen_gram

if TYPE_CHECKING:
    from prunus.layers import Layer

_CHUNK = 1 << 22  # entries worked on at once: bounds the temporaries, about ten times 16 MB
_LEAST = 1e-5  # share of its error that an exchange must save: float32 cannot tell less from nothing


def frank_wolfe(
    iterations: int = 30, swaps: int = 100, concave: tuple[float, float] = (0.5, 1.0), fixed: float = 0.0
) -> Criterion:
    """A criterion that keeps the weights whose loss changes the layer's outputs least, and leaves them as they are.

    iterations: of Frank-Wolfe, from Wanda's mask; each is one product (out, in) x (in, in) and one selection. 0 leaves
        all to the swaps.
    swaps: most exchanges of a kept for a pruned weight that a row may make at the end, each of which lowers its error.
    concave: c in the first iteration and in the last, linear in between; (0, 0) is the plain convex relaxation.
    fixed: share of the weights in Wanda's mask, those with the highest scores, that stay whatever their error. The
        search is for the rest.

    The idea is that of Roux et al. 2025 (arXiv:2510.13713), who minimise the convex relaxation with a share of 0.9
    fixed and round it: frank_wolfe(swaps=0, concave=(0, 0), fixed=0.9). The concave term and the swaps are ours. The
    error of no row (of no layer, for patterns that compare rows) exceeds that of Wanda's mask: that is checked in
    float64, all else is float32. Ties break by index, counts are exact. A layer that saw no token is pruned by
    magnitude, with a warning. Its solve raises ValueError for a layer without a Gram matrix, for NaN or Inf, and as
    `pattern.mask`.

    >>> inputs = Inputs(3, gram=True)
    >>> inputs.add_(torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.9]]))
    >>> layer = Layer("fc", torch.tensor([[1.0, 1.0, 1.0]]), inputs)  # the first two outputs cancel
    >>> frank_wolfe().solve(layer, Unstructured("row"), 1)[0]
    tensor([[0., 0., 1.]])
    """
    if operator.index(iterations) < 0 or operator.index(swaps) < 0:
        raise ValueError(f"frank_wolfe needs iterations >= 0 and swaps >= 0; got {iterations} and {swaps}")
    if len(concave) != 2 or not all(0 <= c <= 2 for c in concave):
        raise ValueError(f"concave is (first, last), each in [0, 2]; got {concave}")
    if not 0 <= fixed <= 1:
        raise ValueError(f"frank_wolfe fixes a share of Wanda's mask, in [0, 1]; got fixed={fixed}")

    @torch.no_grad()
    def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        inputs = seen_gram(layer, "frank_wolfe")
        if inputs is None:
            return magnitude.solve(layer, pattern, kept)
        score = wanda(layer)
        start = pattern.mask(score, kept, name=layer.name)
        held = _best_of(score, start, pattern, fixed)
        gram = scaled_gram(layer, inputs)
        weight = layer.weight.float().contiguous()
        mask = start
        if iterations:
            problem = _Problem(weight, gram, pattern, kept, held)
            mask = _lower(weight, gram, _relax(problem, start, iterations, concave), start, pattern)
        if swaps and pattern.unit((weight.shape[0], weight.shape[1]), name=layer.name) == 1:
            mask = mask.clone()
            swap_(mask, weight, gram, most=swaps, width=pattern.width, held=held)
        mask = _lower(weight, gram, mask, start, pattern)
        return layer.weight.masked_fill(~mask, 0.0), mask

    return Criterion(solve, needs="gram", compare="row", name="frank_wolfe")


@torch.no_grad()
def swap_(
    mask: Tensor, weight: Tensor, gram: Tensor, *, most: int, width: int | None = None, held: Tensor | None = None
) -> None:
    """Exchange weights in `mask` (out, in) bool, in place, until no row improves or each has made `most` exchanges.

    weight: (out, in) float32; gram: (in, in) float32, symmetric. width: exchanges stay within so many consecutive
    columns, so every N:M group keeps its count; None is the whole row. held: (out, in) bool, kept weights that stay.
    Every row keeps its count.

    >>> mask, gram = torch.tensor([[True, False, False]]), torch.tensor([[1, -1, 0], [-1, 1, 0], [0, 0, 0.8]])
    >>> swap_(mask, torch.ones(1, 3), gram, most=1)
    >>> mask.tolist()
    [[False, False, True]]
    """
    held = torch.zeros_like(mask) if held is None else held
    for rows in row_slices(weight, _CHUNK):
        _swap_chunk_(mask[rows], held[rows], weight[rows], gram, most=most, width=width)


def _best_of(score: Tensor, start: Tensor, pattern: Pattern, share: float) -> Tensor:
    """The share of a mask (out, in) bool with the highest scores, compared as the pattern compares; N:M within rows."""
    shape = (score.shape[0], score.shape[1])
    unit = pattern.unit(shape)
    count = round(share * int(start.sum())) // unit * unit
    if pattern.sparsity is None:
        return pattern.choose(score, count)
    return Unstructured("row").choose(score.masked_fill(~start, -torch.inf), count)


@dataclass(frozen=True)
class _Problem:
    """A layer's weight and Gram matrix, and the masks that are sought: of a pattern, a count, and with what is held."""

    weight: Tensor
    gram: Tensor
    pattern: Pattern
    kept: int
    held: Tensor

    def best(self, score: Tensor) -> Tensor:
        """The mask of the highest sum of scores (out, in)."""
        return self.pattern.choose(score.masked_fill(self.held, torch.inf), self.kept)


def _relax(problem: _Problem, start: Tensor, iterations: int, concave: tuple[float, float]) -> Tensor:
    """The rounded mask (out, in) bool after the iterations; nothing in here waits for the device.

    d G is carried along: a step changes it by the same share as d.
    """
    weight, gram, pattern = problem.weight, problem.gram, problem.pattern
    m = start.float()
    own = weight.square().mul_(gram.diagonal())  # q: what each weight's loss costs by itself
    product = (weight * (1 - m)) @ gram  # d G
    for t in range(iterations):
        c = concave[0] + (concave[1] - concave[0]) * t / max(1, iterations - 1)
        gradient = (own * (c - 2 * c * m)).addcmul_(weight, product, value=-2)
        direction = problem.best(-gradient).float().sub_(m)
        change = (weight * direction).neg_()
        change_product = change @ gram
        slope = _sum(gradient.mul_(direction), pattern)
        bend = _sum(change.mul_(change_product).addcmul_(own, direction.square(), value=-c), pattern)
        step = _line_search(slope, bend)
        m.addcmul_(step, direction)
        product.addcmul_(step, change_product)
    return problem.best(m)


def _sum(entries: Tensor, pattern: Pattern) -> Tensor:
    """(out, 1) where rows are chosen apart, so that each has a step of its own; else (1, 1)."""
    return entries.sum(1, keepdim=True) if pattern.by_row else entries.sum().view(1, 1)


def _line_search(slope: Tensor, bend: Tensor) -> Tensor:
    """argmin over 0 <= s <= 1 of slope s + bend s^2; where the parabola opens downwards, the lower end."""
    tiny = torch.finfo(torch.float32).tiny  # only keeps 0/0 out
    inside = (-slope / (2 * bend).clamp(min=tiny)).clamp(0, 1)
    return torch.where(bend > 0, inside, (slope + bend < 0).float())


def _lower(weight: Tensor, gram: Tensor, mask: Tensor, start: Tensor, pattern: Pattern) -> Tensor:
    """Of two masks the one with the lower error, row by row where the pattern allows; `start` at a tie."""
    gain = _sum((row_errors(weight * ~start, gram) - row_errors(weight * ~mask, gram))[:, None], pattern)
    return torch.where(gain > 0, mask, start)


@dataclass(frozen=True)
class _Rows:
    """The rows of a chunk that still improve: where they are in it, and their w, m, what is held, r, q and error."""

    place: Tensor
    weight: Tensor
    mask: Tensor
    held: Tensor
    product: Tensor
    own: Tensor
    error: Tensor

    def only(self, which: Tensor) -> _Rows:
        return _Rows(*(each[which] for each in vars(self).values()))


def _swap_chunk_(mask: Tensor, held: Tensor, weight: Tensor, gram: Tensor, *, most: int, width: int | None) -> None:
    lost = weight * ~mask
    product = lost @ gram
    own = weight.square().mul_(gram.diagonal())
    place = torch.arange(len(weight), device=weight.device)
    rows = _Rows(place, weight, mask.clone(), held, product, own, (lost * product).sum(1))
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
    """A where a weight may go and B where it is pruned, +inf elsewhere; (rows, in) each."""
    cross = 2 * rows.weight * rows.product
    prune = (rows.own + cross).masked_fill_(~rows.mask | rows.held, torch.inf)
    return prune, (rows.own - cross).masked_fill_(rows.mask, torch.inf)


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
