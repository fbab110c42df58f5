"""How a method takes part in training: the hooks that `train` calls, and the masks such methods share.

    attach ─▶ [ before_step ─▶ weights, loss + penalty, backward, gradients, optimizer, follow ─▶ after_step ] ─▶ finish
                   host                                inside the step                                host

The hooks inside the step are recorded once when the step is captured as a CUDA graph, and replayed: no branch there
may depend on data or on the step, and nothing may wait for the device. What changes with the step is written, in place,
into buffers by the hooks on the host. One method a file; this one holds what they have in common.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunus.layers import Lookup, View
from prunus.machine import imported
from prunus.masks import Masks, pack, unpack
from prunus.patterns import keep_largest_of_all, kept_of
from prunus.score import check_known


@dataclass(frozen=True)
class Plan:
    """What a method may know of the run: its steps, those of an epoch, the prunable layers, a step's micro batches,
    and the masks under which it trains (of no parameter, where there are none).

    Epochs need no hook of their own: `before_step(step)` begins one where step % epoch_steps == 0.
    """

    steps: int
    epoch_steps: int
    views: tuple[View, ...]
    accumulate: int = 1
    masks: Masks = field(default_factory=lambda: Masks({}))


class During(nn.Module):
    """A method that takes part in training. Every hook does nothing unless a method defines it.

    Buffers and parameters of the module are saved with the run's checkpoints, so everything that must survive a kill is
    one of them. Parameters of its own are trained when `attach` adds them to the optimizer.

    >>> class Small(During):
    ...     def attach(self, model, optimizer, plan):
    ...         self.watched = [*model.parameters()]
    ...     def penalty(self):
    ...         return 1e-4 * sum(each.square().sum() for each in self.watched)
    """

    def check(self, steps: int, epoch_steps: int) -> None:
        """Raises ValueError for options with which so many steps leave nothing to do; asked before any work, and by
        `attach`."""

    def attach(self, model: nn.Module, optimizer: Optimizer, plan: Plan) -> None:
        """Called once, before the first step and before a resumed run loads the buffers."""

    def weights(self) -> dict[str, Tensor]:
        """Inside the step: parameter name -> the weight that the forward uses instead. Gradients flow through it."""
        return {}

    def penalty(self) -> Tensor | None:
        """Inside the step: a scalar added to the loss."""
        return None

    def gradients(self) -> None:
        """Inside the step, after the backward pass and clipping: edits the gradients in place."""

    def follow(self) -> None:
        """Inside the step, after the optimizer's."""

    def before_step(self, step: int) -> None:
        """On the host, before step 0, 1, ... of the run."""

    def after_step(self, step: int) -> None:
        """On the host, after step 0, 1, ... of the run."""

    def finish(self) -> Masks | None:
        """After the last step: writes the final weights into the model, and returns its masks if it makes any."""
        return None

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        """Of what `attach` makes, says that it is not there yet."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if "optimizer" in vars(self):
                raise
            raise AttributeError(
                f"{error}, which a method has from its training on: call train(..., during=[method]) first"
            ) from None

    # Masks that change while training: kept as buffers, so that a captured step sees the change.

    def hold_masks(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        views: tuple[View, ...],
        *,
        within: Masks | None = None,
        adapted: Mapping[str, nn.Parameter] | None = None,
        packed: bool = False,
    ) -> None:
        """Register a mask that keeps everything for each prunable parameter; called by `attach`.

        within: the masks of the training (`plan.masks`). What they prune no held mask keeps, then or later.
        adapted: frozen weights by the names they had before adapters moved them, for methods that prune what adapters
        make of weights. packed: eight entries a byte, for methods that look at their masks on the host alone.

        Raises ValueError when nothing is prunable, the masks of the training have other shapes, only some experts of a
        stacked parameter are prunable, or the model has adapters and the method does not know of them.
        """
        parameters = dict(model.named_parameters()) | dict(adapted or {})
        if adapted is None and any(isinstance(each, _factors()) for each in model.modules()):
            raise ValueError(
                f"{type(self).__name__} prunes weights that are trained themselves, and {type(model).__name__} has "
                "adapters: call merge_ on its adaptation first, or take ELSA, which prunes what LoRA makes of weights"
            )
        names = list(dict.fromkeys(view.parameter for view in views))
        if not names:
            raise ValueError(f"{type(self).__name__} found no prunable layer; check include and exclude")
        for name in names:
            seen = sum(view.shape[0] * view.shape[1] for view in views if view.parameter == name)
            if seen != parameters[name].numel():
                raise ValueError(
                    f"'{name}' is prunable in part ({seen} of {parameters[name].numel()} entries); "
                    f"{type(self).__name__} takes whole parameters: include or exclude all experts of the stack"
                )
        # Plain containers: the model's parameters must not become this module's.
        self.pruned_parameters = {name: parameters[name] for name in names}
        self.optimizer = optimizer
        known = within or {}
        self.given = Masks({name: known[name].to(parameters[name].device) for name in names if name in known})
        check_known(self.given, parameters)
        self.kept = nn.Module()
        for place, (name, parameter) in enumerate(self.pruned_parameters.items()):
            mask = self.given[name].clone() if name in self.given else torch.ones_like(parameter, dtype=torch.bool)
            self.kept.register_buffer(f"mask{place}", pack(mask.flatten()) if packed else mask)

    def zero_when_resumed(self) -> None:
        """Zero pruned weights whenever a checkpoint, which holds no frozen ones, is loaded; called by `attach`."""
        self.register_load_state_dict_post_hook(_enforce_)

    def held(self) -> Mapping[str, Tensor]:
        """Parameter name -> its bool mask: the buffer itself, or made of it at each look where masks are packed."""
        buffers = dict(zip(self.pruned_parameters, self.kept.buffers(), strict=True))

        def mask(name: str) -> Tensor:
            buffer, shape = buffers[name], self.pruned_parameters[name].shape
            return buffer if buffer.dtype == torch.bool else unpack(buffer, shape.numel()).view(shape)

        return Lookup(buffers, mask)

    def masks(self) -> Masks:
        """A copy of the masks as they are."""
        return Masks({name: mask.clone() for name, mask in self.held().items()})

    def kept_at(self, sparsity: float) -> int:
        """How many entries stay at a sparsity, of all layers together; asked by `attach`.

        Raises ValueError where the masks of the training leave fewer.
        """
        kept = kept_of(sum(each.numel() for each in self.pruned_parameters.values()), sparsity)
        left = sum(int(mask.sum()) for mask in self.held().values()) if self.given else kept
        if kept > left:
            raise ValueError(f"{kept} entries should stay, but earlier masks left only {left}: raise the sparsity")
        return kept

    def within(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameter name -> its scores, -inf where the masks of the training prune."""
        return {
            name: score.masked_fill(~self.given[name], -torch.inf) if name in self.given else score
            for name, score in scores.items()
        }

    @torch.no_grad()
    def set_masks_(self, masks: Mapping[str, Tensor]) -> None:
        """Overwrite the held masks, in place, but for what the masks of the training prune."""
        for name, buffer in zip(self.pruned_parameters, self.kept.buffers(), strict=True):
            mask = masks[name] & self.given[name] if name in self.given else masks[name]
            buffer.copy_(pack(mask.flatten()) if buffer.dtype == torch.uint8 else mask)

    @torch.no_grad()
    def enforce_(self) -> None:
        """Zero pruned weights and the optimizer's state there (momentum, Adam's moments), without waiting for them."""
        for name, mask in self.held().items():
            pruned = ~mask
            self.pruned_parameters[name].masked_fill_(pruned, 0.0)
            self._clear_(name, pruned)

    @torch.no_grad()
    def clear_state_(self) -> None:
        """Zero the optimizer's state of pruned weights, but not the weights."""
        for name, mask in self.held().items():
            self._clear_(name, ~mask)

    def _clear_(self, name: str, pruned: Tensor) -> None:
        parameter = self.pruned_parameters[name]
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                value.masked_fill_(pruned, 0.0)

    def gradients_of(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Parameter name -> (weight, gradient), both without history, of those prunable parameters that got one."""
        parameters = self.pruned_parameters.items()
        return {name: (each.detach(), each.grad) for name, each in parameters if each.grad is not None}

    def prune_by_magnitude_(self, sparsity: float) -> Masks:
        """Keep the largest |w| of all layers, zero the others, and return the masks: the end of many methods."""
        self.set_masks_(masks_by_magnitude(self.pruned_parameters, sparsity, within=self.given))
        self.enforce_()
        return self.masks()


def _enforce_(method: Any, _: object) -> None:
    method.enforce_()


def _factors() -> tuple[type, ...]:
    return imported("prunus.adapt.adapters", "Factors")


@torch.no_grad()
def masks_by_magnitude(
    weights: Mapping[str, Tensor], sparsity: float, *, within: Mapping[str, Tensor] | None = None
) -> Masks:
    """Masks of the largest |w| over all given tensors together; exactly `kept_of(total, sparsity)` entries stay.

    within: earlier masks, by the same names; what they prune comes last.

    >>> masks_by_magnitude({"a": torch.tensor([1.0, -3.0]), "b": torch.tensor([2.0, 0.0])}, 0.5).table()
    {'a': (1, 2), 'b': (1, 2)}
    """
    scores = {
        name: weight.detach().float().abs().flatten(1) if weight.ndim > 1 else weight.detach().float().abs()[None]
        for name, weight in weights.items()
    }
    for name, mask in (within or {}).items():
        scores[name].masked_fill_(~mask.view(scores[name].shape), -1.0)
    kept = keep_largest_of_all(scores, kept_of(sum(score.numel() for score in scores.values()), sparsity))
    return Masks({name: mask.view(weights[name].shape) for name, mask in kept.items()})
