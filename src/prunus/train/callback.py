"""Masks in a training that is not ours: a callback of transformers' Trainer, and of what is built on it (TRL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from prunus.machine import local_part
from prunus.masks import Hold, Masks, own_name, unwrapped


class HoldMasks(TrainerCallback):
    """Keeps pruned entries at zero after every optimizer step of a Trainer, and logs their model's sparsity.

    masks: of the model that is trained in full or in part; adapters of peft take `mask_adapters` instead. Every log has
    `sparsity`, the share of zeros in the masked parameters as they are. The end of training checks the masks: raises
    ValueError where something else filled one.

    >>> trainer = Trainer(model, callbacks=[HoldMasks(masks)])  # doctest: +SKIP
    """

    def __init__(self, masks: Masks) -> None:
        self.masks = masks
        self.handle: Hold | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hold the masks on the Trainer's optimizer, inside what accelerate wraps around it."""
        optimizer = kwargs["optimizer"]
        self.handle = self.masks.hold(kwargs["model"], getattr(optimizer, "optimizer", optimizer))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Add the sparsity to the row that is logged, and to the history."""
        found = _sparsity(kwargs["model"], self.masks)
        for row in ([] if logs is None else [logs], state.log_history[-1:]):
            for each in row:
                each["sparsity"] = found

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go, and check."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        self.masks.check(kwargs["model"])


@torch.no_grad()
def _sparsity(model: nn.Module, masks: Masks) -> float:
    """Share of zeros in the masked parameters, of this process's part of them."""
    named, known = unwrapped(model).named_parameters(remove_duplicate=False), {own_name(name) for name in masks}
    weights = [local_part(each) for name, each in named if own_name(name) in known]
    zeros = sum(each.numel() - int(each.count_nonzero()) for each in weights)
    return zeros / max(1, sum(each.numel() for each in weights))
