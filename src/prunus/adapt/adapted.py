"""What adapters make of frozen weights, W + s BA, for methods that move it from outside the forward pass.

    rows ──▶ W + s BA, a tile of rows      R, a tile of rows ──▶ A.grad += s B^T R,  B.grad += s R A^T

Nothing of the weight's size is formed unless `value` is asked for. How adapters compute is in `adapters`, how they are
put in place and merged in `sites`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunus.adapt.adapters import AdaptedWeight, Factors, matrices
from prunus.adapt.effective import effective_weight, factor_gradients, tiles
from prunus.adapt.sites import LINEAR
from prunus.masks import own_name


@dataclass(frozen=True, eq=False)
class Adapted:
    """A frozen weight and the factors beside it. parameter: as it is stored; its matrices are (out, in), or a stack.

    >>> found = adapted(model)["layers.0.weight"]
    >>> found.rows(slice(0, 2)).shape
    torch.Size([2, 4])
    """

    parameter: nn.Parameter
    factors: Factors
    transposed: bool

    @property
    def weight(self) -> Tensor:
        """W as (out, in) or (experts, out, in), in its dtype; shares the parameter's memory."""
        return self.matrices(self.parameter.detach())

    def matrices(self, stored: Tensor) -> Tensor:
        """Anything in the parameter's shape, seen as its matrices are."""
        return matrices(stored, stacked=self.factors.A.ndim == 3, transposed=self.transposed)

    def stored(self, values: Tensor) -> Tensor:
        """Anything in the matrices' shape, seen as the parameter is stored."""
        return (values.mT if self.transposed else values).view(self.parameter.shape)

    @torch.no_grad()
    def rows(self, rows: slice) -> Tensor:
        """Some rows (of a stack: some matrices) of W + s BA, float32, not rounded to W's dtype."""
        A, B, scale = self.factors.A, self.factors.B, self.factors.scale or 1.0
        return ((B[rows] * scale) @ (A[rows] if A.ndim == 3 else A)).add_(self.weight[rows])

    def value(self) -> Tensor:
        """All of W + s BA, float32, as matrices."""
        return self.rows(slice(None))

    @torch.no_grad()
    def add_gradients_(self, tile: Callable[[slice], Tensor]) -> None:
        """Adds what R, the gradient of W + s BA, is to A and B, where they have one. tile: rows -> R, float32."""
        A, B = self.factors.A, self.factors.B
        if A.grad is None or B.grad is None:
            return
        dA, dB = factor_gradients(tile, self.factors.terms(self.weight))
        A.grad.add_(dA)
        B.grad.add_(dB)

    @torch.no_grad()
    def move_(self, tile: Callable[[slice], Tensor]) -> None:
        """Adds to W itself what is given for some rows, float32; A and B stay."""
        weight = self.weight
        for rows in tiles(weight):
            weight[rows] += tile(rows)

    @torch.no_grad()
    def fold_(self) -> None:
        """W becomes W + s BA, rounded as merging does, and B zero: merging then adds nothing."""
        weight = self.weight
        weight.copy_(effective_weight(self.factors.terms(weight)))
        self.factors.B.zero_()


def adapted(model: nn.Module) -> dict[str, Adapted]:
    """The weights of `model` that have adapters, by the name each had without.

    >>> sorted(adapted(model))[:1]
    ['layers.0.weight']
    """
    found: dict[int, tuple[str, Adapted]] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, LINEAR):
            each = Adapted(module.weight, module.factors, module.transposed)
            found.setdefault(id(module.weight), (f"{prefix}weight", each))
        elif isinstance(module, parametrize.ParametrizationList) and isinstance(adapter := module[0], AdaptedWeight):
            weight = module.original
            assert isinstance(weight, nn.Parameter)
            found.setdefault(id(weight), (own_name(path), Adapted(weight, adapter.factors, adapter.transposed)))
    return dict(found.values())
