"""What methods share whose sparsity is learnt: a parameter group of their own, and an end at the sparsity asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.during.choose import keep_global
from prunus.masks import Masks
from prunus.patterns import kept_of
from prunus.train import During

_logger = logging.getLogger(__name__)

_FREE = {"constraint": None, "joint": False, "strength": 0.0}  # in no feasible set, and without proximal steps


def check_rates(method: During, *, lr: float | None = None, weight_decay: float | None = None) -> None:
    """Raise ValueError for a learning rate that is not above 0, or a weight decay below 0; None is left to the run."""
    if not (lr is None or lr > 0) or not (weight_decay is None or weight_decay >= 0):
        raise ValueError(
            f"{type(method).__name__} needs lr above 0 and weight_decay of at least 0, or None for those of the "
            f"optimizer; got lr={lr}, weight_decay={weight_decay}"
        )


def train_with_(
    optimizer: Optimizer, parameters: Iterable[nn.Parameter], *, lr: float | None, weight_decay: float | None
) -> None:
    """Give the optimizer a group of these parameters; None is what its first group has.

    A decay that is given is all: none is decoupled beside it. Sets and proximal steps of the optimizer are for weights.
    """
    first = optimizer.param_groups[0]
    decays = {"weight_decay": first.get("weight_decay", 0.0) if weight_decay is None else weight_decay}
    if "decoupled_decay" in optimizer.defaults:
        decays["decoupled_decay"] = first["decoupled_decay"] if weight_decay is None else 0.0
    free = {key: value for key, value in _FREE.items() if key in optimizer.defaults}
    rate = float(first["lr"]) if lr is None else lr
    optimizer.add_param_group({"params": list(parameters), "lr": rate, **decays, **free})


@torch.no_grad()
def finish_learned_(
    method: During, effective: Mapping[str, Tensor], scores: Mapping[str, Tensor], sparsity: float | None
) -> Masks:
    """Write the effective weights into the model under the final masks, which are returned.

    scores: positive where the method itself keeps a weight. sparsity: keep the largest scores of all layers, exactly so
    many; None keeps what the method keeps. The share that the method itself prunes goes to its buffer `reached`; where
    that is known, the end was made before: gates and thresholds are in the weights, and the masks are those.
    """
    if not method.get_buffer("reached").isnan():
        method.enforce_()
        return method.masks()
    scores = method.within(scores)
    learned = {name: score > 0 for name, score in scores.items()}
    total = sum(score.numel() for score in scores.values())
    reached = 1 - sum(int(mask.sum()) for mask in learned.values()) / total
    _logger.info("%s reached a sparsity of %.4f by itself, asked for %s", type(method).__name__, reached, sparsity)
    method.get_buffer("reached").fill_(reached)
    for name, weight in effective.items():
        method.pruned_parameters[name].copy_(weight)
    method.set_masks_(learned if sparsity is None else keep_global(scores, kept_of(total, sparsity)))
    method.enforce_()
    return method.masks()
