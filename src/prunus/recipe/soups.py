"""Several retrainings and their average: the section `soup`."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from prunus.recipe.images import Augmentation
from prunus.recipe.names import AverageName, Choice, RetrainingName, averages
from prunus.recipe.plain import Strict
from prunus.recipe.values import Count, Part, Positive, Whole
from prunus.soup import NOTHING

__all__ = ["ClassifierSoup", "Soup", "Vary"]

Baseline = Literal["imp", "longer", "reprune", "dense", "swa"]


class Vary(Strict):
    """What differs between the members of a soup: member i takes the i-th value of each list, and then the first again.

    seed: "all" that is drawn, the "order" of the images alone, the "same" for all, or a list. Lists are in place of the
    keys of `retrain`; weight_decay and augment, of those of `train`.
    """

    seed: Literal["all", "order", "same"] | tuple[int, ...] = "all"
    lr: tuple[Positive, ...] = ()
    schedule: tuple[RetrainingName, ...] = ()
    warmup: tuple[Part, ...] = ()
    steps: tuple[Count, ...] = ()
    epochs: tuple[Positive, ...] = ()
    weight_decay: tuple[Annotated[float, Field(ge=0)], ...] = ()
    augment: tuple[Augmentation, ...] = ()

    def of(self, place: int) -> dict[str, Any]:
        """The keys that a member has a value of its own for."""
        lists = {key: values for key, values in self if isinstance(values, tuple) and values}
        return {key: values[place % len(values)] for key, values in lists.items()}


def _average(value: Any) -> Any:
    """A name, or a weight for each member."""
    if isinstance(value, (list, tuple)) and all(isinstance(x, (int, float)) and x >= 0 for x in value):
        return tuple(float(x) for x in value)
    return averages.check(value)


def _try(average: Choice, members: int) -> None:
    """Refuse what an average refuses, before any work."""
    try:
        averages.make(average, [{}] * members, base={}, held=NOTHING)
    except ValueError:
        raise
    except Exception:  # it looks at tensors, of which there are none yet
        return


def _in_words(choice: Choice) -> str:
    if isinstance(choice, str):
        return choice
    ((name, options),) = choice.items()
    return f"{name} ({', '.join(f'{key}={value}' for key, value in options.items())})"


class Soup(Strict):
    """Several retrainings of what was pruned and their average, in each phase, and what the soup is compared with.

    average: by name (greedy and learned choose by held-out data), or a weight for each member. also: further averages
    of the last phase's members. swa: where in the last retraining stochastic weight averaging begins, as a share.
    line, plane: points along lines between two members and a side of the plane of three; 0 leaves them out.
    """

    members: Count = 3
    vary: Vary = Vary()
    average: Annotated[Choice | tuple[float, ...], BeforeValidator(_average)] = "uniform"
    also: tuple[AverageName, ...] = ()
    baselines: tuple[Baseline, ...] = ("longer",)
    swa: Part = 0.75
    line: Whole = 0
    plane: Whole = 0

    @model_validator(mode="after")
    def _check(self) -> Soup:
        if isinstance(self.average, tuple):
            if len(self.average) != self.members:
                raise ValueError(f"average: {len(self.average)} weights for {self.members} members; give one each")
            if abs(math.fsum(self.average) - 1) > 1e-6:
                raise ValueError(f"average: weights add up to 1; these to {math.fsum(self.average):g}")
        for each in (self.average, *self.also):
            if not isinstance(each, tuple):
                _try(each, self.members)
        if self.line == 1 or self.plane == 1:
            raise ValueError("line and plane: at least 2 points, or 0 to leave it out")
        return self

    @property
    def further(self) -> dict[str, Choice]:
        """The averages of `also` by name; several of one name with their options, so that none hides another."""
        names = [averages.name(each) for each in self.also]
        return {_in_words(each) if names.count(n) > 1 else n: each for n, each in zip(names, self.also, strict=True)}

    @property
    def choosing(self) -> list[str]:
        """The averages that choose by held-out data."""
        named = [each for each in (self.average, *self.also) if not isinstance(each, tuple)]
        return [averages.name(each) for each in named if averages.knows(each, "held")]


class ClassifierSoup(Soup):
    """The same, with what is usual for classifiers."""

    baselines: tuple[Baseline, ...] = get_args(Baseline)
    line: Whole = 11
    plane: Whole = 9
