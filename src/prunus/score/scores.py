"""How much each weight matters: criteria that keep what scores best, (out, in) float32, higher is kept.

    magnitude   S_ij = |W_ij|
    wanda       S_ij = |W_ij| * ||X_j||_2
    ria         S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^(1/2)

    random      S_ij uniform in [0, 1)

A new criterion is one function and one `__all__` entry: everything there can be named in recipes. Which scores are
compared with which is the pattern's affair (`patterns`), how many are kept the allocation's (`allocations`).
"""

from __future__ import annotations

import warnings
import zlib

import torch
from torch import Tensor

from prunus.layers import Layer
from prunus.score.criterion import Criterion, criterion, scaling

__all__ = ["magnitude", "random", "ria", "wanda"]


@scaling()
def magnitude(layer: Layer) -> Tensor | None:
    """|W_ij|, (out, in) float32.

    >>> magnitude(Layer("fc", torch.tensor([[-2.0, 1.0]]))).tolist()
    [[2.0, 1.0]]
    """
    return None


@scaling(needs="norms", compare="row")
def wanda(layer: Layer) -> Tensor | None:
    """|W_ij| * ||X_j||_2, (out, in) float32   (Sun et al. 2024, Eq. 1).

    The paper compares within output rows: `Unstructured("row")`. A layer that saw no token (an expert nobody visited)
    gets its magnitude, with a warning. Raises ValueError when the layer has no inputs, or they hold NaN or Inf.

    >>> inputs = Inputs(2)
    >>> inputs.add_(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
    >>> wanda(Layer("fc", torch.tensor([[-2.0, 1.0]]), inputs)).tolist()
    [[10.0, 1.0]]
    """
    return norms_of(layer, "wanda")


@criterion(needs="norms")
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


def random(seed: int = 0) -> Criterion:
    """Uniform float32 numbers drawn from (seed, layer name): random pruning, the same at each look at a layer.

    >>> random(seed=1)(Layer("fc", torch.ones(2, 3))).shape
    torch.Size([2, 3])
    """

    @criterion()
    def random(layer: Layer) -> Tensor:
        # torch's CPU generator reads the lower 32 bits of a seed alone: both numbers are hashed into these.
        generator = torch.Generator().manual_seed(zlib.crc32(layer.name.encode(), seed % 2**32))
        return torch.rand(layer.weight.shape, generator=generator).to(layer.weight.device)

    return random


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
