"""Criteria: what one is, and those that keep what scores best; scores are (out, in) float32, higher is kept.

    magnitude   S_ij = |W_ij|
    wanda       S_ij = |W_ij| * ||X_j||_2
    ria         S_ij = (|W_ij| / sum_k |W_kj| + |W_ij| / sum_k |W_ik|) * ||X_j||_2^(1/2)
    random      S_ij uniform in [0, 1)

A criterion is a value that carries what its callers must know:

    solve     (layer, pattern, kept) -> new weight and mask
    score     (layer) -> S, where the mask is the pattern's best of S; None for criteria that choose inside one layer
    needs     what calibration must learn of the layer's inputs: nothing "", their "norms", their "gram" matrix
    compare   within what scores compete, where neither pattern nor allocation says it: each "row", or the "layer"

`prune`, `stream` and recipes take these values, and know none by name. A plain function `layer -> score` is one as well
(`criterion_of`); `criterion` and `scaling` make one of a function where it is written. A new criterion is one function
and one `__all__` entry: recipes find it there. Where zeros may lie is the pattern's affair (`patterns`), how many
entries are kept the allocation's (`allocations`).
"""

from __future__ import annotations

import inspect
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from prunus.layers import Inputs, Layer
from prunus.patterns import mask_scaled, scaled

if TYPE_CHECKING:
    from prunus.patterns import Pattern

__all__ = ["magnitude", "random", "ria", "wanda"]  # those that recipes name; `prunus.score` exports the rest too

Needs = Literal["", "norms", "gram"]
Compare = Literal["row", "layer"]
Score = Callable[[Layer], Tensor]
Solve = Callable[[Layer, "Pattern", int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Criterion:
    """How one layer is pruned, and what must be known of that before.

    solve: (layer, pattern, kept) -> the new weight (out, in) in the weight's dtype, and its mask (out, in) bool.
    score: (layer) -> (out, in) float32, higher is kept; None where masks are not those of one score.
    needs: "" (the weight alone), "norms" or "gram" of the inputs; nothing else is measured.
    compare: "row" or "layer", within which its scores compete by default.
    nests: whether its mask is one choice of the pattern among scores of the whole layer, as that of a score is: then it
        can stay within earlier masks.

    >>> Criterion(lambda layer, pattern, kept: magnitude.solve(layer, pattern, kept), compare="row").needs
    ''
    """

    solve: Solve
    score: Score | None = None
    needs: Needs = ""
    compare: Compare = "layer"
    name: str = "criterion"
    nests: bool = False

    @property
    def stays(self) -> bool:
        """Whether it can stay within earlier masks."""
        return self.nests or self.score is not None

    def __call__(self, layer: Layer) -> Tensor:
        """The score (out, in) float32, higher is kept. Raises ValueError for criteria that have none."""
        if self.score is None:
            raise ValueError(f"{self.name} chooses inside one layer and has no score: call its solve")
        return self.score(layer)


def criterion(*, needs: Needs = "", compare: Compare = "layer") -> Callable[[Score], Criterion]:
    """Makes a criterion of a score: it keeps what scores best, as it is, and zeroes the rest.

    >>> @criterion(compare="row")
    ... def square(layer):
    ...     return layer.weight.float() ** 2
    >>> square.solve(Layer("fc", torch.tensor([[-2.0, 1.0]])), Unstructured("row"), 1)[0].tolist()
    [[-2.0, 0.0]]
    """

    def make(score: Score) -> Criterion:
        score = torch.no_grad()(score)

        @torch.no_grad()
        def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
            mask = pattern.mask(score(layer), kept, name=layer.name)
            return torch.where(mask, layer.weight, 0.0), mask

        return _documented(Criterion(solve, score, needs, compare, _name(score)), score)

    return make


def scaling(
    *, needs: Needs = "", compare: Compare = "layer"
) -> Callable[[Callable[[Layer], Tensor | None]], Criterion]:
    """Makes a criterion of the function that says s in the score |W_ij| * s_j; None is 1.

    s: (in,) float32, nothing negative. The bits are those of the score written out; on a GPU, for N:M and rows, the
    weight is read once and no scores are written.

    >>> @scaling()
    ... def first(layer):
    ...     return torch.tensor([2.0, 1.0])
    >>> first(Layer("fc", torch.tensor([[-2.0, 1.0]]))).tolist()
    [[4.0, 1.0]]
    """

    def make(scale: Callable[[Layer], Tensor | None]) -> Criterion:
        @torch.no_grad()
        def score(layer: Layer) -> Tensor:
            return scaled(layer.weight, scale(layer))

        @torch.no_grad()
        def solve(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
            mask = mask_scaled(pattern, layer.weight, scale(layer), kept, name=layer.name)
            return torch.where(mask, layer.weight, 0.0), mask

        return _documented(Criterion(solve, score, needs, compare, _name(scale)), scale)

    return make


def criterion_of(value: Criterion | Score) -> Criterion:
    """The criterion that a value or a plain function `layer -> score` is.

    What a plain function needs is what it reads: it is called once on a small layer that was calibrated. One that reads
    `layer.inputs` compares within rows, as Wanda does, because its scores are in units of the inputs; one that does not
    compares within the layer. `criterion(needs=..., compare=...)` says otherwise.

    Raises ValueError for what is neither, and for a function that fails on the small layer.

    >>> criterion_of(lambda layer: layer.weight.abs().float() * layer.inputs.norms).needs
    'norms'
    """
    if isinstance(value, Criterion):
        return value
    if not callable(value) or required(value) != 1:
        made = "; it makes one: call it" if callable(value) and required(value) == 0 else ""
        raise ValueError(
            f"{_name(value)} is no criterion{made}. A criterion is a Criterion, such as wanda or sparsegpt(), or a "
            "function layer -> score; a solver (layer, pattern, kept) is one as Criterion(solver, needs=...)"
        )
    read = _read(value)
    needs: Needs = "gram" if "gram" in read else "norms" if read else ""
    return criterion(needs=needs, compare="row" if read else "layer")(value)


def required(function: Any) -> int:
    """How many arguments a function insists on."""
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = inspect.signature(function).parameters.values()
    return sum(each.default is inspect.Parameter.empty and each.kind in positional for each in found)


def _name(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


def _documented(made: Criterion, source: Any) -> Criterion:
    """The criterion with the docstring and the name of the function that it was made of."""
    vars(made).update(__doc__=source.__doc__, __name__=made.name, __module__=source.__module__)
    return made


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

    The exponent 1/2 is the default of the authors' released code. Their permutation of input channels for N:M, which
    has to permute what makes the inputs as well, is missing. An all-zero row or column scores zero. A layer that
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
        drawn = torch.rand(layer.weight.shape, generator=generator, dtype=torch.float32)
        return drawn.to(layer.weight.device)

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


class _Watched:
    """Inputs that remember what was asked of them."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, self.read = inputs, set[str]()

    def __getattr__(self, name: str) -> Any:
        self.read.add(name)
        return getattr(self.inputs, name)


def _read(score: Score) -> set[str]:
    """What a score reads of the inputs."""
    inputs = Inputs(4, gram=True)
    inputs.add_(torch.eye(4))
    watched = _Watched(inputs)
    try:
        with torch.no_grad():
            score(Layer("a small layer", torch.arange(1.0, 17.0).view(4, 4), cast(Inputs, watched)))
    except Exception as error:
        raise ValueError(
            f"{_name(score)} fails on a layer of 4 x 4 weights ({error}), so what it needs cannot be seen: say it, "
            f"criterion(needs=..., compare=...)({_name(score)})"
        ) from error
    return watched.read
