"""Many constrained tensors as few stacks: tensors of one size, each in a set of its own, are handled at once.

    tensors ──gather──▶ parts (problems, rows, columns) float32 ──▶ vertices ──move_──▶ tensors

A joint constraint is one problem of many parts; what is seen entry by entry is then one long vector.
"""

# pyright: reportPrivateImportUsage=false
# (torch's own optimizers are made of its _foreach functions, which it does not export)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prunus.frankwolfe.sets.ball import Ball
from prunus.frankwolfe.sets.group import Entries
from prunus.frankwolfe.sets.subspace import Triple


@dataclass(frozen=True)
class Part:
    """Which tensors (by place in a list) make one part, as what matrix each: stacked, or joined into one vector."""

    places: tuple[int, ...]
    key: tuple[int, int]
    joined: bool = False


@dataclass(frozen=True)
class Problems:
    """Equal problems. ball: of radius 1; radius, half: (problems,) their radii, and half their L2 diameters.

    minus: (problems, 1, 1) the negative radii.
    """

    ball: Ball
    parts: tuple[Part, ...]
    radius: Tensor
    half: Tensor
    minus: Tensor

    def gather(self, tensors: Sequence[Tensor], like: Sequence[Tensor]) -> list[Tensor]:
        """The tensors as parts, (problems, rows, columns) each, in float32 (or float64), to read: copies, or views.

        like: the parameters, whose order in memory decides in which order entries stand where any order will do.
        """
        found: list[Tensor] = []
        for part in self.parts:
            chosen = [_matrix(tensors[place], like[place], part, self.ball) for place in part.places]
            if part.joined:
                stack = torch.cat([each.reshape(-1) for each in chosen])[None, None]
            else:
                stack = torch.stack(chosen) if len(chosen) > 1 else chosen[0][None]
            found.append(stack.to(self.radius.dtype))
        return found

    def move_(self, tensors: Sequence[Tensor], vertices: Sequence[Tensor], share: Tensor) -> None:
        """Move the parameters this share of the way, (problems, 1, 1), towards the vertices."""
        targets: list[Tensor] = []
        values: list[Tensor] = []
        for part, stack, vertex in zip(self.parts, self.gather(tensors, tensors), vertices, strict=True):
            chosen = [tensors[place] for place in part.places]
            if len(chosen) == 1 and stack.data_ptr() == chosen[0].data_ptr():  # a view: nothing to write back
                stack.lerp_(vertex, share)
                continue
            moved = torch.lerp(stack, vertex, share)
            pieces = moved[0, 0].split([each.numel() for each in chosen]) if part.joined else moved.unbind()
            matrices = [_matrix(each, each, part, self.ball) for each in chosen]
            fits = [matrix.data_ptr() == each.data_ptr() for matrix, each in zip(matrices, chosen, strict=True)]
            targets += [matrix if fit else each for matrix, each, fit in zip(matrices, chosen, fits, strict=True)]
            values += [
                piece.reshape(matrix.shape if fit else each.shape)
                for piece, matrix, each, fit in zip(pieces, matrices, chosen, fits, strict=True)
            ]
        if targets:
            torch._foreach_copy_(targets, values)

    def vertices(self, moments: Sequence[Tensor], leading: Sequence[Triple] | None = None) -> list[Tensor]:
        """The points of the sets with the least inner product with the moments; leading: see `Ball.extreme`."""
        return [part.mul_(self.minus) for part in self.ball.extreme(moments, leading)]

    def widths(self) -> list[int] | None:
        """How many singular vectors of each part are followed; None if none are."""
        return self.ball.widths([part.key for part in self.parts])

    def balls(self, tensors: Sequence[Tensor]) -> list[tuple[Ball, list[Tensor]]]:
        """Each problem by itself: its ball, with its radius, and its tensors. Waits for the device."""
        radii = self.radius.tolist()
        if len(radii) == 1:
            whole = [tensors[place] for part in self.parts for place in part.places]
            return [(replace(self.ball, radius=radii[0]), whole)]
        (part,) = self.parts
        return [
            (replace(self.ball, radius=radius), [tensors[place]])
            for radius, place in zip(radii, part.places, strict=True)
        ]


def joint_problem(ball: Ball, tensors: Sequence[Tensor]) -> Problems:
    """One problem: all tensors together are a point of the ball."""
    keys = [ball.seen.key(tuple(tensor.shape)) for tensor in tensors]
    if isinstance(ball.seen, Entries):
        parts = (Part(tuple(range(len(tensors))), (1, sum(key[1] for key in keys)), joined=True),)
    else:
        parts = tuple(Part((place,), key) for place, key in enumerate(keys))
    return _problems([ball], parts, [[tuple(tensor.shape) for tensor in tensors]], tensors[0])


def separate_problems(balls: Sequence[Ball], tensors: Sequence[Tensor]) -> list[Problems]:
    """Each tensor is a point of its own ball; those of one size, kind of set, device and dtype are put together."""
    found: dict[object, list[int]] = {}
    for place, (ball, tensor) in enumerate(zip(balls, tensors, strict=True)):
        key = ball.seen.key(tuple(tensor.shape))
        found.setdefault((replace(ball, radius=1.0), key, tensor.device, tensor.dtype), []).append(place)
    problems: list[Problems] = []
    for places in found.values():
        chosen = [balls[place] for place in places]
        shapes = [[tuple(tensors[place].shape)] for place in places]
        first = tensors[places[0]]
        parts = (Part(tuple(places), chosen[0].seen.key(tuple(first.shape))),)
        problems.append(_problems(chosen, parts, shapes, first))
    return problems


def _problems(
    balls: Sequence[Ball], parts: tuple[Part, ...], shapes: Sequence[Sequence[tuple[int, ...]]], like: Tensor
) -> Problems:
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    halves = [ball.diameter(*each) / 2 for ball, each in zip(balls, shapes, strict=True)]
    radius = torch.tensor([ball.radius for ball in balls], dtype=dtype, device=like.device)
    half = torch.tensor(halves, dtype=dtype, device=like.device)
    return Problems(replace(balls[0], radius=1.0), parts, radius, half, -radius[:, None, None])


def _matrix(tensor: Tensor, like: Tensor, part: Part, ball: Ball) -> Tensor:
    """The tensor as the part's matrix; in channels-last order where `like` has it and the columns' order is free.

    Then it is a view. Entries, filters and singular values do not change with the order of the columns.
    """
    free = like.ndim == 4 and ball.seen.free_columns and not like.is_contiguous()
    if free and like.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1 if part.joined else part.key)
