"""The texts of a recipe as tokens, for each of their three uses, and whether there are enough of them.

calibrate ─▶ random windows; no more is read than they need      evaluate ─▶ streams, rows joined by a text
retrain   ─▶ a stream of documents, with the end-of-text token between two

And prompts, drawn as calibration's windows are.
"""

from __future__ import annotations

import logging
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
from prunus.jobs import keyed
from prunus.recipe import Calibrate, Data, LanguageRecipe, LanguageRetrain, Writing

__all__ = [
    "calibration_windows",
    "check_texts",
    "evaluation_texts",
    "head_in_words",
    "ids_of",
    "prompts",
    "training_windows",
    "window_of",
]

log = logging.getLogger(__name__)

_ENOUGH = 1 << 20  # tokens that calibration draws from, or four times what it takes, if that is more


def calibration_windows(asked: Calibrate, tokenizer: Any) -> Tensor:
    """(samples, length) int64, drawn from the beginning of the text. Raises ValueError if it is too short."""
    with keyed("calibrate.data"):
        text = _tokens(asked.data, tokenizer, most=_enough(asked.samples, asked.length))
        return calibration(text, asked.samples, asked.length, asked.seed)


def prompts(asked: Writing, tokenizer: Any) -> Tensor:
    """(rows, prompt) int64, drawn from the beginning of the text. Raises ValueError if it is too short."""
    rows, length = asked.rows, asked.prompt
    with keyed("data"):
        text = _tokens(asked.data, tokenizer, most=_enough(rows, length))
    inside = length - len(text.head)
    if inside < 1:
        raise ValueError(f"prompt: {length} is no more than the start tokens; give at least {len(text.head) + 1}")
    places = max(0, len(text) - inside + 1)
    if places < rows:
        raise ValueError(
            f"data: {rows} prompts of {length} tokens begin at {rows} places, and {len(text)} tokens of text have "
            f"{places}; give more text, fewer tokens or a shorter prompt"
        )
    return calibration(text, rows, length, asked.seed)


def ids_of(data: Data, tokenizer: Any) -> Tensor:
    """The tokens of a whole text, (N,). Raises ValueError for one that does not open."""
    with keyed("shrink.vocabulary"):
        return _tokens(data, tokenizer).ids


def training_windows(asked: LanguageRetrain, tokenizer: Any, section: str = "retrain") -> PackedTokens:
    """What is retrained on, as a section of the recipe says. Raises ValueError for a text without a window."""
    with keyed(f"{section}.data"):
        total = asked.steps * asked.step_tokens
        packed = PackedTokens(_tokens(asked.data, tokenizer, documents=True, total=total), asked.length)
        packed.at(0, batch=1, seed=0)
        return packed


def evaluation_texts(recipe: LanguageRecipe, model: Any, tokenizer: Any) -> dict[str, Tokens]:
    """Text name -> its tokens. Raises ValueError for one without a window of what the model is measured in."""
    found: dict[str, Tokens] = {}
    for name, data in recipe.evaluate.data.items():
        with keyed(f"evaluate.data.{name}"):
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
        for name in (name for name, data in recipe.evaluate.data.items() if data.meets(asked.data)):
            said = "is the text that is trained on, or has some of it: its perplexity is one of training"
            log.warning("evaluate.data.%s %s", name, said)
    evaluation_texts(recipe, model, tokenizer)


def window_of(recipe: LanguageRecipe, model: Any) -> int:
    """How many tokens perplexity is measured in at a time: the recipe's, or the model's own, at most 2048."""
    return recipe.evaluate.window or min(longest(model.config) or 2048, 2048)


def head_in_words(recipe: LanguageRecipe, tokenizer: Any) -> str:
    """What stands at the head of each window that is measured, as text; "" for nothing."""
    return tokenizer.decode(head_of(tokenizer)) if any(data.head for data in recipe.evaluate.data.values()) else ""


def _enough(rows: int, length: int) -> int:
    """How many tokens of a text are read to draw so many windows from."""
    return max(_ENOUGH, 4 * rows * length)


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
