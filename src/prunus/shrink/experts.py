"""Experts that go by what the router and they make of the tokens that they are given (REAP; Lasby et al. 2025).

    S_j = mean over the tokens x routed to expert j of  g_j(x) ||f_j(x)||_2         g: the gate, f: the expert's output

What has a row for each expert goes with it, in the module that holds stack and router: rows of the router, its biases,
what corrects them. Nothing is fitted afterwards: the tokens of an expert that is gone go to those that are next. Where
a router first chooses groups of experts (DeepSeek-V3), as many go of each group, and those that stay keep theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunus.layers import scan
from prunus.machine import Precision
from prunus.patterns import keep_largest
from prunus.shrink.language import left_of, rebuilt, resized_config, run_hooked

__all__ = ["expert_saliency", "experts_left", "remove_experts"]


@torch.no_grad()
def expert_saliency(
    model: Any,
    tokens: Tensor,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
) -> dict[str, Tensor]:
    """Name of a module with stacked experts -> S (experts,) float64; 0 for an expert that saw no token.

    tokens: (samples, length) int64. The model runs where it is, or on `device`, as a whole. Raises ValueError for a
    model without stacked experts, and for those that are not called with hidden states, chosen experts and their gates.
    """
    sums = {name: _Sums(torch.zeros(size, 2, dtype=torch.float64)) for name, size in _stacks(model).items()}
    place = torch.device(device) if device is not None else next(model.parameters()).device
    hooks = [(model.get_submodule(name), each.hook(name)) for name, each in sums.items()]
    run_hooked(model, hooks, tokens, place=place, batch_size=batch_size, precision=precision)
    return {name: each.found[:, 0] / each.found[:, 1].clamp_min(1) for name, each in sums.items()}


@torch.no_grad()
def remove_experts(
    model: Any,
    tokens: Tensor,
    share: float,
    *,
    device: torch.device | str | None = None,
    batch_size: int = 8,
    precision: Precision = "fp32",
) -> Any:
    """A smaller model without that share of the experts of every block, those of least S; as many stay in each.

    Raises ValueError as `expert_saliency`, for a share by which none goes, where fewer would be left than a token goes
    to, where groups of a router would not be left alike, and where the config does not say how many there are.
    """
    stay, size = experts_left(model, share)
    groups, _ = _groups(model)
    found = expert_saliency(model, tokens, device=device, batch_size=batch_size, precision=precision)
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, score in found.items():
        own = [keep_largest(each[None], stay // groups)[0] for each in score.float().view(groups, -1)]
        kept = torch.cat(own).nonzero()[:, 0]
        for key, axis in _rows(model, name, size):
            state[key] = state[key].index_select(axis, kept.to(state[key].device))
    return rebuilt(model, resized_config(model, size, stay, state, "experts"), state)


class _Sums:
    """Of every expert the sum of g ||f||, and for how many tokens; found: (experts, 2)."""

    def __init__(self, found: Tensor) -> None:
        self.found = found
        self.busy = False

    def hook(self, name: str) -> Callable[..., None]:
        """One that asks the module itself what each chosen expert makes of its tokens, by gates that are 1."""

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if self.busy:
                return
            if len(args) != 3 or not all(isinstance(each, Tensor) for each in args) or args[1].is_floating_point():
                raise ValueError(f"shrink.experts: '{name}' is not called with hidden states, experts and gates")
            self.busy = True
            self._add_(module, *args)
            self.busy = False

        return before

    def _add_(self, module: nn.Module, hidden: Tensor, index: Tensor, gates: Tensor) -> None:
        for slot in range(index.shape[1]):
            one = index[:, slot : slot + 1]
            out = module(hidden, one, torch.ones_like(gates[:, :1]))  # (tokens, hidden)
            worth = gates[:, slot].double() * torch.linalg.vector_norm(out.double(), dim=-1)
            seen = torch.stack([worth, torch.ones_like(worth)], 1).cpu()
            known = one[:, 0].cpu() < len(self.found)  # some routers name one more, for tokens of nobody
            self.found.index_add_(0, one[:, 0].cpu()[known], seen[known])


def experts_left(model: Any, share: float) -> tuple[int, int]:
    """How many experts of a block stay without that share of them, and how many there are; the model may be empty."""
    sizes = set(_stacks(model).values())
    if len(sizes) > 1:
        raise ValueError(f"shrink.experts: blocks of {sorted(sizes)} experts; one number for all is what configs say")
    (size,) = sizes
    stay, chosen = left_of("experts", "experts of a block", size, share), _chosen_at_once(model)
    if stay < chosen:
        raise ValueError(f"shrink.experts: {stay} of {size} experts would be left, and a token goes to {chosen}")
    groups, opened = _groups(model)
    least = groups * max(2, math.ceil(chosen / opened))  # a group is worth its two best
    if groups > 1 and (stay % groups or stay < least):
        raise ValueError(
            f"shrink.experts: {stay} of {size} experts would be left, and the router takes them from {opened} of "
            f"{groups} groups of one size; give a share that leaves a multiple of {groups}, {least} at least"
        )
    return stay, size


def _stacks(model: Any) -> dict[str, int]:
    """Name of a module with stacked experts -> how many, at least one such module."""
    own = {each.view.parameter for each in scan(model) if each.view.index is not None}
    if not own:
        raise ValueError(f"shrink.experts: {type(model).__name__} has no stacked experts; leave it out")
    return {name.rpartition(".")[0]: model.get_parameter(name).shape[0] for name in sorted(own)}


def _chosen_at_once(model: Any) -> int:
    """How many experts a token goes to."""
    said = model.config.get_text_config().to_dict()
    keys: Sequence[str] = ("num_experts_per_tok", "moe_topk", "top_k_experts", "num_experts_per_token", "moe_k")
    return next((int(said[key]) for key in keys if isinstance(said.get(key), int)), 1)


def _groups(model: Any) -> tuple[int, int]:
    """How many groups of experts, one after another, a router chooses among, and how many it opens for a token."""
    said = model.config.get_text_config().to_dict()
    groups = said.get("n_group") or 1
    return groups, said.get("topk_group") or groups


def _rows(model: Any, stack: str, size: int) -> list[tuple[str, int]]:
    """(key, axis) of the tensors with an entry for each expert: of the stack, and of what stands beside it."""
    above = stack.rpartition(".")[0]
    parent, found = model.get_submodule(above), list[tuple[str, int]]()
    for child, module in parent.named_children():
        tensors = {f"{above}.{child}.{key}": each for key, each in module.state_dict().items()}
        if tensors and all(size in each.shape for each in tensors.values()):
            found += [(key, list(each.shape).index(size)) for key, each in tensors.items()]
    own = {key: each for key, each in parent.state_dict().items() if "." not in key}
    return found + [(f"{above}.{key}", list(each.shape).index(size)) for key, each in own.items() if size in each.shape]
