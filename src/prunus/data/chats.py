"""Chats and pairs of prompt and answer as one stream of tokens, with the loss on the answers alone.

    turns ─ the tokenizer's chat template ─▶ <user>Where?<assistant>Here.<end>      prompt + answer ─▶ Where? Here.<end>
                                                             ^^^^^^^^^^ answers                               ^^^^^^^^^^

A turn is an answer if its role is `assistant`; it begins where the template asks for an answer, and ends with what the
template puts behind it. A token that holds a part of an answer belongs to it.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from prunus.data.texts import TextSource, checked_text
from prunus.data.tokens import Tokens, end_of, head_of

__all__ = ["read_chats"]

_ROWS = 256  # chats that are tokenised side by side


@dataclass(frozen=True)
class _Chat:
    """A text, where its answers begin and end, and whether the end-of-text token is one of them."""

    text: str
    answers: tuple[tuple[int, int], ...]
    ends: bool


def read_chats(
    source: TextSource,
    tokenizer: Any,
    *,
    messages: str | None = None,
    prompt: str = "prompt",
    answer: str = "completion",
    most: int | None = None,
) -> Tokens:
    """The tokens of all chats of a source, with an end-of-text token between two, and which of them are answers.

    messages: the column of turns, [{"role": "user", "content": "..."}, ...]; None: the columns `prompt` and `answer`
    hold texts, or turns. Prompt and answer that are texts follow each other as they are.
    most: the first tokens only; then no more is read.
    Raises ValueError, with file and row, for rows that are no chats, chats without an answer, and turns that the
    template refuses; for a tokenizer without chat template, end-of-text token, or places of its tokens.

    >>> read_chats(TextSource("chats.jsonl"), tokenizer, messages="messages").answers
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError("Chats need a fast tokenizer, which says where its tokens stand; this one is slow.")
    ids, answered = array("i"), bytearray()
    head, end = head_of(tokenizer), end_of(tokenizer)
    chats = _chats(source, tokenizer, messages, (prompt, answer))
    while (most is None or len(ids) < most) and (some := list(islice(chats, _ROWS))):
        found = tokenizer(
            [chat.text for chat in some], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for chat, own, spans in zip(some, found["input_ids"], found["offset_mapping"], strict=True):
            loss = [any(start < right and stop > left for left, right in chat.answers) for start, stop in spans]
            if head and tuple(own[: len(head)]) == head:  # each window has it anyway
                own, loss = own[len(head) :], loss[len(head) :]
            if own[-1:] != [end]:
                own, loss = [*own, end], [*loss, chat.ends]
            ids.extend(own)
            answered.extend(loss)
    if not len(ids):
        raise ValueError(f"{source.source} holds no chat.")
    return Tokens(torch.frombuffer(ids, dtype=torch.int32), head, torch.frombuffer(answered, dtype=torch.bool))[
        slice(most)
    ]


def _chats(source: TextSource, tokenizer: Any, messages: str | None, pair: tuple[str, str]) -> Iterator[_Chat]:
    for place, values in source.rows(pair if messages is None else [messages]):
        if messages is None and all(isinstance(each, str) for each in values):
            before, after = (checked_text(each, place, column) for each, column in zip(values, pair, strict=True))
            if not after:
                raise ValueError(f"{place}, column {pair[1]!r}: the answer is empty; leave the row out.")
            yield _Chat(before + after, ((len(before), len(before) + len(after)),), ends=True)
        else:
            columns = pair if messages is None else [messages]
            turns = [_turns(each, place, column) for each, column in zip(values, columns, strict=True)]
            yield _rendered([turn for each in turns for turn in each], tokenizer, place)


def _turns(value: Any, place: str, column: str) -> list[dict[str, Any]]:
    turns = value if isinstance(value, list) else None
    if not turns or not all(isinstance(turn, dict) and "role" in turn and "content" in turn for turn in turns):
        raise ValueError(f'{place} is no chat; one is a list of turns, [{{"role": "user", "content": "..."}}, ...].')
    for turn in turns:
        if isinstance(turn["content"], str):
            checked_text(turn["content"], place, column)
    return turns


def _rendered(turns: list[dict[str, Any]], tokenizer: Any, place: str) -> _Chat:
    whole = _templated(turns, tokenizer, place)
    _check_contents(turns, whole, tokenizer, place)
    answers: list[tuple[int, int]] = []
    for number, turn in enumerate(turns):
        if turn["role"] == "assistant":
            before = _templated(turns[:number], tokenizer, place, asking=True)
            after = _templated(turns[: number + 1], tokenizer, place)
            if not (after.startswith(before) and whole.startswith(after)):
                raise ValueError(
                    f"{place}: the chat template writes turn {number + 1} otherwise when more follow, so it cannot be "
                    "told from them; give rows with one answer each."
                )
            answers.append((len(before), len(after.rstrip())))
    if not answers:
        raise ValueError(f"{place} holds no turn of the role 'assistant', so there is nothing to learn; leave it out.")
    return _Chat(whole, tuple(answers), ends=False)


def _check_contents(turns: list[dict[str, Any]], whole: str, tokenizer: Any, place: str) -> None:
    """Raise ValueError for parts of a message, or numbers, which a template that takes texts writes as Python does."""
    for number, turn in enumerate(turns):
        said = str(turn["content"])
        if isinstance(turn["content"], str) or said not in whole:
            continue
        if whole == _templated([*turns[:number], {**turn, "content": said}, *turns[number + 1 :]], tokenizer, place):
            raise ValueError(
                f"{place}: the chat template writes the content of turn {number + 1} as it stands in Python, "
                f"{said[:60]!r}; give a text there, or leave the row out."
            )


def _templated(turns: list[dict[str, Any]], tokenizer: Any, place: str, *, asking: bool = False) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(
            "The tokenizer has no chat template, which chats need; take an instruction-tuned model's tokenizer, or "
            "columns of prompt and answer."
        )
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asking)
    except Exception as error:  # templates are programs, and raise what they like
        raise ValueError(f"{place}: the chat template refuses these turns ({error}).") from None
