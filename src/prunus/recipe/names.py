"""What recipes may name: everything in the `__all__` of a family's modules, with the options of its signature.

    criterion: wanda                    a name
    criterion: {sparsegpt: {damping: 0.02}}    a name with options

A recipe's name is the Python name in small letters, without a last underscore (`global_` is global). A new criterion,
allocation, ... is named in recipes, listed by `prunus show --names` and found by error messages once it stands in its
`__all__`; there is no other list.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

from pydantic import BaseModel, BeforeValidator, TypeAdapter, ValidationError

from prunus.recipe.plain import meant
from prunus.train import Original

if TYPE_CHECKING:
    from prunus.patterns import Pattern

__all__ = [
    "FAMILIES",
    "AllocationName",
    "AverageName",
    "Choice",
    "CriterionName",
    "Family",
    "PatternName",
    "RetrainingName",
    "ScheduleName",
    "allocations",
    "averages",
    "criteria",
    "fixed_sparsity",
    "methods",
    "optimizers",
    "pattern_of",
    "patterns",
    "retrainings",
    "rows",
    "schedules",
    "sets",
]

Choice = str | dict[str, Any]
_OFFERED = ("seed",)  # a run fills these in where a recipe leaves them open, so their default means something else


@dataclass(frozen=True)
class Family:
    """One kind of things that recipes name.

    word: what messages call one. modules: imported when they are first looked at. belongs: which of their public names
    are members. ready: members that are used as they are; the others are called with their options. given: parameters
    that are no options, because a run knows them. short: the first option needs no name where it is the only one
    ({multistep: [91, 136]}).
    """

    word: str
    modules: tuple[str, ...]
    belongs: Callable[[Any], bool] = lambda member: True
    ready: Callable[[Any], bool] = lambda member: False
    given: tuple[str, ...] = ()
    short: bool = False

    def members(self) -> dict[str, Any]:
        """Name in recipes -> function, class or value.

        >>> sorted(criteria.members())[:2]
        ['frank_wolfe', 'magnitude']
        """
        modules = [import_module(name) for name in self.modules]
        found = {name: getattr(module, name) for module in modules for name in module.__all__}
        return {name.lower().rstrip("_"): each for name, each in found.items() if self.belongs(each)}

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """What may be said of a member in a recipe, by its signature."""
        member = self.members()[name]
        if self.ready(member):
            return {}
        found = inspect.signature(member).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {each.name: each for each in found if each.kind in kinds and each.name not in self.given}

    def check(self, value: Any) -> Choice:
        """The choice in its shortest form: a name, or {name: {option: value}}.

        Raises ValueError for an unknown name or option, with those there are, and for a value of another type.

        >>> criteria.check({"sparsegpt": {}})
        'sparsegpt'
        """
        name, options = self._parted(value)
        self._typed(name, options, ())
        return self._said(name, options)

    def lean(self, choice: Choice) -> Choice:
        """The choice without options that have their default value: recipes that mean the same have one hash.

        >>> criteria.lean({"sparsegpt": {"damping": 0.01}})
        'sparsegpt'
        """
        name, options = self._parted(choice)
        takes, typed = self.options(name), self._typed(name, options, ())
        left = {key: value for key, value in options.items() if key in _OFFERED or typed[key] != takes[key].default}
        return self._said(name, left)

    def make(self, choice: Choice, *given: Any, **offered: Any) -> Any:
        """The thing that a choice names.

        given: the first arguments of members that are called. offered: what a run knows, for parameters of that name
        that a member has and the choice leaves open.

        >>> criteria.make({"sparsegpt": {"damping": 0.02}}).needs
        'gram'
        """
        name, options = self._parted(choice)
        member = self.members()[name]
        if self.ready(member):
            return member
        takes = inspect.signature(member).parameters
        known = {key: value for key, value in offered.items() if key in takes and key not in options}
        return member(*given, **known, **self._typed(name, options, known))

    def name(self, choice: Choice) -> str:
        """The name in a choice. Raises ValueError for one that no member has.

        >>> criteria.name("Wanda")
        'wanda'
        """
        return self._parted(choice)[0]

    def has(self, choice: Choice) -> bool:
        """Whether the choice names one of this family.

        >>> schedules.has("cosine"), schedules.has("allr")
        (True, False)
        """
        name = choice if isinstance(choice, str) else next(iter(choice))
        return str(name).lower() in self.members()

    def takes(self, choice: Choice) -> list[str]:
        """The options that are open to a choice.

        >>> criteria.takes("random")
        ['seed']
        """
        return list(self.options(self.name(choice)))

    def knows(self, choice: Choice, parameter: str) -> bool:
        """Whether what a choice names has a parameter that a run fills in.

        >>> schedules.knows("cosine", "warmup"), schedules.knows("one_cycle", "warmup")
        (True, False)
        """
        return parameter in inspect.signature(self.members()[self.name(choice)]).parameters

    def _said(self, name: str, options: dict[str, Any]) -> Choice:
        """A choice in its shortest form."""
        if self.short and list(options) == self.takes(name)[:1] != []:
            return {name: next(iter(options.values()))}
        return {name: options} if options else name

    def _parted(self, value: Any) -> tuple[str, dict[str, Any]]:
        """Name and options of a choice."""
        if isinstance(value, str):
            value = {value: None}
        if not isinstance(value, Mapping) or len(value) != 1:
            raise ValueError(f"give one {self.word}: a name, or {{name: {{option: value}}}}")
        asked, options = next(iter(value.items()))
        name, known = str(asked).lower(), self.members()
        if name not in known:
            raise ValueError(f"there is no {self.word} {asked!r}; {_closest(name, known)}there are {', '.join(known)}")
        if self.short and not isinstance(options, (Mapping, type(None))):
            options = dict.fromkeys([*self.options(name), "option"][:1], options)
        if options is not None and not isinstance(options, Mapping):
            raise ValueError(f"options of {name} are {{option: value}}; got {options!r}")
        return name, dict(options or {})

    def _typed(self, name: str, options: Mapping[str, Any], known: Collection[str]) -> dict[str, Any]:
        """The options as the signature wants them."""
        takes = self.options(name)
        for option in options:
            if option not in takes:
                listed = f"it takes {', '.join(takes) or 'none'}"
                raise ValueError(f"{name} has no option {option!r}; {_closest(option, takes)}{listed}")
        left = takes.keys() - options.keys() - set(known)
        missing = [name for name in takes if name in left and takes[name].default is inspect.Parameter.empty]
        if missing:
            raise ValueError(f"{name} needs the option {missing[0]!r}")
        hints = _hints(self.members()[name])
        return {option: _as(hints.get(option, Any), value, f"{name}.{option}") for option, value in options.items()}


def _as(hint: Any, value: Any, where: str) -> Any:
    """A value from a recipe as a parameter wants it: of its type, and by its name where that is a family's."""
    from prunus.score import Allocation, Criterion

    for kind, family in ((Allocation, allocations), (Criterion, criteria)):
        if kind in (hint, *get_args(hint)):
            return family.make(value)
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        found = error.errors()[0]
        message = f"give {len(get_args(hint))} values" if found["type"] == "missing" else found["msg"]  # of a tuple
        raise ValueError(f"{where}: {message} (got {value!r})") from None


