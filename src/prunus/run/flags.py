"""What the command's flags are and what they say: those of recipes are made from the recipe's own fields.

retrain.rank: int = 16          ─▶   --rank INTEGER   Of adapters.  (the field's docstring)
seed, where two sections have it ─▶   --seed, --retrain-seed
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from types import NoneType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from typer.core import TyperCommand

from prunus.recipe import yaml_value

__all__ = ["Flag", "assignments", "flags_of", "numbers", "overrides", "with_flags"]

Command = TypeVar("Command", bound=Callable[..., Any])
_SCALARS: dict[Any, str] = {str: "TEXT", int: "INTEGER", float: "FLOAT", bool: "BOOLEAN"}


@dataclass(frozen=True)
class Flag:
    """One flag of a recipe's field: `--name`, the dotted key that it sets, what it takes and what it means."""

    name: str
    key: str
    takes: str
    help: str

    @property
    def parameter(self) -> str:
        """The name as a keyword argument."""
        return self.name.replace("-", "_")


def flags_of(recipes: Sequence[type[BaseModel]], sections: Sequence[str]) -> list[Flag]:
    """The flags of the documented plain fields of recipes, and of these sections of theirs, in the fields' order.

    A name that is taken gets its section's before it; a key that several recipes have is one flag.
    """
    found: dict[str, Flag] = {}
    for section in ("", *sections):
        for recipe in recipes:
            model = recipe if not section else _section(recipe, section)
            for name, field in model.model_fields.items() if model is not None else ():
                takes, key = _takes(field.annotation), f"{section}.{name}".removeprefix(".")
                if takes is None or field.description is None or any(flag.key == key for flag in found.values()):
                    continue
                plain = name.replace("_", "-")
                flag = plain if plain not in found else f"{section}-{plain}"
                found[flag] = Flag(flag, key, takes, field.description)
    return list(found.values())


def with_flags(app: typer.Typer, flags: Callable[[], Sequence[Flag]]) -> Callable[[Command], Command]:
    """A decorator that adds to `app` a command ending in `**flags`: each flag is an option there, a YAML text or None.

    They are made when the command is called or asked for help, because importing what a recipe is takes a second.
    """

    def decorate(command: Command) -> Command:
        @cache
        def whole() -> Any:
            apart = typer.Typer(add_completion=False)
            apart.command()(_signed(command, flags()))
            return typer.main.get_command(apart)

        class Flagged(TyperCommand):
            def make_context(self, *args: Any, **extra: Any) -> Any:
                return whole().make_context(*args, **extra)

        app.command(cls=Flagged)(_signed(command, []))
        return command

    return decorate


def overrides(flags: Sequence[Flag], given: Mapping[str, str | None], assign: list[str] | None) -> dict[str, Any]:
    """Dotted keys and their values: those of `--set`, and over them those of flags.

    Raises ValueError naming the flag for a text that is no YAML, or an assignment without a key.
    """
    said = {flag: given.get(flag.parameter) for flag in flags}
    return assignments(assign) | {flag.key: _value(flag, text) for flag, text in said.items() if text is not None}


def numbers(text: str | None, flag: str) -> list[float] | None:
    """Numbers with commas between them. Raises ValueError naming the flag."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not numbers with commas, as in 0.5,0.25,0.25") from None


def assignments(items: list[str] | None) -> dict[str, Any]:
    """Dotted keys and their values, as `--set key=value` gives them. Raises ValueError for another form."""
    found = [item.partition("=") for item in items or []]
    wrong = next(("".join(parts) for parts in found if not parts[0] or not parts[1]), None)
    if wrong is not None:
        raise ValueError(f"--set {wrong!r} is not key=value")
    return {key: yaml_value(value, f"--set {key}={value}") for key, _, value in found}


def _value(flag: Flag, text: str) -> Any:
    if flag.takes == "TEXT":
        return text
    return text.split(",") if flag.takes == "TEXT,.." else yaml_value(text, f"--{flag.name} {text}")


def _signed(command: Callable[..., Any], flags: Sequence[Flag]) -> Callable[..., Any]:
    """The command with these flags in its signature, where it has `**flags`."""

    @wraps(command)
    def signed(**given: Any) -> Any:
        return command(**given)

    signature = inspect.signature(command, eval_str=True)
    own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    made = [inspect.Parameter(f.parameter, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(f))
            for f in flags]  # fmt: skip
    signed.__signature__ = signature.replace(parameters=[*own, *made])  # type: ignore[attr-defined]
    return signed


def _option(flag: Flag) -> Any:
    panel = f"Section {flag.key.partition('.')[0]}" if "." in flag.key else "The recipe"
    return Annotated[
        Union[str, None],  # noqa: UP007 - evaluated when it runs
        typer.Option(f"--{flag.name}", help=flag.help, metavar=flag.takes, rich_help_panel=panel),
    ]


def _section(recipe: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of a section."""
    field: FieldInfo | None = recipe.model_fields.get(name)
    options = () if field is None else (field.annotation, *get_args(field.annotation))
    return next((each for each in options if isinstance(each, type) and issubclass(each, BaseModel)), None)


def _takes(annotation: Any) -> str | None:
    """What a plain field takes, in words; None for sections, mappings and all lists but those of texts."""
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    inner = [each for each in get_args(annotation) if each is not NoneType]
    if get_origin(annotation) is Literal:
        return "[" + "|".join(str(word).lower() for word in inner) + "]"
    if get_origin(annotation) is tuple:
        return "TEXT,.." if inner == [str, ...] else None
    if get_origin(annotation) is Annotated:
        return _takes(inner[0])
    if get_origin(annotation) is dict:
        return "NAME,..|{NAME: FILE}" if inner == [str, str | None] else None
    if not inner:
        return None
    if str in inner and any(get_origin(each) is dict for each in inner):
        return "NAME"  # one of a family, or {name: {option: value}}
    plain = [each for each in inner if not (isinstance(each, type) and issubclass(each, BaseModel))]
    words = [_takes(each) for each in (plain if len(inner) > 1 else inner)]  # a union, perhaps with a section
    return None if None in words else "|".join(dict.fromkeys(word for word in words if word))
