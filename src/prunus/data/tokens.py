"""Tokens of texts: how they are made, kept, cut into windows, and which windows a step sees.

    documents ─ chunks, tokenised side by side ─▶ a stream (N,) ─▶ windows | calibration | PackedTokens.at(step)

Streams are packed (no padding), and the batch of a step depends on (seed, step) alone, so a resumed run needs no state
of its data. Memory holds some chunks; a long stream is kept in a file under the hash of its text, and mapped.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.data.texts import TextSource
from prunus.machine import atomic, cache, generator_of

__all__ = [
    "IGNORED",
    "PackedTokens",
    "Tokens",
    "calibration",
    "end_of",
    "head_of",
    "labels",
    "mixed",
    "read_tokens",
    "tokenize",
    "tokenize_documents",
    "windows",
]

IGNORED = -100  # the label of a token that the loss leaves out
_CHUNK = 1 << 15  # characters that are tokenised as one
_OVERLAP = 1 << 10  # of two chunks of a text, so that they can be joined where they agree
_AGREE = 8  # tokens that must be the same on both sides of a join
_BATCH = 1 << 20  # characters that are tokenised side by side: 50 MB for a tokenizer
_HELD = 1 << 20  # tokens of a stream that stays in memory
_PIECE = 1 << 14  # tokens that a mixture takes from one place, where a text is longer than its share
_SMALL = 1 << 22  # bytes of text whose tokens are not worth a file

Blocks = Iterator[Sequence[int]]


@dataclass(frozen=True, eq=False)
class Tokens:
    """A stream of tokens with what belongs to it; a plain tensor stands for one without.

    ids: (N,), any integer type. head: what stands at the head of each window that is cut from it, such as the start
    token. answers: (N,) bool, the tokens that the loss is on; None: all.

    >>> windows(Tokens(torch.arange(6), head=(9,)), 4)
    tensor([[9, 0, 1, 2],
            [9, 3, 4, 5]])
    """

    ids: Tensor
    head: tuple[int, ...] = ()
    answers: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.numel()

    def part(self, start: float, stop: float) -> Tokens:
        """The share from `start` to `stop`, in [0, 1], of the stream."""
        return self[slice(*(round(share * len(self)) for share in (start, stop)))]

    def __getitem__(self, place: slice) -> Tokens:
        return Tokens(self.ids[place], self.head, None if self.answers is None else self.answers[place])


def head_of(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text: the start token, with many models; often nothing.

    A model that was trained with it in front of every text needs it in front of every window.

    >>> head_of(tokenizer)
    ()
    """
    plain = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    whole = list(tokenizer("a", verbose=False)["input_ids"])
    starts = [place for place in range(len(whole)) if whole[place : place + len(plain)] == plain]
    return tuple(whole[: starts[0]]) if starts else ()


def tokenize(texts: Iterable[str], tokenizer: Any, *, separator: str = "\n\n") -> Tensor:
    """The token stream (N,) int64 of all texts, or of one, joined by `separator`, without special tokens.

    This is the usual protocol for perplexity: one long text. For many long documents see `tokenize_documents`; for what
    stands at the head of windows, `head_of`. Raises: ValueError when there is nothing to tokenise.

    >>> tokenize(["one", "two"], tokenizer).dtype
    torch.int64
    """
    return _stored(_encoded([_joined(((text,) for text in _each(texts)), separator)], tokenizer)).long()


