"""Tensors seen entry by entry, or in groups: filters, input channels, heads, or any other grouping.

Entries      profile |x_i|
Groups       profile ||x_g||_2, g: `size` consecutive rows (or columns) of the matrix (out, in * kernel)
Labels       profile ||x_g||_2, g: the entries with the same label
Tied         profile ||(x_g, y_g, ...)||_2, g: what belongs together in several matrices, as a neuron's rows and column
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from prunus.frankwolfe.sets.protocol import Rebuild, matrix_of


@dataclass(frozen=True)
class Entries:
    """Every entry by itself; tensors are handled flat.

    >>> Entries().split(torch.tensor([[[3.0, -4.0]]]))[0]
    tensor([[3., 4.]])
    """

    @property
    def free_columns(self) -> bool:
        return True

    def key(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = matrix_of(shape)
        return 1, rows * columns

    def count(self, rows: int, columns: int) -> int:
        return rows * columns

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        return x.abs().flatten(1), lambda new: x.sign().mul_(new.view_as(x))


@dataclass(frozen=True)
class Groups:
    """`size` consecutive rows of the matrix (out, in * kernel) are a group: 1 filters or neurons, the head size heads.

    along: "rows" (outputs), or "columns" (inputs; for a convolution size = the kernel's entries makes input channels).
    Raises ValueError for a size below 1, and in `key` for a matrix that it does not divide.

    >>> Groups().split(torch.tensor([[[3.0, -4.0], [0.0, 1.0]]]))[0]
    tensor([[5., 1.]])
    """

    size: int = 1
    along: Literal["rows", "columns"] = "rows"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"A group has at least 1 of the {self.along}; got size={self.size}")

    @property
    def free_columns(self) -> bool:
        return self.along == "rows"

    def key(self, shape: tuple[int, ...]) -> tuple[int, int]:
        matrix = matrix_of(shape)
        extent = matrix[0 if self.along == "rows" else 1]
        if extent % self.size:
            raise ValueError(
                f"A tensor of shape {tuple(shape)} has {extent} {self.along}, which groups of {self.size} do not "
                "divide: choose another size, or constrain this tensor by another set"
            )
        return matrix

    def count(self, rows: int, columns: int) -> int:
        return (rows if self.along == "rows" else columns) // self.size

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        across = x if self.along == "rows" else x.mT
        groups = across.reshape(x.shape[0], self.count(*x.shape[1:]), -1)  # (problems, groups, entries of a group)
        scale = _scale(groups)
        norms = torch.linalg.vector_norm(groups / scale, dim=2) * scale[:, 0]

        def rebuild(new: Tensor) -> Tensor:
            scaled = (groups * _ratio(new, norms)[..., None]).view(across.shape)
            return scaled if self.along == "rows" else scaled.mT

        return norms, rebuild


@dataclass(frozen=True, eq=False)
class Labels:
    """Any grouping: labels (entries,) int64 in 0..groups-1, one for every entry of the tensor, on its device.

    Raises ValueError for labels that are negative or not int64, and in `key` for a tensor of another size.

    >>> Labels(torch.tensor([0, 1, 0])).split(torch.tensor([[[3.0, 1.0, -4.0]]]))[0]
    tensor([[5., 1.]])
    """

    labels: Tensor
    groups: int = field(init=False)

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or self.labels.dtype != torch.int64 or int(self.labels.min()) < 0:
            raise ValueError(
                f"Labels are one int64 of at least 0 for each entry; got {self.labels.dtype} of shape "
                f"{tuple(self.labels.shape)}"
            )
        object.__setattr__(self, "groups", int(self.labels.max()) + 1)

    @property
    def free_columns(self) -> bool:
        return False

    def key(self, shape: tuple[int, ...]) -> tuple[int, int]:
        flat = Entries().key(shape)
        if flat[1] != self.labels.numel():
            raise ValueError(f"{self.labels.numel()} labels do not fit a tensor of shape {tuple(shape)}")
        return flat

    def count(self, rows: int, columns: int) -> int:
        return self.groups

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        index = self.labels.expand(x.shape[0], -1)
        scale = _scale(x)
        squares = (x / scale).square().flatten(1)
        norms = torch.zeros(x.shape[0], self.groups, dtype=x.dtype, device=x.device).scatter_add_(1, index, squares)
        norms = norms.sqrt() * scale[:, 0]
        return norms, lambda new: x * _ratio(new, norms).gather(1, index).view_as(x)


@dataclass(frozen=True)
class Tied:
    """Matrices that share groups: group g is what all of them have at g, so that it goes from all of them at once.

    seen: how each matrix has its groups, in order; default: the neurons of a gated MLP, as rows of gate and up and
    columns of down. A point is a list of as many tensors, in `SFW` a group with joint=True. Raises ValueError in
    `count` for another number of matrices, and for matrices of unlike numbers of groups.

    >>> x = [torch.tensor([[[3.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[4.0, 0.0]]])]
    >>> Tied().split(x)[0]
    tensor([[5., 1.]])
    """

    seen: tuple[Groups, ...] = (Groups(), Groups(), Groups(1, "columns"))

    @property
    def free_columns(self) -> bool:
        return False

    def key(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return matrix_of(shape)

    def count(self, keys: Sequence[tuple[int, int]]) -> int:
        """The number of groups that matrices of these sizes share."""
        if len(keys) != len(self.seen):
            raise ValueError(
                f"{len(self.seen)} matrices share groups; got {len(keys)}: make them one group, joint=True"
            )
        counts = {each.count(*each.key(key)) for each, key in zip(self.seen, keys, strict=True)}
        if len(counts) > 1:
            raise ValueError(f"Matrices {list(keys)} have {sorted(counts)} groups, and must have as many each to share")
        return counts.pop()

    def split(self, parts: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], list[Tensor]]]:
        """The profile of parts (problems, rows, columns), one each, and what makes parts of another profile."""
        found = [each.split(part) for each, part in zip(self.seen, parts, strict=True)]
        norms = reduce(torch.hypot, [own for own, _ in found])
        return norms, lambda new: [rebuild(own * _ratio(new, norms)) for own, rebuild in found]


def _scale(x: Tensor) -> Tensor:
    """The power of two at the largest entry of each problem, (problems, 1, 1).

    No square of x / scale overflows, and none that counts vanishes; dividing by it rounds nothing.
    """
    peak = x.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
    return peak / (2 * peak.frexp().mantissa)


def _ratio(new: Tensor, old: Tensor) -> Tensor:
    """new / old, 0 where a group is zero and so has no direction."""
    return torch.where(old > 0, new / old, torch.zeros_like(new))
