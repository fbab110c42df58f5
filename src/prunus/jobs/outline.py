"""What a run will do, as its recipe and an empty model say it: checked before every run, told by `--dry-run`.

    recipe, model on the meta device ─▶ check_pruning, check_adapting    refused before a weight is read
                                     ─▶ outline_*: layers by kind, what is trained, tokens or images, memory, files

Memory and bytes are estimates of what is counted here: weights, statistics, states of the optimizer; not activations.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunus.blocks import find_blocks
from prunus.layers import View, find_layers, parameter_shapes
from prunus.machine import counted, import_extra
from prunus.measure import check_pace, check_tasks
from prunus.recipe import (
    Adapting,
    ClassifierRecipe,
    ClassifierRetrain,
    LanguageRecipe,
    LanguageRetrain,
    Prune,
    optimizer_of,
)
from prunus.report import check_trackers
from prunus.score import Scores, needed, observable
from prunus.soup import phase_sparsities

__all__ = [
    "Outline",
    "check_adapting",
    "check_language",
    "check_pruning",
    "keyed",
    "kind_of",
    "outline_classifier",
    "outline_language",
    "size_in_words",
]

_STATE = 16  # bytes of a trained parameter: itself, its gradient and two moments, in float32


@contextmanager
def keyed(key: str) -> Generator[None]:
    """Say at which key of the recipe stands what is refused.

    >>> with keyed("retrain.data"):
    ...     pass
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


@dataclass(frozen=True)
class Outline:
    """What a run will do. layers: a row a kind; rows: what -> how much, in words; files: name -> bytes, about."""

    layers: list[dict[str, Any]]
    rows: dict[str, str]
    files: dict[str, float]


def check_pruning(model: nn.Module, asked: Prune) -> list[View]:
    """The layers of an empty model that will be pruned.

    Raises ValueError for globs that match none, layers that the pattern does not fit, and what an allocation refuses
    that goes by shapes; ImportError for a package that is missing.
    """
    views = find_layers(model, include=asked.include, exclude=asked.exclude)
    kind = getattr(asked, "kind", "zeros")  # of classifiers alone
    if kind == "filters":
        import_extra("torch_pruning", "shrink", "prune.kind: filters are removed by torch-pruning")
    if kind != "zeros":
        return views
    allocation, pattern = asked.sharing(), asked.where()
    if needed(asked.how(), allocation):
        views = observable(model, views, asked.include)
    if not views:
        raise ValueError("prune: include and exclude leave no layer to prune; name fewer in exclude")
    for view in views:
        pattern.counts(view.shape, asked.sparsity, name=view.name)
    if allocation.reads == "shapes":
        shapes = parameter_shapes(dict(model.named_parameters()), views)
        scores = Scores({view.name: torch.zeros(()).expand(view.shape) for view in views}, shapes)
        for sparsity in phase_sparsities(asked.sparsity, asked.phases, asked.ramp):
            allocation(scores, sparsity)
    return views


def check_language(recipe: LanguageRecipe, model: Any) -> list[View]:
    """The layers of an empty language model that will be pruned.

    Raises ValueError as `check_pruning`, for a model without a chain of blocks, for parameters to train that it does
    not have, for ranks that no layer has, for parts that cannot go, and for task files that cannot be read; ImportError
    for a missing package.
    """
    from prunus.adapt import add_biases  # which imports transformers: a classifier's plan does without
    from prunus.shrink import check_shares, narrowed
    from prunus.stream import check_fit

    find_blocks(model)
    views = check_pruning(model, recipe.prune)
    if (gone := recipe.shrink) is not None:
        narrower = {"heads": gone.heads, "neurons": gone.neurons, "width": gone.width}
        check_shares(model, blocks=gone.blocks, experts=gone.experts, **narrower)
        left = narrowed(model, **narrower)
        views = check_pruning(left, recipe.prune)
    if recipe.retrain is not None and recipe.retrain.add_biases:
        with keyed("retrain.add_biases"):
            add_biases(model)
    for key, asked in (("reconstruct", recipe.reconstruct), ("train", recipe.train), ("retrain", recipe.retrain)):
        if asked is not None:
            check_adapting(key, asked, model, views, whole=key != "reconstruct")
    if recipe.reconstruct is not None:
        with keyed("reconstruct.train"):
            check_fit(model, views, recipe.reconstruct.train, recipe.reconstruct.window)
    for trained in (recipe.train, recipe.retrain):
        if trained is not None:
            optimizer_of(trained.optimizer)
    check_tasks(recipe.evaluate.tasks)
    if (pace := recipe.evaluate.speed) is not None:
        with keyed("evaluate.speed"):
            check_pace(model, pace.prompt, pace.tokens, pace.batch_size)
    check_trackers(recipe.log_with)
    return views


