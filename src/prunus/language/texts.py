"""The texts of a recipe as tokens, for each of their three uses, and whether there are enough of them.

calibrate ─▶ random windows; no more is read than they need      evaluate ─▶ streams, rows joined by a text
retrain   ─▶ a stream of documents, with the end-of-text token between two
"""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from prunus.blocks import longest
from prunus.data import (
    PackedTokens,
    TextSource,
    Tokens,
    calibration,
    head_of,
    labels,
    mixed,
    read_chats,
    read_tokens,
)
from prunus.recipe import Calibrate, Data, LanguageRecipe, LanguageRetrain

__all__ = [
    "calibration_windows",
    "check_texts",
    "evaluation_texts",
    "head_in_words",
    "ids_of",
    "training_windows",
    "window_of",
]

log = logging.getLogger(__name__)

_ENOUGH = 1 << 20  # tokens that calibration draws from, or four times what it takes, if that is more


def calibration_windows(asked: Calibrate, tokenizer: Any) -> Tensor:
    """(samples, length) int64, drawn from the beginning of the text. Raises ValueError if it is too short."""
    most = max(_ENOUGH, 4 * asked.samples * asked.length)
    with _named("calibrate.data"):
        return calibration(_tokens(asked.data, tokenizer, most=most), asked.samples, asked.length, asked.seed)


def ids_of(data: Data, tokenizer: Any) -> Tensor:
    """The tokens of a whole text, (N,). Raises ValueError for one that does not open."""
    with _named("shrink.vocabulary"):
        return _tokens(data, tokenizer).ids


def training_windows(asked: LanguageRetrain, tokenizer: Any, section: str = "retrain") -> PackedTokens:
    """What is retrained on, as a section of the recipe says. Raises ValueError for a text without a window."""
    with _named(f"{section}.data"):
        total = asked.steps * asked.step_tokens
        packed = PackedTokens(_tokens(asked.data, tokenizer, documents=True, total=total), asked.length)
        packed.at(0, batch=1, seed=0)
        return packed


def evaluation_texts(recipe: LanguageRecipe, model: Any, tokenizer: Any) -> dict[str, Tokens]:
    """Text name -> its tokens. Raises ValueError for one without a window of what the model is measured in."""
    found: dict[str, Tokens] = {}
    for name, data in recipe.evaluate.data.items():
        with _named(f"evaluate.data.{name}"):
            found[name] = _tokens(data, tokenizer)
            labels(found[name], window_of(recipe, model))
    return found


def check_texts(recipe: LanguageRecipe, model: Any, tokenizer: Any) -> None:
    """Raises ValueError, before the first forward pass, for texts that do not open or are too short for their use."""
    calibration_windows(recipe.calibrate, tokenizer)
    for section, asked in (("train", recipe.train), ("retrain", recipe.retrain)):
        if asked is None:
            continue
        training_windows(asked, tokenizer, section)
        name = next((name for name, data in recipe.evaluate.data.items() if data == asked.data), None)
        if name is not None:
            log.warning("evaluate.data.%s is the text that is trained on: its perplexity is one of training", name)
    evaluation_texts(recipe, model, tokenizer)


def window_of(recipe: LanguageRecipe, model: Any) -> int:
    """How many tokens perplexity is measured in at a time: the recipe's, or the model's own, at most 2048."""
    return recipe.evaluate.window or min(longest(model.config) or 2048, 2048)


def head_in_words(recipe: LanguageRecipe, tokenizer: Any) -> str:
    """What stands at the head of each window that is measured, as text; "" for nothing."""
    return tokenizer.decode(head_of(tokenizer)) if any(data.head for data in recipe.evaluate.data.values()) else ""


def _tokens(
    data: Data, tokenizer: Any, *, documents: bool = False, most: int | None = None, total: int | None = None
) -> Tokens:
    """documents: whether its rows are. most: enough of it. total: how much of a mixture there will be in all."""
    most = most if data.part == (0.0, 1.0) else None
    if data.mix:
        weights = [each.weight for each in data.mix]
        parts = [_tokens(each, tokenizer, documents=documents, most=most) for each in data.mix]
        found = mixed(parts, weights, total)
    else:
        assert data.source is not None
        source = TextSource(data.source, data.column, data.split, data.revision, data.streamed)
        apart = documents if data.end is None else data.end
        found = _read(source, (data.messages, data.prompt, data.answer), None if apart else data.join, tokenizer, most)
    found = found.part(*data.part)
    return found if data.head else replace(found, head=())


@lru_cache(maxsize=8)
def _read(
    source: TextSource, chats: tuple[str | None, ...], join: str | None, tokenizer: Any, most: int | None
) -> Tokens:
    """chats: the columns of messages, or of prompt and answer; none of them for texts."""
    messages, prompt, answer = chats
    if messages is not None:
        return read_chats(source, tokenizer, messages=messages, most=most)
    if prompt is not None and answer is not None:
        return read_chats(source, tokenizer, prompt=prompt, answer=answer, most=most)
    return read_tokens(source, tokenizer, join=join, most=most)


@contextmanager
def _named(key: str) -> Generator[None]:
    """Say in which part of the recipe a text stands."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
