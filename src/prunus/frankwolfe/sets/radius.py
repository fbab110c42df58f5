"""How large a feasible set is: by its radius, by its L2 diameter, or by a multiple of the initialisation's norm.

    Radius(r)          the radius itself
    Diameter(D)        the radius at which the L2 diameter is D
    Initial(c)         the radius at which the L2 diameter is 2 c E||W_init||_2

Norms belong to a parameter, by name, never to a shape: a BatchNorm's weight and bias have one shape and norms sqrt(C)
and 0. They come from closed forms, so that nothing is initialised again and no random number is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from prunus.frankwolfe.sets.ball import Ball
from prunus.layers import CONVOLUTIONS

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Radius:
    """The radius itself.

    >>> Radius(3.0).fit(k_support(2), [(4, 4)], [1.0]).radius
    3.0
    """

    value: float

    def fit(self, ball: Ball, shapes: Sequence[Sequence[int]], norms: Sequence[float]) -> Ball:
        """The ball of this size. shapes: of the tensors it constrains jointly; norms: their L2 norms at the start."""
        return Ball(ball.gauge, ball.seen, self.value)


@dataclass(frozen=True)
class Diameter:
    """The L2 diameter.

    >>> Diameter(4.0).fit(k_support(2), [(4, 4)], [1.0]).radius
    2.0
    """

    value: float

    def fit(self, ball: Ball, shapes: Sequence[Sequence[int]], norms: Sequence[float]) -> Ball:
        """As `Radius.fit`."""
        return ball.of_diameter(self.value, *shapes)


@dataclass(frozen=True)
class Initial:
    """L2 diameter = 2 * multiple * the initialisation's L2 norm (jointly: root of the sum of squares); 1 for norm 0.

    >>> Initial(10.0).fit(k_support(2), [(4, 4), (4,)], [3.0, 4.0]).radius
    50.0
    """

    multiple: float

    def fit(self, ball: Ball, shapes: Sequence[Sequence[int]], norms: Sequence[float]) -> Ball:
        """As `Radius.fit`."""
        return ball.of_diameter(2 * self.multiple * (math.hypot(*norms) or 1.0), *shapes)


Size = Radius | Diameter | Initial


def expected_norm(module: nn.Module, name: str) -> float:
    """The root of E||W||_2^2 of parameter `name` of a module as torch initialises it; 0 for what starts at zero.

    Linear and Conv: entries uniform in +-fan_in^-1/2, so E||W||^2 = numel / (3 fan_in): out/3 for the weight, whatever
    its groups and kernel, and out/(3 fan_in) for the bias. Norms' weights are ones, their biases zeros; embeddings are
    Gaussian. It is above E||W|| by a share of less than 1/(2 numel).
    Raises ValueError for other modules, whose norm must be measured before training.

    >>> round(expected_norm(nn.Conv2d(64, 128, 3), "weight"), 4)
    6.532
    """
    parameter = module.get_parameter(name)
    if isinstance(module, nn.Linear | CONVOLUTIONS[0] | CONVOLUTIONS[1] | CONVOLUTIONS[2]):
        if name in ("weight", "bias"):
            return math.sqrt(parameter.numel() / (3 * module.weight[0].numel()))
    elif isinstance(module, _NORMS):
        return math.sqrt(parameter.numel()) if name == "weight" else 0.0
    elif isinstance(module, nn.Embedding):
        padded = module.weight.shape[1] if module.padding_idx is not None else 0
        return math.sqrt(parameter.numel() - padded)
    raise ValueError(
        f"The initial norm of '{name}' in a {type(module).__name__} has no closed form here: measure it before "
        "training (constrained_groups: norms='measured')"
    )


def measured_norm(parameter: torch.Tensor) -> float:
    """The parameter's L2 norm as it is, summed in float64; waits for the device."""
    return float(torch.linalg.vector_norm(parameter.detach(), dtype=torch.float64))
