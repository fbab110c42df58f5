"""What the command's flags say, from their texts."""

from __future__ import annotations

from typing import Any

__all__ = ["assignments", "numbers", "pairs"]


def numbers(text: str | None, flag: str) -> list[float] | None:
    """Numbers with commas between them. Raises ValueError naming the flag."""
    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{flag} {text!r} is not numbers with commas, as in 0.5,0.25,0.25") from None


def assignments(items: list[str] | None) -> dict[str, Any]:
    """Dotted keys and their values, as `--set key=value` gives them."""
    from prunus.run.plain import yaml_value

    found = pairs(items or [], "--set", "key=value")
    return {key: yaml_value(value, f"--set {key}={value}") for key, value in found.items()}


def pairs(items: list[str], flag: str, form: str) -> dict[str, str]:
    """Names and what is said of them. Raises ValueError naming the flag and the form it has."""
    found = [item.partition("=") for item in items]
    wrong = next((item for item, (_, sign, _) in zip(items, found, strict=True) if not sign), None)
    if wrong is not None:
        raise ValueError(f"{flag} {wrong!r} is not {form}")
    return {key: value for key, _, value in found}
