"""What a recipe says beside its defaults, and the hash of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

__all__ = ["digest", "given", "said"]

Section = TypeVar("Section", bound=BaseModel)
Keys = set[str] | Mapping[str, Any]


def given(section: Section | None) -> Section:
    """A section that the checks of a recipe say is there."""
    assert section is not None
    return section


def said(section: BaseModel, *, only: Keys | None = None, but: Keys | None = None) -> dict[str, Any]:
    """What a recipe or a section says beside its defaults, as JSON: what hashes are made of.

    A key that is added later, with a default that means what was done before, changes no hash. only, but: keys of the
    section, or nested mappings of them.
    """
    return section.model_dump(mode="json", exclude_defaults=True, include=only, exclude=but)


def digest(value: Any) -> str:
    """Hash of a JSON-like value, or of what a recipe says, independent of key order."""
    plain = said(value) if isinstance(value, BaseModel) else value
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()
