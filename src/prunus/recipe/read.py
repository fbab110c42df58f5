"""Plain mappings into checked recipes, and what is wrong with them in words."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from prunus.recipe.classifier import ClassifierRecipe
from prunus.recipe.encoder import EncoderRecipe
from prunus.recipe.language import LanguageRecipe
from prunus.recipe.plain import Strict, meant, read_yaml
from prunus.recipe.shared import Recipe

__all__ = ["data_changes", "data_key", "load_recipe", "merge", "parse", "schema_of_recipes"]

Section = TypeVar("Section", bound=BaseModel)
_TASKS = {ClassifierRecipe.keyed: ClassifierRecipe, EncoderRecipe.keyed: EncoderRecipe, None: LanguageRecipe}


def load_recipe(path: Path | None, overrides: Mapping[str, Any] | None = None) -> Any:
    """The checked recipe of a YAML file, of whichever task, with dotted overrides ({"prune.sparsity": 0.6}) put on top.

    Raises ValueError that lists every wrong key with its value and mend; FileNotFoundError for a missing recipe.

    >>> prune = {"prune.criterion": "magnitude", "prune.pattern": "2:4"}
    >>> load_recipe(None, {"model": "embedded", "out": "runs/example", **prune}).prune.pattern
    '2:4'
    """
    raw = {} if path is None else read_yaml(path)
    return parse(merge(raw, overrides or {}), Recipe, str(path or "flags"))


def parse(raw: Mapping[str, Any], model: type[Section], where: str) -> Section:
    """The checked section `model` of a plain mapping; errors as in `load_recipe`."""
    strange = next(_not_finite(raw), None)
    if strange is not None:
        raise ValueError(f"{where}: {strange[0]} is {strange[1]}; give a finite number")
    task = cast("type[Section]", _TASKS[data_key(raw)] if model is Recipe else model)
    try:
        return task.model_validate(raw)
    except ValidationError as error:
        found = error.errors()  # a section is not also told that it is no boolean
        meant = [item for item in found if item["type"] != "bool_type" or not isinstance(item["input"], dict)]
        lines = _united([_line(item, task) for item in meant or found])
        raise ValueError(f"{where}: " + "\n".join(lines)) from None


def schema_of_recipes() -> dict[str, Any]:
    """The JSON schema of recipes of all tasks."""
    return TypeAdapter(LanguageRecipe | ClassifierRecipe | EncoderRecipe).json_schema() | {"title": "Recipe of Prunus"}


def _not_finite(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Dotted keys whose values are nan or infinite, wherever they stand; but lp is a norm for p = inf."""
    if isinstance(value, float) and not math.isfinite(value) and not (key.endswith(".p") and value > 0):
        yield key or "the value", value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _not_finite(item, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, list):
        for item in value:
            yield from _not_finite(item, key)


def merge(raw: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted keys set."""
    out = json.loads(json.dumps(raw))
    for dotted, value in overrides.items():
        *path, last = dotted.split(".")
        here = out
        for key in path:
            if not isinstance(here.get(key), dict):
                here[key] = {}
            here = here[key]
        here[last] = copy.deepcopy(value)  # of a YAML alias, which later keys must not change elsewhere
    return out


def data_key(raw: Mapping[str, Any]) -> str | None:
    """The key that says what a classifier is trained on, images or texts; None of a language model's recipe."""
    return next((key for key in _TASKS if key in raw), None)


def data_changes(raw: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Dotted changes of what a classifier is trained on, also where it is a source alone: "images.measure_on"."""
    key = str(data_key(raw))
    source = {"source": raw[key]} if isinstance(raw.get(key), str) else {}
    return {f"{key}.{name}": value for name, value in (source | changes).items()}


_MEMBER = re.compile(r"\.(?:bool|int|float|str|dict|list|tuple|literal|constrained|function|\[key\])(?:\W.*)?$")


def _united(lines: Sequence[str]) -> list[str]:
    """What the members of a union each say of one value, in one line."""
    found: dict[str, dict[str, None]] = {}
    for line in lines:
        key, _, said = line.partition(": ")
        whole = line.startswith("unknown key")
        found.setdefault(line if whole else _MEMBER.sub("", key), {})["" if whole else said] = None
    return [": ".join(filter(None, (key, " or ".join(said)))) for key, said in found.items()]


def _line(item: Any, model: type[BaseModel]) -> str:
    path = [str(part) for part in item["loc"] if part != "value" and part not in _sections(Strict)]
    key = ".".join(path) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_hint(path, model)}"
    message = _wanted(item["type"], path, model) or item["msg"].removeprefix("Value error, ")
    return f"{key}: {message} (got {item['input']!r})" if not isinstance(item["input"], dict) else f"{key}: {message}"


def _wanted(error: str, path: Sequence[str], model: type[BaseModel]) -> str:
    """What to give where something of another kind stands, in the words of YAML; "" for other errors."""
    if error == "model_type":
        keys = _fields(model, path)[:4]
        return f"give a section, a mapping with keys such as {', '.join(keys)}"
    return {"dict_type": "give a mapping, {name: value}", "tuple_type": "give a list"}.get(error, "")


@cache
def _sections(kind: type[BaseModel]) -> frozenset[str]:
    """The names of all classes of sections, by which pydantic tells apart what a key may be."""
    return frozenset({each.__name__ for each in kind.__subclasses__()}.union(*map(_sections, kind.__subclasses__())))


def _hint(path: Sequence[str], model: type[BaseModel]) -> str:
    """What an unknown key may have been meant to be."""
    known = sorted(_fields(model, path[:-1]))
    others = {LanguageRecipe: (ClassifierRecipe, "classifiers"), ClassifierRecipe: (LanguageRecipe, "language models")}
    others[EncoderRecipe] = others[ClassifierRecipe]
    if model in others and path[-1] in _fields(others[model][0], path[:-1]):
        return f"that is a key of {others[model][1]}; known keys: {', '.join(known)}"
    return meant(path[-1], known) or f"known keys: {', '.join(known)}"


def _fields(model: Any, path: Sequence[str]) -> list[str]:
    """The keys of the section at a path, in which a name stands where sections are named."""
    named = False
    for part in path:
        if named:
            named = False
            continue
        field = getattr(model, "model_fields", {}).get(part)
        if field is None:
            return []
        options = [field.annotation, *get_args(field.annotation)]
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        model, named = models[0] if models else model, bool(models) and get_origin(field.annotation) is dict
    return list(getattr(model, "model_fields", {}))