def tokenize_documents(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """The token stream (N,) int64 of the documents in order, each followed by the end-of-text token.

    Raises: ValueError when there is no text or the tokenizer has no end-of-text token.

    >>> int(tokenize_documents(["one"], tokenizer)[-1]) == tokenizer.eos_token_id
    True
    """
    end = torch.tensor([end_of(tokenizer)])
    return torch.cat([_stored(_encoded(((text,) for text in _each(texts)), tokenizer)).long(), end])


def read_tokens(source: TextSource, tokenizer: Any, *, join: str | None = "\n\n", most: int | None = None) -> Tokens:
    """The tokens of a source, whose texts are joined by `join`, or if that is None separated by the end-of-text token.

    most: the first tokens only; then no more is read. A long stream is tokenised once: it is written to
    `$PRUNUS_CACHE/tokens`, by default in `~/.cache/prunus`, under the hash of texts and tokenizer, and mapped.
    Raises ValueError as `TextSource.documents`, for a source without a character, and without an end-of-text token.

    >>> len(read_tokens(TextSource("embedded", split="test"), tokenizer, most=100))
    100
    """
    path = None if most is not None else _place(source, tokenizer, join)
    if path is not None and path.exists():
        return Tokens(_mapped(path), head_of(tokenizer))
    documents = source.documents()
    blocks = _encoded(documents if join is None else [_joined(documents, join)], tokenizer)
    return Tokens(_stored(blocks, path, most), head_of(tokenizer))


def end_of(tokenizer: Any) -> int:
    """The end-of-text token. Raises ValueError without one.

    >>> end_of(tokenizer)
    1
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, which separates documents; set one, or join them by a text.")
    return int(tokenizer.eos_token_id)


def mixed(streams: Sequence[Tokens], weights: Sequence[float], total: int | None = None) -> Tokens:
    """One stream in which each of `streams` has a share of the tokens as `weights` say, one after another.

    A stream that is longer than its share gives pieces from all over it: what lies sorted, by author or by kind, is
    all seen. total: how many tokens there are in all; a stream that is too short for its share is repeated. None: as
    many as there can be without repeating any. Raises ValueError for weights that are not positive, empty streams.

    >>> mixed([Tokens(torch.arange(4)), Tokens(torch.arange(90, 96))], [1, 3]).ids
    tensor([ 0,  1, 90, 91, 92, 93, 94, 95])
    """
    if min(weights) <= 0:
        raise ValueError(f"Weights of texts are above 0; got {list(weights)}.")
    empty = next((place for place, each in enumerate(streams, 1) if not len(each)), None)
    if empty is not None:
        raise ValueError(f"text {empty} of the mixture holds no token; give more text, or a larger part of it.")
    shares = [weight / sum(weights) for weight in weights]
    whole = min(len(each) / share for each, share in zip(streams, shares, strict=True)) if total is None else total
    parts = [_of_length(each, round(share * whole)) for each, share in zip(streams, shares, strict=True)]
    answered = any(each.answers is not None for each in parts)
    answers = [torch.ones(len(each), dtype=torch.bool) if each.answers is None else each.answers for each in parts]
    return Tokens(torch.cat([each.ids for each in parts]), parts[0].head, torch.cat(answers) if answered else None)


def windows(tokens: Tensor | Tokens, length: int) -> Tensor:
    """The non-overlapping windows (n, length) of a stream of N tokens, each with its head; the rest is dropped.

    n = floor(N / (length - head)). Raises: ValueError when the stream is shorter than one window.

    >>> windows(torch.arange(7), 3)
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    stream = _stream(tokens, length)
    return _headed(_cut(stream.ids, length - len(stream.head)), stream.head)


def labels(tokens: Tensor | Tokens, length: int) -> Tensor:
    """The labels (n, length) of `windows`: their own tokens, and IGNORED where no loss is; a model predicts label i + 1
    from the tokens up to i.

    >>> labels(Tokens(torch.arange(4), answers=torch.tensor([False, False, True, True])), 4)
    tensor([[-100, -100,    2,    3]])
    """
    stream = _stream(tokens, length)
    inside = length - len(stream.head)
    own = _cut(stream.ids, inside)
    if stream.answers is not None:
        own = own.masked_fill(~_cut(stream.answers, inside), IGNORED)
    return _headed(own, (IGNORED,) * len(stream.head))


@dataclass(frozen=True)
class PackedTokens:
    """A token stream (N,) cut into windows of `length`, served in an order that is a pure function of seed and step.

    The windows of an epoch are permuted afresh; a batch may reach from one epoch into the next, so every window is seen
    once in each epoch, whatever the batch size. `tokens` may be any integer type on any device. Windows in which no
    answer is predicted are left out.

    >>> PackedTokens(torch.arange(64), 8).at(0, batch=4, seed=0).shape
    torch.Size([4, 8])
    """

    tokens: Tensor | Tokens
    length: int

    def __len__(self) -> int:
        """The number of windows."""
        stream = _as_stream(self.tokens)
        return len(stream) // (self.length - len(stream.head)) if self._answered is None else len(self._answered)

    def at(self, step: int, *, batch: int, seed: int, rank: int = 0, world: int = 1) -> Tensor:
        """The windows (batch / world, length) int64 of a step: rank r of the world takes the r-th slice of the batch.

        Raises: ValueError when the batch does not divide among the ranks or the stream is shorter than one window.
        """
        if batch < 1 or batch % world or not 0 <= rank < world:
            raise ValueError(
                f"A batch of {batch} cannot be split for rank {rank} of {world}; use a multiple of {world}."
            )
        return self._rows(step * batch + rank * (batch // world), batch // world, seed)[0]

    def batch(self, step: int, *, batch: int, seed: int) -> Tensor | tuple[Tensor, Tensor]:
        """What `next_token_loss` takes: the windows of a step, with their `labels` beside them if there are answers."""
        ids, wanted = self._rows(step * batch, batch, seed)
        return ids if self._answered is None else (ids, wanted)

    def _rows(self, first: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
        stream = _stream(self.tokens, self.length)
        places = torch.tensor([_window_at(len(self), seed, place) for place in range(first, first + count)])
        chosen = places if self._answered is None else self._answered[places]
        return _rows(stream, self.length, chosen.to(stream.ids.device))

    @cached_property
    def _answered(self) -> Tensor | None:
        """Which windows are trained on, (n,) int64; None: all."""
        stream = _stream(self.tokens, self.length)
        if stream.answers is None:
            return None
        found = (labels(stream, self.length)[:, 1:] != IGNORED).any(1).nonzero().flatten()
        if not len(found):
            raise ValueError(f"No window of {self.length} tokens holds a part of an answer; give other chats.")
        return found


def calibration(tokens: Tensor | Tokens, samples: int, length: int, seed: int) -> Tensor:
    """Random windows (samples, length) int64 of a stream of N tokens, each with its head, without overlap where the
    stream is long enough.

    With fewer tokens than that the windows start at distinct random places and overlap.
    Raises: ValueError, with the tokens needed, when there are fewer than `samples` distinct places.

    >>> calibration(torch.arange(100), 4, 8, seed=0).shape
    torch.Size([4, 8])
    """
    stream = _as_stream(tokens)
    inside = length - len(stream.head)
    available, needed = len(stream), inside + samples - 1
    if available < needed or samples < 1 or inside < 1:
        raise ValueError(
            f"{samples} calibration windows of {length} tokens need at least {needed} tokens; there are {available}. "
            "Give more text, fewer samples or shorter windows."
        )
    generator = torch.Generator().manual_seed(seed)
    if available >= samples * inside:
        slack = int(torch.randint(available % inside + 1, (), generator=generator))
        whole = _cut(stream.ids[slack:], inside)
        rows = whole[torch.randperm(len(whole), generator=generator)[:samples].to(stream.ids.device)]
    else:
        starts = torch.randperm(available - inside + 1, generator=generator)[:samples]
        rows = stream.ids[(starts[:, None] + torch.arange(inside)).to(stream.ids.device)]
    return _headed(rows.long(), stream.head)  # (samples, length)


# Windows.


def _as_stream(tokens: Tensor | Tokens) -> Tokens:
    return tokens if isinstance(tokens, Tokens) else Tokens(tokens)


def _stream(tokens: Tensor | Tokens, length: int) -> Tokens:
    """The stream, if it holds a window of `length`."""
    stream = _as_stream(tokens)
    if stream.ids.dim() != 1:
        raise ValueError(f"Tokens must be one stream of shape (N,); got shape {tuple(stream.ids.shape)}.")
    if length <= len(stream.head) or len(stream) < length - len(stream.head):
        raise ValueError(f"{len(stream)} tokens hold no window of {length}; give more text or a shorter window.")
    return stream


def _rows(stream: Tokens, length: int, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen windows and their labels, (n, length) int64."""
    inside = length - len(stream.head)
    rows = _cut(stream.ids, inside)[chosen].long()
    answers = None if stream.answers is None else _cut(stream.answers, inside)[chosen]
    own = rows if answers is None else rows.masked_fill(~answers, IGNORED)
    return _headed(rows, stream.head), _headed(own, (IGNORED,) * len(stream.head))


def _cut(stream: Tensor, length: int) -> Tensor:
    count = stream.numel() // length
    return stream[: count * length].view(count, length)


def _headed(rows: Tensor, head: tuple[int, ...]) -> Tensor:
    if not head:
        return rows
    return torch.cat([torch.tensor(head, dtype=rows.dtype, device=rows.device).expand(len(rows), -1), rows], 1)


def _window_at(count: int, seed: int, place: int) -> int:
    return _permutation(count, seed, place // count)[place % count]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    return torch.randperm(count, generator=generator_of(seed, epoch)).tolist()


def _of_length(stream: Tokens, count: int) -> Tokens:
    """`count` tokens: pieces at equal distances of a longer stream, a shorter one said again and again."""
    if count < len(stream):
        cuts = _cuts(len(stream), count)
        answers = None if stream.answers is None else torch.cat([stream.answers[cut] for cut in cuts])
        return Tokens(torch.cat([stream.ids[cut] for cut in cuts]), stream.head, answers)
    times = -(-count // len(stream))
    answers = None if stream.answers is None else stream.answers.repeat(times)[:count]
    return Tokens(stream.ids.repeat(times)[:count], stream.head, answers)


def _cuts(available: int, count: int) -> list[slice]:
    """Where the pieces lie: the first at the beginning, the last at the end, alike within a token."""
    pieces = max(1, count // _PIECE)
    between = [(available - count) * place // max(1, pieces - 1) for place in range(pieces)]  # left out before each
    ends = [count * place // pieces for place in range(pieces + 1)]
    return [slice(ends[place] + between[place], ends[place + 1] + between[place]) for place in range(pieces)]


# Tokenising.


def _each(texts: Iterable[str]) -> Iterable[str]:
    """The texts; a string is one, not one a character."""
    return [texts] if isinstance(texts, str) else texts


def _joined(documents: Iterable[Iterable[str]], separator: str) -> Iterator[str]:
    for place, document in enumerate(documents):
        if place:
            yield separator
        yield from document


def _encoded(documents: Iterable[Iterable[str]], tokenizer: Any) -> Blocks:
    """The ids of the documents in blocks, with the end-of-text token between two, and no other special token; empty
    ones are left out.

    A chunk of a long document begins with the end of the one before, and takes over in the middle of that, where both
    read the same: so the ids are those of the whole document at once. Chunks are tokenised side by side.
    """
    fast = getattr(tokenizer, "is_fast", False)  # the others do not say where a token stands
    before, begun = _Encoded([], []), False
    for batch in _batches(_chunks(documents, _CHUNK if fast else sys.maxsize)):
        long = any(follows or not ends for _, follows, ends in batch)
        for (text, follows, ends), here in zip(
            batch, _encode(tokenizer, [each[0] for each in batch], long), strict=True
        ):
            if follows:
                taken, given = _agreeing(before, here)
                yield before.ids[:taken]
                rest = [text[_OVERLAP:]]
                here = _encode(tokenizer, rest, long, _OVERLAP)[0] if given is None else here.after(given)
            elif begun and here.ids:
                yield [end_of(tokenizer)]
            begun |= bool(here.ids)
            if ends:
                yield here.ids
            before = here


@dataclass(frozen=True)
class _Encoded:
    """The ids of a chunk, and where in it each starts, in characters."""

    ids: list[int]
    starts: list[int]

    def after(self, place: int) -> _Encoded:
        return _Encoded(self.ids[place:], self.starts[place:])


def _encode(tokenizer: Any, texts: list[str], placed: bool, offset: int = 0) -> list[_Encoded]:
    """placed: whether it matters where tokens start. offset: where the texts themselves start."""
    how = {"return_offsets_mapping": True} if placed else {}
    found = tokenizer(texts, add_special_tokens=False, verbose=False, **how)
    spans: list[list[tuple[int, int]]] = found["offset_mapping"] if placed else [[] for _ in texts]
    return [
        _Encoded(ids, [start + offset for start, _ in of]) for ids, of in zip(found["input_ids"], spans, strict=True)
    ]


def _agreeing(before: _Encoded, here: _Encoded) -> tuple[int, int | None]:
    """How many tokens of a chunk are taken, and from which one on the next goes on; None: they agree nowhere."""
    shift, middle = _CHUNK - _OVERLAP, _OVERLAP // 2
    first = {start - shift: place for place, start in reversed([*enumerate(before.starts)]) if start >= shift + middle}
    other = {start: place for place, start in reversed([*enumerate(here.starts)]) if middle <= start < _OVERLAP}
    for start in sorted(first.keys() & other.keys()):
        one, two = first[start], other[start]
        agreeing = before.ids[one : one + _AGREE]
        if len(agreeing) == _AGREE and agreeing == here.ids[two : two + _AGREE]:
            return one, two
    return len(before.ids), None


def _chunks(documents: Iterable[Iterable[str]], size: int) -> Iterator[tuple[str, bool, bool]]:
    """(text, whether it overlaps with the one before, whether its document ends)."""
    for document in documents:
        held, follows = "", False
        for piece in document:
            held += piece
            while len(held) > size:
                yield held[:size], follows, False
                held, follows = held[size - _OVERLAP :], True
        yield held, follows, True


def _batches(chunks: Iterator[tuple[str, bool, bool]]) -> Iterator[list[tuple[str, bool, bool]]]:
    batch: list[tuple[str, bool, bool]] = []
    size = 0
    for chunk in chunks:
        batch.append(chunk)
        size += len(chunk[0]) + 64  # a token or two for an empty one, too
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Keeping.


def _stored(blocks: Blocks, path: Path | None = None, most: int | None = None) -> Tensor:
    """The ids (N,) int32; in a file, mapped, if there are many and a path is given."""
    held = array("i")
    for ids in blocks:
        held.extend(ids)
        if most is not None and len(held) >= most:
            break
        if path is not None and len(held) > _HELD:
            with atomic(path) as partial, partial.open("wb") as file:
                for each in chain([held], blocks):
                    array("i", each).tofile(file)
            return _mapped(path)
    if not len(held):
        raise ValueError("The texts hold no character; there is nothing to tokenise.")
    return torch.frombuffer(held, dtype=torch.int32)[:most]


def _mapped(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=False, size=path.stat().st_size // 4, dtype=torch.int32)


def _place(source: TextSource, tokenizer: Any, join: str | None) -> Path | None:
    """The file of the tokens of a source, by contents; None for short ones, data sets and slow tokenizers."""
    files = source.files()
    if not getattr(tokenizer, "is_fast", False) or sum(path.stat().st_size for path in files) < _SMALL:
        return None
    made = blake2b(f"2 {join!r} {tokenizer.eos_token_id} ".encode(), digest_size=20)
    made.update(tokenizer.backend_tokenizer.to_str().encode())
    made.update(repr((source.column, [(path.suffixes, path.stat().st_size) for path in files])).encode())
    for path in files:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                made.update(piece)
    return cache("tokens") / f"{made.hexdigest()}.int32"
