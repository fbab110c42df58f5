"""`prunus evaluate`: how good a saved model is, a language model or the network of a classifier run.

folder with recipe.yaml of a classifier ─▶ accuracy and its companions, also on corrupted images
anything else                           ─▶ perplexity of texts, zero-shot tasks
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prunus.run.folder import device_of
from prunus.run.recipe import ClassifierRecipe, LanguageRecipe, merge, parse, read_yaml

__all__ = ["evaluate_model"]


def evaluate_model(model: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured of a model, by dotted overrides of its recipe: `perplexity` and `zero_shot`, or `accuracy`.

    Raises ValueError for overrides that make no sense, texts and images that are not there, models that do not open.
    """
    path = Path(model).expanduser() / "recipe.yaml"
    raw = read_yaml(path) if path.is_file() else {}
    return _classifier(path, raw, overrides) if "images" in raw else _language_model(model, overrides)


def _language_model(model: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    from prunus.run import stages
    from prunus.run.fitted import fitted
    from prunus.run.plan import check_tasks
    from prunus.run.texts import head_in_words

    checked = parse(merge({"model": model}, dict(overrides)), LanguageRecipe, "flags")
    device = device_of(checked)
    checked = fitted(checked, device)
    check_tasks(checked)
    loaded = stages.load(checked)
    head = head_in_words(checked, loaded.tokenizer)
    found: dict[str, Any] = {"perplexity": stages.evaluate(loaded, checked, device), "head": head}
    tasks = stages.zero_shot(loaded.model, loaded.tokenizer, checked, device)
    return found | ({"zero_shot": tasks} if tasks else {})


def _classifier(path: Path, raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    from prunus.checkpoint import read_state
    from prunus.run.vision import stages
    from prunus.run.vision.setting import Setting

    recipe = parse(merge(raw, overrides), ClassifierRecipe, str(path))
    weights = path.with_name("model.safetensors")
    if not weights.is_file():
        raise ValueError(f"{path.parent} holds no model.safetensors: the run is not finished; run its recipe again")
    if recipe.prune is not None and recipe.prune.kind != "zeros":
        raise ValueError(f"{path.parent}: a network that became smaller was measured when it was made: see result.json")
    setting = Setting.of(recipe)
    network = setting.new_model()
    network.load_state_dict(read_state(weights, network.state_dict()))
    found: dict[str, Any] = {"accuracy": stages.measure(network, setting)}
    if recipe.corruptions is not None:
        found["corrupted"] = stages.corrupted(network, setting, recipe.corruptions)
    return found
