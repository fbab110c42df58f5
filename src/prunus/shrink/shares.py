"""What a model's sizes alone say of what can go, before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from prunus.checkpoint import empty_model
from prunus.shrink.experts import experts_left
from prunus.shrink.language import blocks_without, changed, heads_of, left_of, pairs_left, with_pairs

__all__ = ["check_shares", "narrowed"]


def check_shares(model: Any, *, blocks: int = 0, experts: float = 0.0, heads: float = 0.0, width: float = 0.0) -> None:
    """Raise ValueError for blocks and shares that cannot go; the model may be empty.

    That is more than there is, a share by which none goes, heads that no size of the model goes by, and sizes that the
    config refuses: saved, such a model would not load.

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
        if not width:
            _check_said("heads", pairs, stay, lambda count: with_pairs(model.config, count))
    if width:
        size = model.get_input_embeddings().weight.shape[1]
        if size == config.get_text_config().hidden_size:  # else embeddings are of another width
            stay, few = left_of("width", "entries of the hidden states", size, width), config
            _check_said("width", size, stay, lambda count: changed(few, {"hidden_size": count}))


def narrowed(model: Any, *, heads: float = 0.0, neurons: float = 0.0, width: float = 0.0) -> Any:
    """An empty model of the sizes that these shares leave, as far as names in the config say them; checked before, but
    for neurons: raises ValueError for a share by which none goes.

    >>> narrowed(model, neurons=0.25).config.ffn_dim
    6
    """
    config = with_pairs(model.config, pairs_left(model.config, heads)) if heads else model.config
    said = config.get_text_config().to_dict()
    mlps = [key for key in ("intermediate_size", "ffn_dim") if neurons and isinstance(said.get(key), int)]
    changes = {key: left_of("neurons", "neurons of an MLP", said[key], neurons) for key in mlps}
    if width:
        changes["hidden_size"] = left_of("width", "entries of the hidden states", said["hidden_size"], width)
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
