"""Soups: several networks of one shape and one mask become one, by averaging their tensors.

    theta = sum_i weight_i * theta_i,   weight_i >= 0,  sum_i weight_i = 1

Members are plain state dicts (name -> tensor). They share their zeros because they were pruned once, before they were
trained apart; that is checked, never assumed. How far apart members are is in `geometry`, which averages
recipes name in `averages`, checkpoints on disk in `save`. BatchNorm statistics are averaged like everything
else and fit the averaged weights badly: count them anew (`batchnorm.recalibrate_`) before an average is measured.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunus.masks import Masks
from prunus.train import masks_by_magnitude, seeded

State = Mapping[str, Tensor]


@torch.no_grad()
def average(
    states: Sequence[State], weights: Sequence[float] | None = None, *, masks: Sequence[Masks] | None = None
) -> dict[str, Tensor]:
    """The weighted mean of each tensor over the members, in their dtype and on the first member's device.

    states: one state dict a member; names, shapes and dtypes agree. weights: one a member, >= 0, sum 1; None: equal.
    masks: those of each member; they must be equal, and zeros under them are +0.0 in the result. Sums are float32
    (float64 for float64). Integer tensors must be equal, but for BatchNorm's counters, which are the first member's.
    Raises ValueError for members or weights that do not fit, and masks that differ or do not hold.

    >>> average([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([3.0, 0.0])}])
    {'w': tensor([2., 0.])}
    """
    shares = check_weights(weights, len(states))
    check_alike(states)
    if masks is not None:
        check_masks(states, masks)
    return {name: mean_tensor(name, [state[name] for state in states], shares) for name in states[0]}


@torch.no_grad()
def average_and_reprune(
    states: Sequence[State],
    masks: Sequence[Masks],
    weights: Sequence[float] | None = None,
    *,
    select: Callable[[State, float], Masks] = masks_by_magnitude,
) -> tuple[dict[str, Tensor], Masks]:
    """The mean of members whose masks may differ, pruned again to the sparsity that each of them has, and its masks.

    The baseline IMP-RePrune (Zimmer et al. 2024): a mean of different masks is denser than any member. select: (name
    -> mean of a masked parameter, sparsity) -> Masks; by default the largest |w| over all of them together.
    Raises ValueError as `average`, and for masks of different parameters or numbers of entries kept.

    >>> state, masks = average_and_reprune([a, b], [masks_a, masks_b])
    """
    _check_count(states, masks)
    for place, (state, each) in enumerate(zip(states, masks, strict=True)):
        _check_zeros(place, state, each)
        if each.keys() != masks[0].keys() or _kept(each) != _kept(masks[0]):
            raise ValueError(
                f"member {place} keeps {_kept(each)} entries of {len(each)} parameters, member 0 {_kept(masks[0])} of "
                f"{len(masks[0])}: members that are pruned again together have one sparsity"
            )
    mean = average(states, weights)
    chosen = select({name: mean[name] for name in masks[0]}, masks[0].sparsity)
    for name, mask in chosen.items():
        mean[name].masked_fill_(~mask.to(mean[name].device), 0.0)
    return mean, chosen


@dataclass(frozen=True)
class Greedy:
    """Which members a greedy soup took (in the order of taking), its score, and the score of every single member."""

    members: tuple[int, ...]
    score: float
    singles: tuple[float, ...]


def greedy_members(count: int, score: Callable[[tuple[int, ...]], float]) -> Greedy:
    """The members of a greedy soup (Wortsman et al. 2022, recipe 1), chosen by scores alone.

    score: members -> how good their uniform average is (higher is better), on validation data. Members are tried from
    best to worst, of equals the earlier first, and one stays when the average is then at least as good as before.
    A score that is NaN is the worst. Calls `score` 2 * count - 1 times. Raises ValueError for no member.

    >>> greedy_members(3, lambda members: -abs(sum(members) / len(members) - 0.5)).members
    (0, 1)
    """
    if count < 1:
        raise ValueError("a soup needs at least one member")
    singles = tuple(_ordered(score((place,))) for place in range(count))
    first, *others = sorted(range(count), key=lambda place: -singles[place])  # stable: ties by place
    chosen, best = (first,), singles[first]
    for place in others:
        tried = _ordered(score((*chosen, place)))
        if tried >= best:
            chosen, best = (*chosen, place), tried
    return Greedy(chosen, best, singles)


def greedy(
    states: Sequence[State], score: Callable[[dict[str, Tensor]], float], *, masks: Sequence[Masks] | None = None
) -> tuple[Greedy, dict[str, Tensor]]:
    """The greedy soup of the members, and its state.

    score: an average -> how good it is (higher is better), on validation data, never on test; it is given a state of
    its own, and may recalibrate BatchNorm in it: what `score` wrote into the soup's state stays in the result.
    Holds two averages in memory. Raises ValueError as `average`, and what `score` raises.

    >>> chosen, state = greedy([{"w": torch.zeros(1)}, {"w": torch.ones(1)}], lambda state: float(state["w"]))
    >>> chosen.members
    (1,)
    """
    check_alike(states)
    if masks is not None:
        check_masks(states, masks)
    kept: dict[str, Any] = {"score": -math.inf, "size": 0, "state": None}

    def score_of(members: tuple[int, ...]) -> float:
        state = average([states[place] for place in members])
        found = _ordered(score(state))
        # As greedy_members decides: the first of the best singles, then every larger soup that is no worse.
        if found > kept["score"] or (found == kept["score"] and len(members) > kept["size"]) or kept["state"] is None:
            kept.update(score=found, size=len(members), state=state)
        return found

    chosen = greedy_members(len(states), score_of)
    return chosen, kept["state"]


def learn_weights(
    states: Sequence[State],
    model: nn.Module,
    batches: Callable[[int], Any],
    loss: Callable[[nn.Module, Any], Tensor],
    *,
    steps: int = 50,
    lr: float = 0.1,
    seed: int = 0,
) -> list[float]:
    """Weights for `average` that gradient descent finds on held-out batches: softmax(a), a (members,) from zeros, Adam.

        dL/dweight_i = <dL/dtheta, theta_i>,   theta = sum_i weight_i * theta_i

    so a step costs one backward pass at the average, and no stack of the members is built. batches, loss: as `train`
    takes them. model: gives the architecture and, by its mode, whether BatchNorm uses each batch's statistics (train)
    or the members' averaged ones (eval, whose own slope is left out); it is not changed. seed: of torch's generators,
    by which dropout draws; they are as before afterwards. Members without a tensor weigh alike. Raises ValueError for
    members that do not fit together, for less than a step and a rate that is not above 0, FloatingPointError for a
    loss that is not finite.

    >>> layer, states = nn.Linear(2, 2), [nn.Linear(2, 2).state_dict() for _ in range(3)]
    >>> batch = torch.ones(4, 2), torch.zeros(4, dtype=torch.long)
    >>> len(learn_weights(states, layer, lambda step: batch, classification_loss(), steps=2))
    3
    """
    check_alike(states)
    if steps < 1:
        raise ValueError(f"learning the weights takes at least 1 step; got {steps}")
    if not lr > 0:
        raise ValueError(f"learning the weights takes a rate lr above 0; got {lr}")
    if not states[0]:
        return list(check_weights(None, len(states)))
    mixed = copy.deepcopy(model)
    parameters = {name: parameter.requires_grad_() for name, parameter in mixed.named_parameters()}
    device = next(iter(parameters.values())).device
    logits = torch.zeros(len(states), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    with seeded(seed, device):
        for step in range(steps):
            shares = logits.softmax(0)
            mixed.load_state_dict(average(states, _exact(shares)))
            mixed.zero_grad()
            value = loss(mixed, _to(batches(step), device))
            value.backward()  # pyright: ignore[reportUnknownMemberType]
            if not math.isfinite(value.item()):
                raise FloatingPointError(f"the loss of the average is {value.item()} in step {step}: lower lr")
            optimizer.zero_grad()
            shares.backward(torch.tensor([_slope(parameters, state) for state in states], dtype=torch.float64))
            optimizer.step()
    return _exact(logits.softmax(0))


@torch.no_grad()
def mix(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i weights_i * tensors_i for weights that add up to 1 (negative ones too), in the dtype of the first tensor.

    Computed as t_b + sum_i weights_i (t_i - t_b) with b of the largest weight: entries on which the tensors agree come
    out as they are (zeros as +0.0, infinities too), and members that are close lose no digits. Sums are float32 or
    better. Neither shapes nor weights are checked.

    >>> mix([torch.tensor([1.0, 7.0]), torch.tensor([2.0, 7.0])], [2.0, -1.0])
    tensor([0., 7.])
    """
    dtype = tensors[0].dtype if tensors[0].dtype.itemsize > 4 else torch.float32
    heaviest = max(range(len(weights)), key=lambda place: abs(weights[place]))
    base = tensors[heaviest].to(tensors[0].device, dtype)
    total = base.clone()
    for place, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
        if weight == 0 or place == heaviest:
            continue
        other = tensor.to(base.device, dtype)
        total.add_((other - base).masked_fill_(other == base, 0.0), alpha=weight)
    return total.add_(0.0).to(tensors[0].dtype)  # -0.0 + 0.0 is +0.0


