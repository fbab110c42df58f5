"""Methods that prune while training, in recipes: their names, and what does not go with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator

from prunus.run.names import methods
from prunus.run.recipe.pruning import Prune

__all__ = ["MethodName", "check_during", "is_set"]


def _during(value: Any) -> Any:
    """One method by name with the options that its class takes."""
    if value is None:
        return None
    choice = methods.check(value)
    return {choice: {}} if isinstance(choice, str) else choice


MethodName = Annotated[
    dict[str, dict[str, Any]] | None,
    BeforeValidator(_during, json_schema_input_type=str | dict[str, dict[str, Any] | None] | None),
]


def is_set(section: BaseModel, key: str) -> bool:
    return getattr(section, key) != type(section).model_fields[key].default


def check_during(
    during: Mapping[str, Mapping[str, Any]], prune: Prune, own: Sequence[str], others: Sequence[str] = ()
) -> None:
    """Refuse what a method chooses itself, the keys `own` of prune and others; a pattern, where it knows none; and what
    it does not take, by making it."""
    found = [*others, *(f"prune.{key}" for key in own if is_set(prune, key))]
    if found:
        raise ValueError(f"{found[0]}: a method that prunes during training chooses itself; leave it out")
    name, options = next(iter(during.items()))
    knows = methods.knows(name, "pattern")
    if is_set(prune, "pattern") and not (knows and isinstance(prune.pattern, str)):
        raise ValueError(f"prune.pattern: {name} prunes single entries; leave it out")
    try:
        methods.make({name: dict(options)}, prune.sparsity, pattern=prune.pattern)
    except TypeError as error:
        raise ValueError(f"during.{name}: {error}") from None
