"""The recipes of the members of a soup."""

from __future__ import annotations

from typing import Any, TypeVar

from prunus.run.recipe.shared import Recipe

__all__ = ["check_members", "member_of", "order_of"]

_OF_TRAIN = {"weight_decay", "augment"}  # what members vary in the section `train`
AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def member_of(recipe: AnyRecipe, place: int | None) -> AnyRecipe:
    """The recipe of the retraining of a member of a soup; None: of a run without members, as the recipe itself says it.

    Members whose seed differs in all have seeds `recipe.apart` apart.
    """
    if place is None or recipe.soup is None:
        return recipe
    own = recipe.soup.vary.of(place)
    if recipe.soup.vary.seed == "all":
        own["seed"] = recipe.drawn + recipe.apart * place
    if own.keys() & {"epochs", "steps"}:
        own = {"epochs": None, "share": None, "steps": None} | own
    changed: dict[str, Any] = {"seed": own["seed"]} if "seed" in own and "seed" in type(recipe).model_fields else {}
    for name, keys in (("train", own.keys() & _OF_TRAIN), ("retrain", own.keys() - _OF_TRAIN)):
        section: Any = getattr(recipe, name, None)
        if section is not None:
            known = keys & type(section).model_fields.keys()
            changed[name] = section.model_copy(update={key: own[key] for key in known})
    return recipe.model_copy(update=changed)


def order_of(recipe: Recipe, place: int | None) -> int | None:
    """The seed of the images' order where that alone differs."""
    if place is None or recipe.soup is None or recipe.soup.vary.seed != "order":
        return None
    return recipe.drawn + recipe.apart * place


def check_members(recipe: Recipe) -> None:
    """Refuse members of a soup that are the same."""
    seen: dict[str, int] = {}
    for place in range(recipe.soup.members if recipe.soup is not None else 0):
        text = member_of(recipe, place).model_dump_json(exclude={"soup"}) + str(order_of(recipe, place))
        if text in seen:
            raise ValueError(
                f"soup.vary: members {seen[text] + 1} and {place + 1} would be the same; give as many values as "
                "members, or seed: all"
            )
        seen[text] = place
