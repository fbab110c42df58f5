"""How much each weight matters: a score is a function of one layer, (out, in) float32, higher is kept.

    magnitude   S_ij = |W_ij|
    wanda       S_ij = |W_ij| * ||X_j||_2
    ria         S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^(1/2)

A new criterion is one function and one `__all__` entry; recipes have a list of names of their own. Which scores are
compared with which is the pattern's affair (`patterns.py`), how many are kept the allocation's (`allocations.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from prunus.patterns import scaled

if TYPE_CHECKING:
    from prunus.layers import Layer

__all__ = ["Score", "magnitude", "random_score", "ria", "wanda"]

Score = Callable[["Layer"], Tensor]


@torch.no_grad()
def magnitude(layer: Layer) -> Tensor:
    """|W_ij|, (out, in) float32.

    >>> magnitude(Layer("fc", torch.tensor([[-2.0, 1.0]]))).tolist()
    [[2.0, 1.0]]
    """
    return scaled(layer.weight, None)


@torch.no_grad()
def wanda(layer: Layer) -> Tensor:
    """|W_ij| * ||X_j||_2, (out, in) float32   (Sun et al. 2024, Eq. 1).

    The paper compares within output rows: `Unstructured("row")`. A layer that saw no token (an expert nobody visited)
    gets its magnitude, with a warning. Raises ValueError when the layer has no inputs, or they hold NaN or Inf.

    >>> inputs = Inputs(2)
    >>> inputs.add_(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    >>> wanda(Layer("fc", torch.tensor([[-2.0, 1.0]]), inputs)).tolist()
    [[10.0, 1.0]]
    """
    return scaled(layer.weight, norms_of(layer, "wanda"))


@torch.no_grad()
def ria(layer: Layer) -> Tensor:
    """(|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^(1/2), (out, in) float32   (Zhang et al. 2024).

    The exponent 1/2 is the default of the authors' released code. An all-zero row or column scores zero. A layer that
    saw no token gets its magnitude, with a warning. Raises ValueError as `wanda`.

    >>> inputs = Inputs(2)
    >>> inputs.add_(torch.tensor([[4.0, 1.0]]))
    >>> ria(Layer("fc", torch.tensor([[-1.0, 1.0]]), inputs)).tolist()
    [[3.0, 1.5]]
    """
    norms = norms_of(layer, "ria")
    size = magnitude(layer)
    if norms is None:
        return size
    tiny = torch.finfo(torch.float32).tiny  # only keeps 0/0 out
    share = 1 / size.sum(0, keepdim=True).clamp_(min=tiny) + 1 / size.sum(1, keepdim=True).clamp_(min=tiny)
    return size.mul_(share).mul_(norms.sqrt())


def random_score(generator: torch.Generator) -> Score:
    """A score that draws uniform float32 numbers from `generator`: random pruning.

    Every call draws anew, so layers get different masks; the order of the layers decides which.

    >>> random_score(torch.Generator().manual_seed(0))(Layer("fc", torch.ones(2, 3))).shape
    torch.Size([2, 3])
    """

    def draw(layer: Layer) -> Tensor:
        numbers = torch.rand(layer.weight.shape, generator=generator, device=generator.device)
        return numbers.to(layer.weight.device)

    return draw


def warn_unseen(layer: Layer, method: str) -> None:
    """Warn that a layer saw no calibration token, so that `method` prunes it by magnitude."""
    warnings.warn(
        f"'{layer.name}' saw no calibration token (an expert that none was sent to?): {method} falls back to magnitude "
        "there. Calibrate on more text",
        stacklevel=4,
    )


def norms_of(layer: Layer, method: str) -> Tensor | None:
    """||X_j||_2 (in,) float32 on the weight's device; None, with a warning, when no token was seen."""
    if layer.inputs is None:
        raise ValueError(f"{method} needs the inputs of '{layer.name}': pass calibration batches, or use magnitude")
    if layer.inputs.tokens == 0:
        warn_unseen(layer, method)
        return None
    layer.inputs.check(layer.name)
    return layer.inputs.norms.to(layer.weight.device)
