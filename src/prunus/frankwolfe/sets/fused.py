"""Tensors that Triton programs move all at once: those in sets whose vertices are chosen entry by entry.

They are K-support balls, L2 balls and K-sparse polytopes of single float32 tensors, on a GPU; `kernels/moves.py` has
the programs. What is left goes the way of `problems`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunus.frankwolfe.sets.group import Entries
from prunus.frankwolfe.sets.norms import Lp
from prunus.frankwolfe.sets.problems import Problems
from prunus.frankwolfe.sets.protocol import count_of
from prunus.frankwolfe.sets.sparse import KSparse, KSupport
from prunus.kernels import uses_kernels

_MOST = 2**31 - 2**16  # entries that programs count in int32


def is_fused(problems: Problems, tensors: Sequence[Tensor], moments: Sequence[Tensor]) -> bool:
    """Whether programs move these problems; the tensors and moments are those of all problems of the group."""
    if len(problems.parts) != 1 or problems.parts[0].joined or _kind(problems) is None:
        return False
    pairs = [(tensors[place], moments[place]) for place in problems.parts[0].places]
    return all(_plain(x) and _plain(m) and uses_kernels(x) and _order(x) == _order(m) for x, m in pairs)


class FusedMoves:
    """A plan to move the tensors of some problems, which is good while they lie where they lie."""

    def __init__(self, problems: Sequence[Problems], tensors: Sequence[Tensor], moments: Sequence[Tensor]) -> None:
        from prunus.kernels import plan_moves

        self.problems, self.addresses = list(problems), _addresses(problems, tensors, moments)
        chosen = [(place, _kind(each)) for each in problems for place in each.parts[0].places]
        kinds = [kind for _, kind in chosen if kind is not None]
        self.moves = plan_moves(
            [tensors[place] for place, _ in chosen],
            [moments[place] for place, _ in chosen],
            [kind.kept for kind in kinds],
            [kind.signs for kind in kinds],
        )
        self.radius = torch.cat([each.radius for each in problems])
        self.half = torch.cat([each.half for each in problems])

    def fits(self, problems: Sequence[Problems], tensors: Sequence[Tensor], moments: Sequence[Tensor]) -> bool:
        """Whether the plan is one for these."""
        same = len(problems) == len(self.problems) and all(
            one is other for one, other in zip(problems, self.problems, strict=True)
        )
        return same and self.addresses == _addresses(problems, tensors, moments)

    def move_(self, tensors: Sequence[Tensor], rate: float | Tensor, rescale: str) -> Tensor:
        """One step: rescale is "none", "diameter" or "fast_gradient". tensors: those of the plan, among others.

        Returns how far each of the plan's tensors moved towards its vertex, (tensors,) in [0, 1].
        """
        from prunus.kernels import move_

        share = torch.ones((), device=self.radius.device) * rate
        half = None if rescale == "none" else self.half
        moved_by = move_(self.moves, self.radius, half, share, by_length=rescale == "fast_gradient")
        # The programs write past torch, which would not know that anything changed.
        moved = [tensors[place] for each in self.problems for place in each.parts[0].places]
        torch.autograd.graph.increment_version(moved)
        return moved_by


@dataclass(frozen=True)
class _Kind:
    """How many entries a vertex has, and whether all of one size."""

    kept: int
    signs: bool


def _kind(problems: Problems) -> _Kind | None:
    gauge, n = problems.ball.gauge, problems.parts[0].key[1]
    if not isinstance(problems.ball.seen, Entries) or not 0 < n < _MOST:
        return None
    if isinstance(gauge, KSupport | KSparse):
        return _Kind(count_of(gauge.k, n), isinstance(gauge, KSparse))
    return _Kind(n, False) if isinstance(gauge, Lp) and gauge.p == 2 else None


def _plain(x: Tensor) -> bool:
    """Whether it is an ordinary float32 tensor without gaps."""
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float32 and dense


def _order(x: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of what has an extent: equal where entries lie in the same order."""
    return [(size, stride) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def _addresses(
    problems: Sequence[Problems], tensors: Sequence[Tensor], moments: Sequence[Tensor]
) -> list[tuple[int, int]]:
    return [
        (tensors[place].data_ptr(), moments[place].data_ptr()) for each in problems for place in each.parts[0].places
    ]
