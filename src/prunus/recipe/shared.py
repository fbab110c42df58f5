"""What the recipes of every task have, and those of the members of their soups."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import model_validator

from prunus.recipe.plain import Strict
from prunus.recipe.pruning import Prune
from prunus.recipe.retraining import Retrain
from prunus.recipe.soups import Soup
from prunus.recipe.values import Device, Folder

__all__ = ["Recipe", "Save", "check_members", "member_of", "order_of"]

_OF_TRAIN = {"weight_decay", "augment"}  # what members of a soup vary in the section `train`


class Save(Strict):
    """How the model is written. packed: by its zeros, a bit a weight and the nonzeros; "zstd": compressed as well."""

    packed: bool | Literal["zstd"] = False


class Recipe(Strict):
    """What every task has; `parse` reads it as the recipe of a task, a classifier's if it has the key `images`.

    compile: the model's repeated blocks, by torch.compile. capture: training steps as a CUDA graph; "auto" on a GPU,
    where it can be done. save: whether the model is written.
    """

    model: str
    """Name, folder or file; 'embedded'; or a network such as resnet18."""
    device: Device = "auto"
    """auto, cpu, cuda or one GPU such as cuda:1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products."""
    compile: bool = False
    """Compile the model's blocks."""
    capture: Literal["auto"] | bool = "auto"
    """Record training steps as a CUDA graph."""
    prune: Prune | None = None
    retrain: Retrain | None = None
    soup: Soup | None = None
    out: Folder = "runs/run"
    """Run folder."""
    save: bool | Save = True
    """Whether the model is written."""

    @property
    def packed(self) -> bool | Literal["zstd"]:
        """Whether the saved model is packed."""
        return isinstance(self.save, Save) and self.save.packed

    apart: ClassVar[int] = 1  # between the seeds of the members of a soup

    @property
    def drawn(self) -> int:
        """The seed that the members of a soup differ in."""
        return 0

    @model_validator(mode="after")
    def _check_shared(self) -> Recipe:
        if Path(self.out).is_file():
            raise ValueError(f"out: {self.out!r} is a file; give a folder")
        return self


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
