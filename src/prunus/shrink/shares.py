"""What a model's sizes alone say of what can go, before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from prunus.blocks import find_blocks
from prunus.checkpoint import empty_model
from prunus.layers import View, find_layers
from prunus.shrink.experts import experts_left
from prunus.shrink.language import (
    blocks_without,
    changed,
    heads_of,
    left_of,
    other_attention,
    pairs_left,
    resizings,
    with_pairs,
)

__all__ = ["check_shares", "narrowed"]

_MLPS = ("intermediate_size", "ffn_dim")


def check_shares(
    model: Any,
    *,
    blocks: int = 0,
    experts: float = 0.0,
    heads: float = 0.0,
    neurons: float = 0.0,
    width: float = 0.0,
) -> None:
    """Raise ValueError for blocks and shares that cannot go; the model may be empty.

    That is more than there is, a share by which none goes, heads that no size of the model goes by or whose query, key
    and value are one matrix, MLPs that are experts alone, hidden states that stacked experts read or whose size the
    config cannot say apart from that of heads, and sizes that the config refuses: saved, such a model would not load.

    >>> check_shares(model, blocks=0)
    """
    blocks_without(model, blocks)
    if experts:
        experts_left(model, experts)
    config = model.config
    if heads:
        stay, pairs = pairs_left(config, heads), heads_of(config)[1]
        config = with_pairs(config, stay)
        _check_heads(model, config)
        _check_matrices(model, *heads_of(model.config))
        if not width:
            _check_said("heads", pairs, stay, lambda count: with_pairs(model.config, count))
    if neurons:
        _check_plain(model)
    if width:
        size = model.get_input_embeddings().weight.shape[1]
        if size == config.get_text_config().hidden_size:  # else embeddings are of another width
            stay, few = left_of("width", "entries of the hidden states", size, width), config
            _check_width(empty_model(few, model.dtype), size, stay)
            _check_said("width", size, stay, lambda count: changed(few, {"hidden_size": count}))


def narrowed(model: Any, *, heads: float = 0.0, neurons: float = 0.0, width: float = 0.0) -> Any:
    """An empty model of the sizes that these shares leave, as far as names in the config say them; checked before, but
    for neurons: raises ValueError for a share by which none goes.

    >>> narrowed(model, neurons=0.25).config.ffn_dim
    6
    """
    config = with_pairs(model.config, pairs_left(model.config, heads)) if heads else model.config
    said = config.get_text_config().to_dict()
    mlps = [key for key in _MLPS if neurons and isinstance(said.get(key), int)]
    changes = {key: left_of("neurons", "neurons of an MLP", said[key], neurons) for key in mlps}
    if width:
        changes["hidden_size"] = left_of(
            "width", "entries of the hidden states", config.get_text_config().hidden_size, width
        )
    return empty_model(changed(config, changes), model.dtype)


def _check_heads(model: Any, config: Any) -> None:
    """Raise ValueError where a config of fewer heads makes a model of the same sizes, or none."""
    now = [each.shape for each in model.state_dict().values()]
    try:
        fewer = [each.shape for each in empty_model(config, model.dtype).state_dict().values()]
    except ValueError:
        fewer = now
    if fewer == now:
        raise ValueError(
            f"shrink.heads: {type(model).__name__} has matrices of one size, however many heads its config says; "
            "leave it out"
        )


def _check_matrices(model: Any, heads: int, pairs: int, size: int) -> None:
    """Raise ValueError where no block has a matrix each for queries, keys, values and what reads them."""
    hidden = model.config.get_text_config().hidden_size
    wanted = Counter([(heads * size, hidden), (pairs * size, hidden), (pairs * size, hidden), (hidden, heads * size)])
    if not any(wanted <= Counter(view.shape for view in views) for views in _by_block(model)):
        raise other_attention(model)


def _check_plain(model: Any) -> None:
    """Raise ValueError where the MLPs are stacked experts alone: no other matrix reads so many neurons."""
    views = [view for views in _by_block(model) for view in views]
    said = model.config.get_text_config().to_dict()
    sizes = {size for key in _MLPS if isinstance(size := said.get(key), int)}
    if any(view.index is not None for view in views) and not any(
        view.index is None and view.shape[1] in sizes for view in views
    ):
        raise ValueError(
            f"shrink.neurons: {type(model).__name__} has no plain MLP of {sorted(sizes)} neurons, but experts: take "
            "shrink.experts"
        )


def _check_width(model: Any, size: int, stay: int) -> None:
    """Raise ValueError where no number in the config makes hidden states smaller and leaves all else as it is."""
    if any(view.index is not None for view in find_layers(model)):
        raise ValueError(
            f"shrink.width: the stacked experts of {type(model).__name__} read hidden states, and are not made "
            "narrower; leave it out"
        )
    before = {name: each.shape for name, each in model.state_dict().items()}
    inside = tuple(f"{name}." for name in find_blocks(model))

    def only(name: str, shape: Iterable[int]) -> bool:
        """A matrix of a block reads hidden states or adds to them; none does both."""
        changes = [(old, new) for old, new in zip(before[name], shape, strict=True) if old != new]
        return set(changes) <= {(size, stay)} and (len(changes) < 2 or not name.startswith(inside))

    for config in resizings(model.config, size, stay):
        after = {name: each.shape for name, each in empty_model(config, model.dtype).state_dict().items()}
        if after.keys() == before.keys() and all(only(name, shape) for name, shape in after.items()):
            return
    raise ValueError(
        f"shrink.width: no number in the config of {type(model).__name__} says that hidden states have {size} entries "
        "and leaves heads and neurons as they are; leave it out"
    )


def _by_block(model: Any) -> list[list[View]]:
    views = find_layers(model)
    return [[view for view in views if view.name.startswith(f"{name}.")] for name in find_blocks(model)]


def _check_said(key: str, size: int, stay: int, config_of: Callable[[int], Any]) -> None:
    """Raise ValueError for a number that the config refuses, with the next one that it takes."""
    reason = _refusal(config_of(stay))
    if reason is None:
        return
    near: Iterable[int] = sorted(range(1, size), key=lambda count: (abs(count - stay), -count))
    other = next((count for count in near if _refusal(config_of(count)) is None), None)
    mend = "leave it out" if other is None else f"a share of {1 - other / size:.4g} leaves {other}"
    raise ValueError(
        f"shrink.{key}: {stay} of {size} would be left, which the config refuses ({reason.rstrip('.')}); {mend}"
    )


def _refusal(config: Any) -> str | None:
    """What the class of a config has against it, which ends its saving."""
    try:
        config.validate()
    except StrictDataclassError as error:
        return str(error.__cause__ or error)
    return None