def mean_tensor(name: str, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The mean of one tensor, or of the same piece of it, over the members: `mix` if it is floating.

    Integer tensors have no mean: they must be equal, or be BatchNorm's counters `num_batches_tracked`, and the first is
    copied. Raises ValueError naming the tensor.

    >>> mean_tensor("codes", [torch.tensor([3]), torch.tensor([3])], [0.5, 0.5])
    tensor([3])
    """
    first = tensors[0]
    if first.is_floating_point() or first.is_complex():
        return mix(tensors, weights)
    for place, tensor in enumerate(tensors):
        if not name.endswith("num_batches_tracked") and not torch.equal(first, tensor.to(first.device)):
            raise ValueError(
                f"{name!r} is stored as {first.dtype} and differs between members 0 and {place}: integers have no "
                "mean. Average before quantising"
            )
    return first.clone()


def check_weights(weights: Sequence[float] | None, members: int) -> tuple[float, ...]:
    """The weights of a mean of `members` networks, checked; equal ones for None. Raises ValueError.

    >>> check_weights(None, 4)
    (0.25, 0.25, 0.25, 0.25)
    """
    if members < 1:
        raise ValueError("an average needs at least one member")
    shares = tuple(float(weight) for weight in weights) if weights is not None else (1 / members,) * members
    if len(shares) != members:
        raise ValueError(f"{len(shares)} weights for {members} members; give one each")
    if not all(share >= 0 for share in shares) or not abs(math.fsum(shares) - 1) <= 1e-6:
        raise ValueError(f"weights of a mean are at least 0 and add up to 1; got {list(shares)}")
    return shares


def check_alike(states: Sequence[State]) -> None:
    """Raise ValueError unless all members have the first one's names, shapes and dtypes.

    >>> check_alike([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    """
    if not states:
        raise ValueError("an average needs at least one member")
    first = states[0]
    for place, state in enumerate(states):
        lacking, extra = first.keys() - state.keys(), state.keys() - first.keys()
        if lacking or extra:
            raise ValueError(
                f"member {place} has {len(state)} tensors and member 0 has {len(first)}: it lacks {len(lacking)} and "
                f"has {len(extra)} of its own, first {min(lacking | extra)!r}. Average copies of one network"
            )
        for name, tensor in first.items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise ValueError(
                    f"{name!r} is {tuple(tensor.shape)} {tensor.dtype} in member 0 and {tuple(state[name].shape)} "
                    f"{state[name].dtype} in member {place}: cast or convert one of them first"
                )


def check_masks(states: Sequence[State], masks: Sequence[Masks]) -> None:
    """Raise ValueError unless all members have one mask and are zero under it.

    >>> check_masks([{"w": torch.tensor([0.0, 1.0])}], [Masks({"w": torch.tensor([False, True])})])
    """
    _check_count(states, masks)
    for place, (state, each) in enumerate(zip(states, masks, strict=True)):
        for name in sorted(each.keys() ^ masks[0].keys()):
            raise ValueError(f"{name!r} has a mask in member {place if name in each else 0} only; {_ANYWAY}")
        for name, mask in masks[0].items():
            if mask.shape != each[name].shape:
                raise ValueError(f"{name!r} has masks of shapes {tuple(mask.shape)} and {tuple(each[name].shape)}")
            differ = int((mask != each[name].to(mask.device)).sum())
            if differ:
                raise ValueError(
                    f"the masks of {name!r} differ: member 0 keeps {int(mask.sum())} of {mask.numel()} entries, member "
                    f"{place} keeps {int(each[name].sum())}, and they disagree on {differ}; {_ANYWAY}"
                )
        _check_zeros(place, state, each)


_ANYWAY = "average members of one pruned network, or prune their mean again (average_and_reprune)"


def _check_count(states: Sequence[State], masks: Sequence[Masks]) -> None:
    if not states or len(masks) != len(states):
        raise ValueError(f"{len(masks)} masks for {len(states)} members; give those of each member")


def _check_zeros(place: int, state: State, masks: Masks) -> None:
    for name, mask in masks.items():
        if name not in state or state[name].shape != mask.shape:
            found = f"has shape {tuple(state[name].shape)}" if name in state else "is missing"
            raise ValueError(f"{name!r} {found} in member {place}; its mask has shape {tuple(mask.shape)}")
        wrong = int(((state[name] != 0) & ~mask.to(state[name].device)).sum())
        if wrong:
            raise ValueError(
                f"{name!r} of member {place} has {wrong} nonzero weights under its mask: train with masks.hold(...)"
            )


def _kept(masks: Masks) -> int:
    return sum(kept for kept, _ in masks.table().values())


def _ordered(score: float) -> float:
    return -math.inf if math.isnan(score) else float(score)


def _exact(shares: Tensor) -> list[float]:
    values: list[float] = shares.detach().tolist()
    return [value / math.fsum(values) for value in values]


def _slope(parameters: Mapping[str, Tensor], state: State) -> float:
    """<dL/dtheta, theta_i> over all parameters, summed in float64."""
    products = (
        torch.sum(parameter.grad.double() * state[name].to(parameter.device).double())
        for name, parameter in parameters.items()
        if parameter.grad is not None
    )
    return float(sum(products, torch.zeros((), dtype=torch.float64)))


def _to(batch: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(batch, device)
