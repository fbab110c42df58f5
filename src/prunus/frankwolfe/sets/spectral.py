"""Matrices seen through their singular values: all of them exactly, or the leading ones by subspace iteration."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.frankwolfe.sets.protocol import Rebuild, matrix_of
from prunus.frankwolfe.sets.subspace import Triple


@dataclass(frozen=True)
class Spectrum:
    """The singular values of the matrix (out, in * kernel).

    `split` is a full singular value decomposition, the reference (it makes the host wait for a GPU); `split_leading`
    takes the K leading ones as `subspace` follows them, for what is done in every step.

    >>> Spectrum().split(torch.tensor([[[0.0, 2.0], [1.0, 0.0]]]))[0]
    tensor([[2., 1.]])
    """

    @property
    def free_columns(self) -> bool:
        return True

    def key(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return matrix_of(shape)

    def count(self, rows: int, columns: int) -> int:
        return min(rows, columns)

    def split(self, x: Tensor) -> tuple[Tensor, Rebuild]:
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        # Vectors of singular value 0 are arbitrary, but orthonormal: any profile may be put in their place.
        return s, lambda new: (u * new[:, None]) @ vt

    def split_leading(self, leading: Triple) -> tuple[Tensor, Rebuild]:
        """As `split`, of the leading singular values only, (problems, k), which are given with their vectors."""
        u, s, v = leading
        return s, lambda new: (u * new[:, None]) @ v.mT