def check_adapting(
    key: str, asked: Adapting | ClassifierRetrain, model: nn.Module, views: Sequence[View], *, whole: bool = True
) -> None:
    """Raise ValueError for what cannot be trained of an empty model whose `views` are pruned.

    That is subsets that it does not have, weights that would be trained and adapted at once, and adapters of a rank
    that no layer has. whole: the model is trained as one, not by blocks, whose subsets `check_fit` looks for.
    """
    from prunus.adapt import ADAPTERS, find_subset

    adapted = {view.parameter: view.name for view in views} if set(asked.train) & set(ADAPTERS) else {}
    for name in (each for each in asked.train if whole and each not in ADAPTERS):
        with keyed(f"{key}.train"):
            found = find_subset(model, name)
        twice = next((adapted[each] for each in found if each in adapted), None)
        if twice is not None:
            raise ValueError(
                f"{key}.train: {twice!r} would be trained by {name!r} and by its adapter: leave out one of the two, or "
                "name it in prune.exclude"
            )
    most = max((min(view.shape) for view in views), default=0)
    if adapted and asked.rank > most:
        raise ValueError(f"{key}.rank: {asked.rank} is above min(out, in) of every layer; set it to {most} or less")


def outline_language(recipe: LanguageRecipe, model: Any, texts: Mapping[str, int], device: torch.device) -> Outline:
    """The plan of a checked recipe. model: empty; texts: name -> tokens of what is evaluated."""
    views, prune = check_pruning(model, recipe.prune), recipe.prune
    total = sum(each.numel() for each in model.parameters())
    weights = sum(each.nbytes for each in model.parameters())
    pruned = sum(view.shape[0] * view.shape[1] for view in views)
    names = find_blocks(model)
    windows = f"{counted(recipe.calibrate.samples, 'window')} of {recipe.calibrate.length}"
    calibrated = recipe.calibrate.samples * recipe.calibrate.length
    way = _way(prune, recipe.during)
    rows = {
        "model": f"{recipe.model}: {_many(total)} parameters in {counted(len(names), 'block')}",
        "pruned": f"{counted(len(views), 'layer')}, {_many(pruned)} weights to {prune.sparsity:.2%} zeros, {way}",
        "calibration": f"{windows}: {_many(calibrated)} tokens",
    }
    if recipe.shrink is not None:
        gone = [f"{key} {value}" if isinstance(value, (int, float)) else key for key, value in recipe.shrink if value]
        rows["shrunk"] = f"{', '.join(gone)} go first; all counts here are of the model as it is"
    trained, members = 0, 1 if recipe.soup is None else recipe.soup.members
    if recipe.reconstruct is not None:
        steps = counted(recipe.reconstruct.steps, "step")
        rows["reconstruction"] = f"{', '.join(recipe.reconstruct.train)}, {steps} a block"
    if recipe.train is not None:
        rows["training"] = f"{counted(recipe.train.steps, 'step')}, {_many(_tokens_of(recipe.train))} tokens"
    if recipe.retrain is not None:
        asked = recipe.retrain
        trained = _trained(model, views, asked)
        rows["trained"] = f"{', '.join(asked.train)}: {_many(trained)} parameters, {trained / total:.3%}"
        tokens = _many(_tokens_of(asked))
        rows["retraining"] = f"{counted(asked.steps, 'step')}, {tokens} tokens{_times(prune.phases, members)}"
    evaluated = ", ".join(f"{name}: {_many(count)} tokens" for name, count in texts.items())
    rows["evaluation"] = f"{evaluated}, at each stage"
    trained = max(trained, 0 if recipe.train is None else _trained(model, views, recipe.train))
    rows |= _language_memory(recipe, model, views, device, trained=trained)
    files = {"model/": weights, "model/masks.safetensors": pruned / 8} if recipe.save else {}
    files |= {f"members/ ({members})": members * weights} if members > 1 and recipe.save else {}
    files |= {"work/, until it is done": weights + 12 * trained}
    return Outline(_kinds(views, prune, recipe.during), rows, files)


def outline_classifier(recipe: ClassifierRecipe, setting: Any, retrained: int) -> Outline:
    """The plan of a checked recipe. setting: with its images; retrained: steps of retraining, over all phases."""
    model = setting.empty_model()
    total = sum(each.numel() for each in model.parameters())
    sets, example = setting.sets, setting.example()
    if recipe.keyed == "images":
        shape, kept = " x ".join(map(str, example.shape[1:])), example.numel()
    else:
        shape, kept = f"up to {sets.train.length} tokens", 4 * len(example) * sets.train.length
    kept *= len(sets.train) + len(sets.measured)
    classes = f"; {sets.train.classes} classes" if recipe.aim == "classes" else f"; {recipe.aim}"
    steps, members = setting.epoch_steps, 1 if recipe.soup is None else recipe.soup.members
    during = f", during {next(iter(recipe.during))}" if recipe.during else ""
    epochs, taken = counted(recipe.train.epochs, "epoch"), _many(recipe.train.epochs * steps)
    training = f"{epochs}, {taken} steps of {recipe.train.batch_size}"
    rows = {
        recipe.keyed: f"{len(sets.train):,} of {shape} to train on, {len(sets.measured):,} to measure on{classes}",
        "model": f"{recipe.model}: {_many(total)} parameters{', all of them trained' if recipe.train.epochs else ''}",
        "training": training + during if recipe.train.epochs else "none: the weights are as they came",
    }
    layers: list[dict[str, Any]] = []
    if recipe.prune is not None:
        views, prune = check_pruning(model, recipe.prune), recipe.prune
        pruned = sum(view.shape[0] * view.shape[1] for view in views)
        how = f"zeros, {_way(prune, recipe.during)}" if prune.kind == "zeros" else f"fewer, by {prune.kind}"
        rows["pruned"] = f"{counted(len(views), 'layer')}, {_many(pruned)} weights to {prune.sparsity:.2%} {how}"
        layers = _kinds(views, prune, recipe.during)
        if retrained:
            asked = f"{counted(retrained, 'step', ',')}, {counted(retrained / steps, 'epoch', '.3g')}"
            rows["retraining"] = asked + _times(prune.phases, members)
    used = f"{size_in_words(_STATE * total)} for training, {size_in_words(kept)} of {recipe.keyed}"
    rows[f"memory, {setting.device.type}"] = used
    saved = {"model.safetensors": 4 * total, "dense/": 4 * total} | ({"masks.safetensors": total / 8} if layers else {})
    return Outline(layers, rows, saved | ({f"members/ ({members})": 4 * total * members} if members > 1 else {}))


