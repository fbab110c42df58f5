"""How good a model on disk is: `prunus evaluate`, and the one number by which checkpoints are averaged greedily.

folder with recipe.yaml of a classifier ─▶ accuracy and its companions, of encoders cosine or Spearman's correlation
anything else                           ─▶ perplexity of texts, zero-shot tasks

A recipe with the key `images` scores classifiers by top-1 accuracy on the validation split, never the test images,
BatchNorm counted anew; any other scores language models by the perplexity (negative) on the first text of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from prunus.jobs import device_of
from prunus.measure import headline
from prunus.recipe import ClassifierRecipe, LanguageRecipe, Recipe, data_changes, data_key, merge, parse, read_yaml

__all__ = ["Scorer", "evaluate_model", "scorer"]


@dataclass(frozen=True)
class Scorer:
    """score: checkpoint (folder or file) -> how good it is. settle_: what a new average on disk still needs."""

    score: Callable[[Path], float]
    settle_: Callable[[Path], None]


def evaluate_model(model: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What is measured of a model, by dotted overrides of its recipe: `perplexity` and `zero_shot`, or `accuracy`.

    Raises ValueError for overrides that make no sense, texts and images that are not there, models that do not open.
    """
    path = Path(model).expanduser() / "recipe.yaml"
    raw = read_yaml(path) if path.is_file() else {}
    return _classifier(path, raw, overrides) if data_key(raw) else _language_model(model, overrides)


def scorer(path: Path, changes: Mapping[str, Any] | None = None) -> Scorer:
    """The scorer that an evaluation recipe describes. changes: dotted keys of it, and their values.

    Raises what reading the recipe raises; `score` raises ValueError for a checkpoint of another network.

    >>> scorer(Path("validation.yaml")).score(Path("runs/a/model"))
    """
    raw = merge(read_yaml(path), changes or {})
    if data_key(raw):
        return _of_classifiers(path, raw)
    if not parse(raw, LanguageRecipe, str(path)).evaluate.data:  # mistakes show before anything is averaged
        raise ValueError(f"{path}: evaluate.data has no text to score by: give one")

    def score(checkpoint: Path) -> float:
        from prunus.language import evaluate

        loaded, recipe, device = _loaded(merge(raw, {"model": str(checkpoint)}), str(path))
        return -next(iter(evaluate(loaded, recipe, device).values()))

    return Scorer(score, lambda _: None)


def _loaded(raw: Mapping[str, Any], where: str) -> tuple[Any, LanguageRecipe, Any]:
    """A language model, its recipe, and the device on which it is measured."""
    from prunus.language import fitted, load
    from prunus.measure import check_tasks

    recipe = parse(raw, LanguageRecipe, where)
    device = device_of(recipe)
    recipe = fitted(recipe, device)
    check_tasks(recipe.evaluate.tasks)
    return load(recipe), recipe, device


def _language_model(model: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    from prunus.language import evaluate, head_in_words, zero_shot

    loaded, recipe, device = _loaded(merge({"model": model}, overrides), "flags")
    head = head_in_words(recipe, loaded.tokenizer)
    found: dict[str, Any] = {"perplexity": evaluate(loaded, recipe, device), "head": head}
    tasks = zero_shot(loaded.model, loaded.tokenizer, recipe, device)
    return found | ({} if tasks is None else {"zero_shot": tasks.rows, "lm_eval": tasks.report})


def _classifier(path: Path, raw: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    from prunus.checkpoint import read_state
    from prunus.vision import Setting, corrupted, measure

    recipe = cast("ClassifierRecipe", parse(merge(raw, overrides), Recipe, str(path)))
    weights = path.with_name("model.safetensors")
    if not weights.is_file():
        raise ValueError(f"{path.parent} holds no model.safetensors: the run is not finished; run its recipe again")
    if recipe.prune is not None and recipe.prune.kind != "zeros":
        raise ValueError(f"{path.parent}: a network that became smaller was measured when it was made: see result.json")
    setting = Setting.of(recipe)
    network = setting.new_model()
    network.load_state_dict(read_state(weights, network.state_dict()))
    measured = measure(network, setting)
    found: dict[str, Any] = {headline(measured)[0]: measured}
    if recipe.corruptions is not None:
        found["corrupted"] = corrupted(network, setting, recipe.corruptions)
    return found


def _of_classifiers(path: Path, raw: Mapping[str, Any]) -> Scorer:
    import torch
    from safetensors import safe_open

    from prunus.checkpoint import read_state
    from prunus.machine import write_tensors
    from prunus.save import INFO_NAME, load_info, write_info
    from prunus.vision import Setting, measure, settle

    held = merge(raw, data_changes(raw, measure_on="validation"))
    setting = Setting.of(cast("ClassifierRecipe", parse(held, Recipe, str(path))))
    model = setting.new_model()

    def settled(checkpoint: Path) -> Any:
        model.load_state_dict(read_state(_file(checkpoint), model.state_dict()))
        settle(model, setting)
        return model

    def settle_file(checkpoint: Path) -> None:
        file = _file(checkpoint)
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata()
        write_tensors(file, settled(checkpoint).state_dict(), metadata)
        if (file.parent / INFO_NAME).is_file():  # which has the checksum of the weights
            write_info(file.parent, load_info(file.parent))

    with torch.no_grad():
        return Scorer(lambda checkpoint: headline(measure(settled(checkpoint), setting))[1], settle_file)


def _file(checkpoint: Path) -> Path:
    file = checkpoint / "model.safetensors" if checkpoint.is_dir() else checkpoint
    if not file.is_file():
        raise ValueError(f"{checkpoint} holds no model.safetensors: classifiers are scored from one file")
    return file