def _hints(member: Any) -> dict[str, Any]:
    """The types of a member's parameters; none where they are not to be read (names that only checkers see)."""
    section = inspect.isclass(member) and issubclass(member, BaseModel)  # whose fields are its options
    try:
        return get_type_hints(member.__init__ if inspect.isclass(member) and not section else member)
    except NameError:
        return {}


def _closest(name: str, known: Mapping[str, Any]) -> str:
    close = meant(name, known)
    return f"{close} " if close else ""


def _is_criterion(member: Any) -> bool:
    from prunus.score import Criterion, required

    return isinstance(member, Criterion) or required(member) == 1


def _is_allocation(member: Any) -> bool:
    from prunus.score import Allocation, required

    return isinstance(member, Allocation) or required(member) == 2


def _is_method(member: Any) -> bool:
    from prunus.train import During

    return inspect.isclass(member) and issubclass(member, During) and next(iter(_takes(member)), "") == "sparsity"


def _is_optimizer(member: Any) -> bool:
    base = import_module("prunus.recipe.optimizers").Optimizer
    return inspect.isclass(member) and issubclass(member, base) and member is not base


def _returns(member: Any, name: str) -> bool:
    return inspect.isfunction(member) and member.__annotations__.get("return") == name


@cache
def _takes(member: Any) -> list[str]:
    return list(inspect.signature(member).parameters)


