"""What recipes are made of: plain values from YAML, with numbers as in YAML 1.2, and sections that check them."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, GetJsonSchemaHandler, ValidationInfo, field_validator

__all__ = ["Strict", "Unfinished", "is_full", "meant", "read_yaml", "yaml_value"]


class Strict(BaseModel):
    """A frozen section that refuses keys it does not know."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        protected_namespaces=(),
        ser_json_inf_nan="constants",
        use_attribute_docstrings=True,
    )
    shorthands: ClassVar[tuple[str, ...]] = ()  # kinds of plain values, in JSON's words, that stand for a section

    @field_validator("*", mode="before")
    @classmethod
    def _is_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`true` is no number, though Python counts it as 1."""
        if isinstance(value, bool) and info.field_name in _numbers(cls):
            raise ValueError("needs a number, not true or false")
        return value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        whole = handler(core)
        return {"anyOf": [{"type": kind} for kind in cls.shorthands] + [whole]} if cls.shorthands else whole


@cache
def _numbers(section: type[BaseModel]) -> set[str]:
    """The keys whose values are numbers and never true or false."""
    taken = {name: _types(field.annotation) for name, field in section.model_fields.items()}
    return {name for name, types in taken.items() if types & {int, float} and bool not in types}


def _types(annotation: Any) -> set[Any]:
    """The types that an annotation is made of."""
    own = {annotation} if isinstance(annotation, type) else set[Any]()
    return own.union(*(_types(each) for each in get_args(annotation)))


class Unfinished(RuntimeError):
    """Some members failed for good; what is finished is kept, and the same command goes on."""


def meant(name: str, known: Iterable[str]) -> str:
    """Which known name an unknown one may have been meant to be, as a question; nothing where none is like it.

    >>> meant("sparsty", ["sparsity", "pattern"])
    "did you mean 'sparsity'?"
    """
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else ""


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk has no room left.

    >>> is_full(OSError(28, "No space left on device"))
    True
    """
    said = ("No space left on device", "is the disk full?")
    return isinstance(error, OSError) and any(words in str(error) for words in said)


_MOST = 100_000  # values of one text, those that aliases stand for counted as often


class _Yaml(yaml.SafeLoader):
    """Plain values as in YAML 1.2: in 1.1 the pattern 2:4 is the number 124 (base 60), 1e-3 is text, no is false.

    60% is 0.6, but for keys, which are labels; keys that are numbers are so as JSON has them.
    A key that stands twice is a mistake; aliases of aliases, which fill memory from a few bytes, are counted.
    """

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if _size(node, {}) > _MOST:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST} values: write out what they are")
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            key.tag = "tag:yaml.org,2002:str" if key.tag == _SHARE else key.tag
        seen: set[Any] = set()
        for key in keys:
            meant: Any = key.value if key.tag in _OWN else self.construct_object(key)  # pyright: ignore[reportUnknownMemberType]
            if not seen.isdisjoint({key.value, meant}):  # 1 and 1.0 are one key of a dictionary, too
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            seen |= {key.value, meant}
        found = super().construct_mapping(node, deep)
        return {key if isinstance(key, str) else json.dumps(key): value for key, value in found.items()}


def _size(node: Any, known: dict[int, float]) -> float:
    """How many values a node stands for; infinitely many where it is inside itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        inner = [each for part in parts for each in (part if isinstance(part, tuple) else (part,))]
        known[id(node)] = 1 + sum(_size(each, known) for each in inner)
    return known[id(node)]


_SHARE = "!share"
_OWN = ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")  # of YAML's own keys, << and =
_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")  # what a recipe has; !!set and !!binary are none of it
_Yaml.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix("tag:yaml.org,2002:") in _PLAIN
}
_REPLACED = [f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "bool", "timestamp")]
_Yaml.yaml_implicit_resolvers = {
    first: [(tag, rule) for tag, rule in rules if tag not in _REPLACED]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Yaml.add_implicit_resolver(_REPLACED[0], re.compile(r"[-+]?(0|[1-9]\d*)$"), list("-+0123456789"))
_Yaml.add_implicit_resolver(
    _REPLACED[1],
    re.compile(r"[-+]?(\.\d+|\d+\.\d*|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.inf$|\.nan$", re.IGNORECASE),
    list("-+.0123456789"),
)
_Yaml.add_implicit_resolver(_REPLACED[2], re.compile(r"true$|True$|false$|False$"), list("tTfF"))
_Yaml.add_implicit_resolver(_SHARE, re.compile(r"\d+(\.\d*)?%$"), list("0123456789"))
_Yaml.add_constructor(_SHARE, lambda _, node: float(f"{node.value[:-1]}e-2"))  # 99.9 / 100 is not 0.999


def yaml_value(text: str, where: str) -> Any:
    """The value of a YAML text, with numbers as in YAML 1.2. Raises ValueError naming the place of a mistake.

    >>> yaml_value("{pattern: 2:4, lr: 1e-3, sparsity: 60%}", "here")
    {'pattern': '2:4', 'lr': 0.001, 'sparsity': 0.6}
    """
    try:
        return yaml.load(text, _Yaml)
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply; write it flatter: a recipe has a few levels") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    except (ValueError, KeyError) as error:  # !!float abc, !!bool maybe
        raise ValueError(f"{where} is not YAML: {error}, which its tag does not fit; leave out the tag") from None


@cache
def _piped(path: str) -> str:
    """What a pipe brings, which can be read once; which task it is of is asked first."""
    return sys.stdin.buffer.read().decode() if path == "-" else Path(path).read_text(encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, a pipe, or on standard input, "-".

    Raises FileNotFoundError without one, ValueError when it is not a mapping.
    """
    piped = str(path) == "-" or path.is_fifo()
    if not piped and not path.is_file():
        raise FileNotFoundError(f"no recipe {str(path)!r} (seen from {os.getcwd()}); see recipes/ for examples")
    try:
        text = _piped(str(path)) if piped else path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}); save it as UTF-8") from None
    raw = yaml_value(text, str(path)) or {}
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys to values, not a {type(raw).__name__}; see recipes/")
    return raw
