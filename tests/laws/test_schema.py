"""The schema that editors use takes every recipe that Prunus takes, and names each key with what it means."""

import json
from pathlib import Path

import pytest

from prunus.recipe import schema_of_recipes
from prunus.recipe.plain import read_yaml, yaml_value
from prunus.run import cli

SCHEMA = schema_of_recipes()
RECIPES = [path for path in sorted(Path(__file__).parents[2].glob("recipes/**/*.yaml")) if "pretrain" not in path.name]


def takes(schema: dict, value: object) -> bool:
    """Whether a schema takes a value, as far as kinds and keys go: enough for what pydantic writes."""
    if "$ref" in schema:
        return takes(SCHEMA["$defs"][schema["$ref"].rsplit("/", 1)[1]], value)
    if "anyOf" in schema or "oneOf" in schema:
        return any(takes(each, value) for each in schema.get("anyOf", schema.get("oneOf")))
    if "const" in schema or "enum" in schema:
        return value in schema.get("enum", [schema.get("const")])
    kinds = schema.get("type")
    if kinds is None:
        return True
    fits = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": isinstance(value, int) and not isinstance(value, bool),
        "number": isinstance(value, int | float) and not isinstance(value, bool),
        "null": value is None,
        "array": isinstance(value, list),
        "object": isinstance(value, dict),
    }
    if not any(fits[kind] for kind in ([kinds] if isinstance(kinds, str) else kinds)):
        return False
    if isinstance(value, list):
        places = schema.get("prefixItems", [])
        return all(takes(places[i] if i < len(places) else schema.get("items", {}), v) for i, v in enumerate(value))
    if not isinstance(value, dict):
        return True
    keys, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    return all(
        takes(keys[key], item) if key in keys else rest is True or (isinstance(rest, dict) and takes(rest, item))
        for key, item in value.items()
    )


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_fits(path):
    raw = read_yaml(path)
    assert takes(SCHEMA, raw.get("base", raw))


@pytest.mark.parametrize("wrong", ["prune: {sparsty: 0.5}", "model: 3", "images: digits\ntrain: {epochs: ten}"])
def test_what_does_not_fit_is_seen(wrong):
    assert not takes(SCHEMA, yaml_value(wrong, "here"))


def test_short_forms_fit():
    for short in (
        "during: elsa",
        "during: {elsa: }",
        "images: digits",
        "images: digits\ntrain: {optimizer: adamw}",
        "evaluate: {data: text.parquet}",
        "calibrate: {data: [a.txt, {source: b.txt}]}",
    ):
        assert takes(SCHEMA, yaml_value(short, "here"))


def test_the_command_prints_it_with_what_keys_mean(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["prunus", "schema"])
    with pytest.raises(SystemExit):
        cli.main()
    printed = json.loads(capsys.readouterr().out)
    assert printed == SCHEMA
    assert printed["$defs"]["Prune"]["properties"]["sparsity"]["description"].startswith("Share of zeros")


@pytest.mark.parametrize(
    ("text", "value"), [("60%", 0.6), ("2.5%", 0.025), ("99.9%", 0.999), ("100%", 1.0), ("60 %", "60 %")]
)
def test_percents_are_shares(text, value):
    assert yaml_value(text, "here") == value


def test_percents_that_are_keys_stay_labels():
    assert yaml_value("{60%: {prune.sparsity: 60%}}", "here") == {"60%": {"prune.sparsity": 0.6}}


def test_keys_that_are_numbers_are_labels_in_files_and_behind_set_alike():
    assert yaml_value("{1e-3: {2: 3}, true: 4}", "here") == {"0.001": {"2": 3}, "true": 4}