criteria = Family("criterion", ("prunus.score.criteria", "prunus.solve"), ready=_is_criterion)
allocations = Family("allocation", ("prunus.score.allocations",), ready=_is_allocation)
patterns = Family(
    "pattern", ("prunus.patterns",), belongs=lambda each: inspect.isclass(each) and not getattr(each, "_is_protocol", 0)
)
methods = Family("method", ("prunus.during",), belongs=_is_method, given=("sparsity", "prior"))
retrainings = Family(
    "retraining schedule",
    ("prunus.train.lr",),
    belongs=lambda each: _returns(each, "Multiplier") and _takes(each)[0] == "original",
    given=("original", "steps", "distance", "share"),
)
schedules = Family(
    "schedule",
    ("prunus.train.lr",),
    belongs=lambda each: _returns(each, "Multiplier") and _takes(each)[0] == "steps",
    given=("steps", "warmup", "epoch"),
    short=True,
)
sets = Family("set", ("prunus.frankwolfe.sets",), belongs=lambda each: _returns(each, "Ball"), given=("radius",))
optimizers = Family("optimizer", ("prunus.recipe.optimizers",), belongs=_is_optimizer)
averages = Family("average", ("prunus.soup.averages",), belongs=inspect.isfunction, given=("states", "held", "base"))
FAMILIES = (criteria, allocations, patterns, methods, schedules, retrainings, optimizers, averages, sets)


def _made(family: Family) -> BeforeValidator:
    """Checks a choice by making what it names: what it refuses is refused before any work."""

    def check(value: Any) -> Choice:
        choice = family.check(value)
        family.make(choice)
        return family.lean(choice)

    return BeforeValidator(check)


CriterionName = Annotated[Choice, _made(criteria)]
AllocationName = Annotated[Choice, _made(allocations)]
AverageName = Annotated[Choice, BeforeValidator(averages.check)]


def _schedule(value: Any) -> Choice:
    choice = schedules.check(value)
    schedules.make(choice, 1_000_000)  # what it refuses is refused before any work
    return choice


def _retraining(value: Any) -> Choice:
    """A schedule of either kind: one that goes by the dense training, or one of any training."""
    if isinstance(value, str | dict) and value and schedules.has(value):
        return _schedule(value)
    try:
        choice = retrainings.check(value)
    except ValueError as error:
        raise ValueError(f"{error}; and those of training, {', '.join(schedules.members())}") from None
    retrainings.make(choice, _dense(), _dense().steps, distance=1.0, share=1.0)
    return choice


@cache
def _dense() -> Original:
    """A dense training that leaves room for any retraining."""
    return Original.of([1.0] * 10_000)


ScheduleName = Annotated[Choice, BeforeValidator(_schedule)]
RetrainingName = Annotated[Choice, BeforeValidator(_retraining)]


def pattern_of(value: Choice, per: str = "row") -> Pattern:
    """The pattern that a recipe names: "unstructured", N:M, "block RxC", "filters", or a class with its options.

    >>> pattern_of("2:4"), pattern_of({"block": {"rows": 2, "columns": 4}})
    (NM(n=2, m=4), Block(rows=2, columns=4))
    """
    from prunus.patterns import parse

    if isinstance(value, str) and value not in patterns.members().keys() - {"unstructured"}:
        return parse(value, "row" if per == "row" else "layer")
    return patterns.make(value, per=per)


def _pattern(value: Any) -> Choice:
    pattern_of(value)
    return value if isinstance(value, str) else patterns.check(value)


def fixed_sparsity(section: Any) -> float | None:
    """The sparsity that the pattern of a section fixes; None where it is open, or no pattern, which is refused later.

    >>> fixed_sparsity({"pattern": "2:4"}), fixed_sparsity({"pattern": "filters"})
    (0.5, None)
    """
    try:
        return pattern_of(section["pattern"]).sparsity
    except (TypeError, KeyError, ValueError):
        return None


PatternName = Annotated[Choice, BeforeValidator(_pattern)]


def rows() -> Iterator[dict[str, str]]:
    """A row for everything that recipes may name: its kind, name, options with their defaults, and what it is."""
    for family in FAMILIES:
        for name, member in family.members().items():
            options = [
                each.name if each.default is each.empty else f"{each.name}={_shown(each.default)}"
                for each in family.options(name).values()
            ]
            first = (member.__doc__ or "").strip().split("\n")[0]
            yield {"kind": family.word, "name": name, "options": ", ".join(options), "what": first}


def _shown(default: Any) -> str:
    if isinstance(default, BaseModel):
        return str(default.model_dump(exclude_defaults=True))
    return str(getattr(default, "__name__", default)).rstrip("_")
