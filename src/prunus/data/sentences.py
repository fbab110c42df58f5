"""Texts with what is said of them, as a tokenizer makes tensors of them; and their batches as functions of the step.

    rows of a file ─▶ tokenizer ─▶ Sentences: fields (N, L), labels (N,) ─▶ batches as long as their longest text

A label is a class or a number. Embeddings need none: then each text stands for itself, and a `.txt` file is cut into
sentences.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from prunus.data.images import split_places
from prunus.data.texts import TextSource, checked_text
from prunus.machine import generator_of

__all__ = ["Aim", "SentenceBatches", "Sentences", "read_sentences", "sentence_batches"]

Aim = Literal["classes", "values", "embeddings"]
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
_WORDS = 3  # of a sentence that a text is cut into, at least
# A value, or a whole number that a tool wrote so.
_DECIMAL = re.compile(r"[+-]?(\d+\.\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Sentences:
    """Texts and their labels. fields: what the tokenizer returned, (N, L) int32 each, among them attention_mask.

    labels: (N,), int64 in [0, classes) or float32 values, zeros where nothing is said. names: of the classes.

    >>> mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    >>> len(Sentences({"input_ids": mask * 7, "attention_mask": mask}, torch.tensor([0, 1]), ("bad", "good")))
    2
    """

    fields: Mapping[str, Tensor]
    labels: Tensor
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> int:
        """How many there are; 0 of values, and where nothing is said."""
        return len(self.names)

    @property
    def length(self) -> int:
        """Tokens of the longest text."""
        return self.fields["attention_mask"].shape[1]

    def to(self, device: torch.device | str) -> Sentences:
        """The same texts on `device`."""
        return Sentences(
            {key: each.to(device) for key, each in self.fields.items()}, self.labels.to(device), self.names
        )

    def take(self, index: Tensor) -> Sentences:
        """The texts at `index` (n,) int64, in that order."""
        index = index.to(self.labels.device)
        return Sentences({key: each[index] for key, each in self.fields.items()}, self.labels[index], self.names)

    def split(self, share: float, seed: int) -> tuple[Sentences, Sentences]:
        """(the rest, round(share * N) held out), as `Images.split`."""
        rest, held = split_places(len(self), share, seed)
        return self.take(rest), self.take(held)

    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Keywords (N, length) int64 of a model, without the columns that all texts are padded in, and labels (N,)."""
        used = self.fields["attention_mask"].any(0)
        return {key: each[:, used].long() for key, each in self.fields.items()}, self.labels


class SentenceBatches:
    """Training batches as a pure function: step -> (keywords, labels), each epoch of N // B steps in its own order.

    order_seed: of the order in place of `seed`. Raises ValueError for a batch size outside 1..N.

    >>> mask = torch.ones(3, 4, dtype=torch.int32)
    >>> SentenceBatches(Sentences({"attention_mask": mask}, torch.zeros(3)), batch_size=2)(0)[1]
    tensor([0., 0.])
    """

    def __init__(self, texts: Sentences, *, batch_size: int, seed: int = 0, order_seed: int | None = None) -> None:
        if not 1 <= batch_size <= len(texts):
            raise ValueError(f"a batch has 1 to {len(texts)} texts, as many as there are; got {batch_size}")
        self.texts, self.batch_size = texts, batch_size
        self.seed = seed if order_seed is None else order_seed
        self.epoch_steps = len(texts) // batch_size
        self._epoch: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """The batch of a step."""
        epoch, place = divmod(step, self.epoch_steps)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, torch.randperm(len(self.texts), generator=generator_of(self.seed, epoch))
        return self.texts.take(self._epoch[1][place * self.batch_size :][: self.batch_size]).batch()


def sentence_batches(texts: Sentences, *, batch_size: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """All texts in order as (keywords, labels); the last may be smaller.

    >>> mask = torch.ones(3, 4, dtype=torch.int32)
    >>> texts = Sentences({"attention_mask": mask}, torch.zeros(3))
    >>> [len(labels) for _, labels in sentence_batches(texts, batch_size=2)]
    [2, 1]
    """
    for index in torch.arange(len(texts)).split(batch_size):
        yield texts.take(index).batch()


def read_sentences(
    source: str,
    tokenizer: Any,
    aim: Aim = "classes",
    columns: Sequence[str] = ("text",),
    *,
    label: str = "label",
    split: str | None = None,
    length: int = 128,
    names: Sequence[str] = (),
) -> Sentences:
    """The texts of a source of `read_texts`, tokenized, the first `length` tokens of each.

    columns: of the text, or of two that are read together (of embeddings each is a text of its own). label: column of
    the class, a name or whole number (1.0 is neither, in a table too), or of the value. names: the classes that a model
    knows, if these or their numbers are those of the file; otherwise classes are numbered in their order.
    Raises what `read_texts` raises; ValueError for a row without text or label, with its place, for values that are no
    numbers, and for a tokenizer without a padding token.

    >>> read_sentences("reviews.csv", tokenizer).classes
    2
    """
    asked = TextSource(source, column=columns[0], split=split)
    labels, classes = torch.zeros(0), ()
    if aim == "embeddings":
        texts = list(dict.fromkeys(text for column in columns for text in _alone(asked, column)))
        labels = torch.zeros(len(texts))
        parts = [texts]
    else:
        rows = list(asked.rows([*columns, label]))
        parts = [[checked_text(row[i], place, column) for place, row in rows] for i, column in enumerate(columns)]
        if aim == "values":
            labels = torch.tensor([_value(row[-1], place, label) for place, row in rows])
        else:
            numbers, classes = _numbered([_class(row[-1], place, label) for place, row in rows], names)
            labels = torch.tensor(numbers)
    if not parts[0]:
        raise ValueError(f"{source!r} holds no text")
    if tokenizer.pad_token is None:
        raise ValueError("the tokenizer has no padding token: set pad_token in its tokenizer_config.json")
    made = tokenizer(*parts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    return Sentences({key: each.int() for key, each in made.items()}, labels, classes)


def _alone(asked: TextSource, column: str) -> Iterator[str]:
    """Texts without labels: rows of tables as they are, the sentences of other files."""
    if any(path.name.endswith((".txt", ".txt.gz")) for path in asked.files()):
        for document in asked.documents():
            found = (each.strip() for each in _SENTENCE.split("".join(document)))
            yield from (each for each in found if len(each.split()) >= _WORDS)
        return
    yield from (checked_text(value, place, column) for place, (value,) in asked.rows([column]))


def _class(value: Any, place: str, column: str) -> str:
    if not isinstance(value, str | int) or value == "" or _DECIMAL.fullmatch(str(value)):
        raise ValueError(
            f"{place}, column {column!r}: {value!r} is no class; give a name or a whole number, or take aim: values"
        )
    return str(int(value) if isinstance(value, bool) else value)


def _value(value: Any, place: str, column: str) -> float:
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = float("nan")
    if not abs(found) < float("inf"):
        raise ValueError(f"{place}, column {column!r}: {value!r} is no number; mend the row, or take aim: classes")
    return found


def _numbered(values: Sequence[str], names: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """The number of each class, and the names of all in the order of their numbers."""
    found = set(values)
    whole = all(name.removeprefix("-").isdecimal() for name in found)
    ordered = sorted(found, key=int if whole else str)
    known = next(each for each in (names, [str(i) for i in range(len(names))], ordered) if found <= set(each))
    numbers = {name: place for place, name in enumerate(known)}
    return [numbers[value] for value in values], tuple(known)
