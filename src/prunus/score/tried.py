"""What a model loses when its layers keep so many entries each: tried, with each layer solved at that count beforehand.

    layer, count ─▶ solved once, kept on the CPU      counts ─▶ put into the model ─▶ KL(dense ‖ pruned) of its outputs

Allocations that ask for a loss (`evopress`) are given this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from prunus.layers import Inputs, Layer, View
from prunus.patterns import Pattern
from prunus.score.criteria import Criterion


class Tried:
    """The loss of counts: (layer name -> entries kept, share of the batches) -> mean KL, in nats.

    parameters: of the model, by name; they hold what was tried last until `restore_`. inputs: view name -> what the
    criterion needs of the dense layers. how: criterion and pattern. outputs: number of a batch -> the model's logits
    (n, classes), as it is, and how many batches there are. known: what was tried before, which is not tried again;
    what is tried is added.

    What each layer is at a count depends on the dense inputs alone, so it is solved once, the first time it is asked
    for: a copy of the layer on the CPU for every count that is tried. The dense outputs are kept where they are made.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        views: Sequence[View],
        inputs: Mapping[str, Inputs],
        how: tuple[Criterion, Pattern],
        outputs: tuple[Callable[[int], Tensor], int],
        *,
        known: MutableMapping[str, float] | None = None,
    ) -> None:
        self.parameters, self.views, self.inputs = parameters, {view.name: view for view in views}, inputs
        self.criterion, self.pattern = how
        self.outputs, self.batches = outputs
        self.known = {} if known is None else known
        self.dense = {view.name: view.matrix(parameters[view.parameter]).to("cpu", copy=True) for view in views}
        self.placed: dict[str, int] = {}
        self.solved: dict[tuple[str, int], Tensor] = {}
        self.expected = [self._log_p(batch) for batch in range(self.batches)]

    @torch.no_grad()
    def __call__(self, counts: Mapping[str, int], share: float = 1.0) -> float:
        """The mean over the outputs of the first batches, at least one."""
        asked = json.dumps([share, *sorted(counts.items())])
        if asked not in self.known:
            self.known[asked] = self._loss(counts, range(max(1, round(share * self.batches))))
        return self.known[asked]

    @torch.no_grad()
    def restore_(self) -> None:
        """Put the dense weights back."""
        for name in self.placed:
            self._write_(name, self.dense[name])
        self.placed.clear()

    def _loss(self, counts: Mapping[str, int], batches: range) -> float:
        for name, view in self.views.items():
            unit = self.pattern.unit(view.shape, name=name)
            self._place_(name, counts[name] // unit * unit)
        lost = 0.0
        for batch in batches:
            lost += float(_divergence(self.expected[batch], self._log_p(batch)))
        return lost / len(batches)

    def _log_p(self, batch: int) -> Tensor:
        with torch.no_grad():
            return self.outputs(batch).float().log_softmax(-1)

    def _place_(self, name: str, kept: int) -> None:
        if self.placed.get(name) == kept:
            return
        if (name, kept) not in self.solved:
            device = self.parameters[self.views[name].parameter].device
            layer = Layer(name, self.dense[name].to(device), self.inputs.get(name))
            self.solved[name, kept] = self.criterion.solve(layer, self.pattern, kept)[0].cpu()
        self._write_(name, self.solved[name, kept])
        self.placed[name] = kept

    def _write_(self, name: str, matrix: Tensor) -> None:
        parameter = self.parameters[self.views[name].parameter]
        self.views[name].write_(parameter, matrix.to(parameter.device))


def rows_of(out: Any) -> Tensor:
    """What a model's outputs are compared by, (n, classes): its logits, or without a head its last hidden state.

    >>> rows_of({"logits": torch.zeros(2, 3, 5)}).shape
    torch.Size([6, 5])
    """
    if isinstance(out, Mapping):  # transformers' own
        out = out["logits"] if "logits" in out else out["last_hidden_state"]
    return out.flatten(0, -2)


def _divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """The mean KL of rows of log-probabilities (n, classes); a class that the dense model hides (-inf) adds nothing."""
    p = dense.exp()
    return p.mul_((dense - pruned).masked_fill_(p == 0, 0.0)).sum() / len(dense)
