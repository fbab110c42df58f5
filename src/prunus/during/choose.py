"""Which weights stay, over a whole model, exactly: by one selection, or layer by layer as an allocation says.

`keep_global` may stand inside a step: it never waits for the device. `keep_allocated` is for the host between steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from prunus.patterns import Pattern, Unstructured, keep_largest, kept_of
from prunus.score import Allocation, Count, allocation_of, check_within, counts_under

_ANY = Unstructured("layer")


@torch.no_grad()
def magnitudes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """|w| of each tensor, float32, in its shape.

    >>> magnitudes({"a": torch.tensor([-2.0])})
    {'a': tensor([2.])}
    """
    values = [weight.detach() for weight in weights.values()]
    scores = torch._foreach_abs(values)  # pyright: ignore[reportPrivateImportUsage]
    return {name: score.float() for name, score in zip(weights, scores, strict=True)}


@torch.no_grad()
def keep_global(scores: Mapping[str, Tensor], kept: int) -> dict[str, Tensor]:
    """Masks (bool, the scores' shapes) of the `kept` largest of all scores; ties go to earlier tensors and entries.

    The scores are laid end to end, a copy of all of them, so that one selection on the device decides.

    >>> keep_global({"a": torch.tensor([1.0, 4.0]), "b": torch.tensor([3.0])}, 2)
    {'a': tensor([False,  True]), 'b': tensor([True])}
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    parts = keep_largest(flat[None], kept, wait=False)[0].split([score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), parts, strict=True)}


@torch.no_grad()
def keep_allocated(
    scores: Mapping[str, Tensor],
    sparsity: float,
    allocation: Allocation | Count,
    pattern: Pattern = _ANY,
) -> dict[str, Tensor]:
    """Masks (bool (out, in)) of the best scores of each layer under a pattern.

    scores: layer name -> (out, in) float32, -inf where an earlier choice pruned for good. Of single entries exactly
    `kept_of(all entries, sparsity)` stay: what an allocation's rounding in each layer leaves of the total, the largest
    layers make up. Raises ValueError where the pattern cannot keep as many entries that are not -inf.

    >>> keep_allocated({"a": torch.tensor([[1.0, 2.0, 3.0]]), "b": torch.tensor([[1.0, 2.0, 3.0]])}, 0.5, uniform)
    {'a': tensor([[False,  True,  True]]), 'b': tensor([[False, False,  True]])}
    """
    counts = counts_under(pattern, scores, sparsity, allocation)
    if not isinstance(pattern, Unstructured):
        found = {name: pattern.mask(score, counts[name], name=name) for name, score in scores.items()}
        for name, mask in found.items():
            check_within(pattern, scores[name], mask, name=name)
        return found
    room = {name: int((score > -torch.inf).sum()) for name, score in scores.items()}
    missing = kept_of(sum(score.numel() for score in scores.values()), sparsity) - sum(counts.values())
    for name in sorted(room, key=lambda name: -room[name]):  # stable: ties by order
        change = max(-counts[name], min(missing, room[name] - counts[name]))
        counts[name] += change
        missing -= change
    return {name: pattern.mask(score, counts[name], name=name) for name, score in scores.items()}


def without_inputs(allocation: Allocation | Count) -> Allocation:
    """The allocation. Raises ValueError for one that looks at what layers receive: training does not measure that.

    >>> without_inputs(uniform).reads
    ''
    """
    found = allocation_of(allocation)
    if found.reads in ("inputs", "loss"):
        raise ValueError(
            f"{found.name} looks at what the layers receive or return, which training does not measure: take another"
        )
    return found