def _tokens_of(asked: LanguageRetrain) -> int:
    return asked.steps * asked.step_tokens


def _trained(model: nn.Module, views: Sequence[View], asked: Adapting) -> int:
    """How many parameters are trained: of the subsets, each once, and of adapters on the pruned layers."""
    from prunus.adapt import ADAPTERS, find_subset

    found: dict[str, int] = {}
    for name in asked.train:
        if name not in ADAPTERS:
            found |= {key: each.numel() for key, each in find_subset(model, name).items()}
    adapted = views if set(asked.train) & set(ADAPTERS) else []
    return sum(found.values()) + sum(asked.rank * sum(view.shape) for view in adapted)


def _language_memory(
    recipe: LanguageRecipe, model: Any, views: Sequence[View], device: torch.device, *, trained: int
) -> dict[str, str]:
    """Where how much memory is taken: while pruning, a block at a time, and while retraining, as a whole."""
    weights = sum(each.nbytes for each in model.parameters())
    blocks = [sum(each.nbytes for each in model.get_submodule(name).parameters()) for name in find_blocks(model)]
    needs = needed(recipe.prune.how(), recipe.prune.sharing())
    widths = {view.shape[1] for view in views}
    statistics = 4 * sum(width * (width if needs == "gram" else 1) for width in widths) if needs else 0
    if needs == "gram" and recipe.prune.how().score is None:  # so much ADMM was seen to take (docs/results/speed-h200)
        statistics += max(4 * (5 * width * width + 8 * out * width) for out, width in (view.shape for view in views))
    width = int(getattr(model.config, "hidden_size", 0) or 0)
    size = next(iter(model.parameters())).element_size()
    hidden = recipe.calibrate.samples * recipe.calibrate.length * width * size
    pruning = f"{size_in_words(max(blocks) + statistics)} for a block, {size_in_words(hidden)} of hidden states"
    rows = {f"memory, {device.type}, pruning": pruning}
    if device.type != "cpu" or not recipe.streaming:
        rows["memory, host"] = f"{size_in_words(max(blocks) if recipe.streaming else weights)} of weights"
    if trained:
        rows[f"memory, {device.type}, retraining"] = f"{size_in_words(weights + _STATE * trained)} beside activations"
    return rows


def _times(phases: int, members: int) -> str:
    """How often a retraining is done."""
    return (f", over {phases} phases" if phases > 1 else "") + (f", each of {members} members" if members > 1 else "")


def _kinds(views: Iterable[View], asked: Prune, during: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """A row for layers of one name but for numbers, and one shape."""
    found: dict[tuple[str, tuple[int, int]], int] = {}
    for view in views:
        kind = kind_of(view.name)
        found[kind, view.shape] = found.get((kind, view.shape), 0) + 1
    alike = f"{asked.sparsity:.1%}" if asked.sharing().reads == "" else "by the allocation"
    zeros = alike if during is None or asked.where().sparsity is not None else f"by {next(iter(during))}"
    return [
        {
            "layers": kind,
            "out x in": " x ".join(map(str, shape)),
            "count": count,
            "weights": _many(count * shape[0] * shape[1]),
            "zeros": zeros,
        }
        for (kind, shape), count in found.items()
    ]


def kind_of(name: str) -> str:
    """A layer's name with a star for each number."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", re.sub(r"\[\d+\]$", "[*]", name))


def _way(asked: Prune, during: Mapping[str, Any] | None) -> str:
    if during is not None:
        return f"{asked.pattern}, by {next(iter(during))}"
    return f"{asked.how().name}, {asked.where()}, {asked.sharing().name}"


def _many(count: float) -> str:
    """A count in words: 1,234 or 1.23 billion."""
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,.0f}"


def size_in_words(count: float) -> str:
    """Bytes as GB or MB."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
