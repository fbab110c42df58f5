"""What a soup is asked to do: a classifier recipe with a section `soup`, checked before any work.

train ─▶ [ prune ─▶ retrain `members` copies that `vary` ─▶ average ] * prune.phases ─▶ measure, beside baselines
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from prunus.run.names import AverageName, Choice, RetrainingName, averages
from prunus.run.recipe import Strict
from prunus.run.vision.recipe import Augmentation, ClassifierRecipe, Count, Positive

__all__ = [
    "BASELINES",
    "FORKING",
    "SoupRecipe",
    "Souping",
    "Vary",
    "class_of",
    "member_of",
    "order_of",
]

Baseline = Literal["imp", "longer", "reprune", "dense", "swa"]
BASELINES: tuple[Baseline, ...] = ("imp", "longer", "reprune", "dense", "swa")
FORKING = ("gmp", "dpf")  # methods whose mask is final some time before the training ends
_APART = 15_485_863  # between the seeds of members, so that those of one run are not those of the next seed's


class Vary(Strict):
    """What differs between members: member i takes the i-th value of each list, and from the beginning again.

    seed: "all" (order and augmentation of the images), "order" alone, or the "same" for all. epochs: lengths, in place
    of retrain.epochs or share; lr: peaks, in place of retrain.lr; augment: whole sections, in place of train.augment.
    """

    seed: Literal["all", "order", "same"] = "all"
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] = ()
    lr: tuple[Positive, ...] = ()
    schedule: tuple[RetrainingName, ...] = ()
    epochs: tuple[Positive, ...] = ()
    augment: tuple[Augmentation, ...] = ()


def _average(value: Any) -> Any:
    """A name, or a weight for each member."""
    if isinstance(value, (list, tuple)) and all(isinstance(x, (int, float)) and x >= 0 for x in value):
        return tuple(float(x) for x in value)
    return averages.check(value)


class Souping(Strict):
    """How many members, what they vary, how they are averaged, and what the soup is compared with.

    average: "uniform", "greedy", "learned" (these two choose by held-out images), or a weight for each member. also:
    further averages of the last phase's members. swa: where in the last retraining stochastic weight averaging begins,
    as a share. line, plane: points along lines between two members and a side of the plane of three; 0 leaves them out.
    """

    members: Count = 3
    vary: Vary = Vary()
    average: Annotated[Choice | tuple[float, ...], BeforeValidator(_average)] = "uniform"
    also: tuple[AverageName, ...] = ()
    baselines: tuple[Baseline, ...] = BASELINES
    swa: Annotated[float, Field(ge=0, lt=1)] = 0.75
    line: Annotated[int, Field(ge=0)] = 11
    plane: Annotated[int, Field(ge=0)] = 9

    @model_validator(mode="after")
    def _check(self) -> Souping:
        if isinstance(self.average, tuple):
            if len(self.average) != self.members:
                raise ValueError(f"average: {len(self.average)} weights for {self.members} members; give one each")
            if abs(math.fsum(self.average) - 1) > 1e-6:
                raise ValueError(f"average: weights add up to 1; these to {math.fsum(self.average):g}")
        if self.line == 1 or self.plane == 1:
            raise ValueError("line and plane: at least 2 points, or 0 to leave it out")
        return self


class SoupRecipe(ClassifierRecipe):
    """A classifier recipe whose retraining is that of several members, which are averaged; see `Souping`."""

    soup: Souping
    out: str = "runs/soup"

    @model_validator(mode="after")
    def _check_soup(self) -> SoupRecipe:
        if self.prune is None:
            raise ValueError("soup needs prune.sparsity: members are copies of one pruned network")
        if self.retrain is None and (self.during is None or next(iter(self.during)) not in FORKING):
            raise ValueError(
                "soup: members are retrainings: give a section retrain (without it, during: gmp or dpf fork members "
                "when their mask is final)"
            )
        if self.retrain is not None and self.retrain.rewind is not None:
            raise ValueError("retrain.rewind would throw the average of every phase away; leave it out")
        named = [each for each in (self.soup.average, *self.soup.also) if not isinstance(each, tuple)]
        choosing = [averages.name(each) for each in named if averages.knows(each, "held")]
        if choosing and self.images.measure_on == "test":
            raise ValueError(
                f"soup: {choosing[0]} averages are chosen by held-out images: set images.measure_on: both (the test "
                "images measure), or validation"
            )
        self._check_members()
        return self

    def _check_members(self) -> None:
        vary = self.soup.vary
        if self.retrain is None and self.train.ema is not None:
            raise ValueError(
                "train.ema: members forked within a training cannot go on with its running mean; leave it out"
            )
        if self.retrain is None and (vary.epochs or vary.schedule or vary.lr):
            raise ValueError("soup.vary: members forked within a training end it: leave out lr, schedule and epochs")
        seen: dict[str, int] = {}
        for place in range(self.soup.members):
            text = member_of(self, place).model_dump_json(exclude={"soup"}) + str(order_of(self, place))
            if text in seen:
                raise ValueError(
                    f"soup.vary: members {seen[text] + 1} and {place + 1} would be the same; give as many values as "
                    "members, or seed: all"
                )
            seen[text] = place


def member_of(recipe: SoupRecipe, place: int | None) -> SoupRecipe:
    """The recipe of a member's retraining; None: of a run without members, as the recipe itself says it."""
    if place is None:
        return recipe
    vary = recipe.soup.vary
    train: dict[str, Any] = {}
    retrain: dict[str, Any] = {}
    for key, values in (("weight_decay", vary.weight_decay), ("augment", vary.augment)):
        train |= {key: values[place % len(values)]} if values else {}
    for key, values in (("lr", vary.lr), ("schedule", vary.schedule), ("epochs", vary.epochs)):
        retrain |= {key: values[place % len(values)]} if values else {}
    if "epochs" in retrain:
        retrain["share"] = None
    changes: dict[str, Any] = {"train": recipe.train.model_copy(update=train)}
    if recipe.retrain is not None:
        changes["retrain"] = recipe.retrain.model_copy(update=retrain)
    changes["seed"] = recipe.seed + (_APART * place if vary.seed == "all" else 0)
    return recipe.model_copy(update=changes)


def order_of(recipe: SoupRecipe, place: int | None) -> int | None:
    """The seed of the images' order where that alone differs."""
    return None if place is None or recipe.soup.vary.seed != "order" else recipe.seed + _APART * place


def class_of(raw: dict[str, Any]) -> type[ClassifierRecipe]:
    """The class of a plain classifier recipe: with the key `soup` it is a soup's."""
    return SoupRecipe if raw.get("soup") is not None else ClassifierRecipe
