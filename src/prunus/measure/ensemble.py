"""The prediction ensemble: the mean of the members' probabilities, at m times the cost of one network.

    p(y | x) = (1 / m) sum_i softmax(f_i(x))_y

The upper reference for a soup, which averages weights instead. It is scored like any network, against the true labels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.machine import Precision
from prunus.measure.accuracy import Accuracy, accuracy


class Ensemble(nn.Module):
    """Several classifiers as one, whose logits are the logarithm of the members' mean probabilities.

    members: modules that return logits (batch, classes) or an object with `logits`. The forward gives (batch, classes)
    float32, so that its softmax is the mean softmax. Raises ValueError without members.

    >>> Ensemble([nn.Linear(4, 3), nn.Linear(4, 3)])(torch.zeros(2, 4)).exp().sum(1).shape
    torch.Size([2])
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        if not members:
            raise ValueError("an ensemble needs at least one member")
        self.members = nn.ModuleList(members)

    @classmethod
    def of(cls, model: nn.Module, states: Sequence[Mapping[str, Tensor]]) -> Ensemble:
        """The ensemble of copies of `model` with these state dicts; each is a model in memory."""
        members: list[nn.Module] = []
        for state in states:
            member = copy.deepcopy(model)
            member.load_state_dict(state)
            members.append(member)
        return cls(members)

    def forward(self, x: Any) -> Tensor:
        """log of the mean probabilities, (batch, classes) float32."""
        outs = [member(x) for member in self.members]
        logits = torch.stack([out if isinstance(out, Tensor) else out.logits for out in outs])  # (members, batch, ..)
        return logits.float().log_softmax(-1).logsumexp(0) - math.log(len(outs))


def ensemble_accuracy(
    members: Sequence[nn.Module],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    precision: Precision = "fp32",
    bins: int = 15,
) -> Accuracy:
    """All that `accuracy` measures, of the members' mean softmax against the true labels.

    batches: (inputs, labels (batch,) int64). Members are run one after another on each batch, in eval mode, and end in
    the mode in which they came; `precision` is that of their products. Raises ValueError as `Ensemble` and `accuracy`.

    >>> ensemble_accuracy([a, b], batches).top1
    """
    return accuracy(Ensemble(members), batches, precision=precision, bins=bins)
