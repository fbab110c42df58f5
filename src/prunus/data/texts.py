"""Text and tokens: where they are read, how they are packed, which batch a step sees.

Everything here is a plain value or a pure function. Sequences are packed (no padding), and the batch of a step depends
on (seed, step) alone, so a resumed run needs no state of its data.

    read_texts -> tokenize -> windows | calibration | PackedTokens(tokens, length).at(step, batch=..., seed=...)
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunus.machine import import_extra

__all__ = ["ASSETS", "SPLITS", "PackedTokens", "calibration", "read_texts", "tokenize", "tokenize_documents", "windows"]

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "validation", "test")
_ENDINGS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+){0,2}")


def read_texts(
    source: str | Path, *, column: str = "text", split: str | None = None, most: int | None = None
) -> list[str]:
    """The texts of a file, a folder, the embedded excerpts, or a Hugging Face data set, in their order.

    source: `.txt[.gz]` (one text), `.jsonl[.gz]` or `.parquet` (one text a row, from `column`); a folder that holds one
    file for each split (`test.parquet`, `train-00000-of-00002.parquet`); "embedded" (excerpts of novels that the
    embedded model never saw); or "owner/name[:config[:split]]", which needs `pip install prunus[datasets]`.
    most: the first texts only. Rows are then streamed: of a large data set or file no more is fetched than is read.

    Raises: FileNotFoundError for a missing file or split, ValueError for an unknown ending, column or split,
    ImportError when the data sets package is missing.

    >>> len(read_texts("embedded", split="test"))
    1
    """
    return list(islice(_texts(source, column, split, streaming=most is not None), most))


def _texts(source: str | Path, column: str, split: str | None, *, streaming: bool) -> Iterable[str]:
    if str(source) == "embedded":
        return (path.read_text(encoding="utf-8") for path in _embedded(split))
    path = Path(source)
    if path.is_dir():
        return (text for file in _files_of_split(path, split) for text in _read_file(file, column))
    if path.exists() or not _HUB_NAME.fullmatch(str(source)) or path.name.endswith(_ENDINGS):
        if split is not None:
            raise ValueError(f"split={split!r} was given, but {path} is one file: drop the split or name the folder.")
        return _read_file(path, column)
    return _read_hub(str(source), column, split, streaming=streaming)


def tokenize(texts: Sequence[str], tokenizer: Any, *, separator: str = "\n\n") -> Tensor:
    """The token stream (N,) int64 of all texts joined by `separator`, special tokens as the tokenizer adds them once.

    This is the usual protocol for perplexity: one long text. For many long documents see `tokenize_documents`.
    Raises: ValueError when there is nothing to tokenise.

    >>> tokenize(["one", "two"], tokenizer).dtype
    torch.int64
    """
    joined = separator.join(texts)
    if not joined:
        raise ValueError(f"{len(texts)} texts hold no character; there is nothing to tokenise.")
    return torch.tensor(tokenizer(joined, verbose=False)["input_ids"], dtype=torch.int64)


def tokenize_documents(texts: Sequence[str], tokenizer: Any) -> Tensor:
    """The token stream (N,) int64 of the documents in order, each followed by the end-of-text token.

    Documents are encoded in parallel and without other special tokens.
    Raises: ValueError when there is no text or the tokenizer has no end-of-text token.

    >>> int(tokenize_documents(["one"], tokenizer)[-1]) == tokenizer.eos_token_id
    True
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no eos_token, which separates documents; set one or use tokenize().")
    if not any(texts):
        raise ValueError(f"{len(texts)} texts hold no character; there is nothing to tokenise.")
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.cat([torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.int64) for ids in encoded])


def windows(tokens: Tensor, length: int) -> Tensor:
    """The floor(N / length) non-overlapping windows (n, length) of the stream tokens (N,); the rest is dropped.

    Raises: ValueError when the stream is shorter than one window.

    >>> windows(torch.arange(7), 3)
    tensor([[0, 1, 2],
            [3, 4, 5]])
    """
    _check_stream(tokens, length)
    count = tokens.numel() // length
    return tokens[: count * length].view(count, length)  # (n, length)


@dataclass(frozen=True)
class PackedTokens:
    """A token stream (N,) cut into windows of `length`, served in an order that is a pure function of seed and step.

    The windows of an epoch are permuted afresh; a batch may reach from one epoch into the next, so every window is seen
    once in each epoch, whatever the batch size. `tokens` may be any integer type on any device.

    >>> PackedTokens(torch.arange(64), 8).at(0, batch=4, seed=0).shape
    torch.Size([4, 8])
    """

    tokens: Tensor
    length: int

    def __len__(self) -> int:
        """The number of windows, floor(N / length)."""
        return self.tokens.numel() // self.length

    def at(self, step: int, *, batch: int, seed: int, rank: int = 0, world: int = 1) -> Tensor:
        """The windows (batch / world, length) int64 of a step: rank r of the world takes the r-th slice of the batch.

        Raises: ValueError when the batch does not divide among the ranks or the stream is shorter than one window.
        """
        _check_stream(self.tokens, self.length)
        if batch < 1 or batch % world or not 0 <= rank < world:
            raise ValueError(
                f"A batch of {batch} cannot be split for rank {rank} of {world}; use a multiple of {world}."
            )
        share = batch // world
        start = step * batch + rank * share
        chosen = torch.tensor([_window_at(len(self), seed, place) for place in range(start, start + share)])
        return windows(self.tokens, self.length)[chosen.to(self.tokens.device)].long()


def calibration(tokens: Tensor, samples: int, length: int, seed: int) -> Tensor:
    """Random windows (samples, length) of the stream tokens (N,), without overlap where the stream is long enough.

    With fewer than samples * length tokens the windows start at distinct random places and overlap.
    Raises: ValueError, with the tokens needed, when there are fewer than `samples` distinct places.

    >>> calibration(torch.arange(100), 4, 8, seed=0).shape
    torch.Size([4, 8])
    """
    available, needed = tokens.numel(), length + samples - 1
    if available < needed or samples < 1 or length < 1:
        raise ValueError(
            f"{samples} calibration windows of {length} tokens need at least {needed} tokens; there are {available}. "
            "Give more text, fewer samples or shorter windows."
        )
    generator = torch.Generator().manual_seed(seed)
    if available >= samples * length:
        slack = int(torch.randint(available % length + 1, (), generator=generator))
        whole = windows(tokens[slack:], length)
        return whole[torch.randperm(len(whole), generator=generator)[:samples].to(tokens.device)]
    starts = torch.randperm(available - length + 1, generator=generator)[:samples]
    return tokens[(starts[:, None] + torch.arange(length)).to(tokens.device)]  # (samples, length)


def _window_at(count: int, seed: int, place: int) -> int:
    return _permutation(count, seed, place // count)[place % count]


@lru_cache(maxsize=4)
def _permutation(count: int, seed: int, epoch: int) -> list[int]:
    # Seeds are mixed by a large odd factor, so that (seed, epoch) and (seed + 1, epoch - 1) do not coincide.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + epoch) % 2**63)
    return torch.randperm(count, generator=generator).tolist()


def _check_stream(tokens: Tensor, length: int) -> None:
    if tokens.dim() != 1:
        raise ValueError(f"Tokens must be one stream of shape (N,); got shape {tuple(tokens.shape)}.")
    if length < 1 or tokens.numel() < length:
        raise ValueError(f"{tokens.numel()} tokens hold no window of {length}; give more text or a shorter window.")


def _embedded(split: str | None) -> list[Path]:
    if split is not None and split not in SPLITS:
        raise ValueError(f"The embedded text has the splits {', '.join(SPLITS)}; {split!r} is none of them.")
    return [ASSETS / "text" / f"{name}.txt" for name in ((split,) if split else SPLITS)]


def _files_of_split(folder: Path, split: str | None) -> list[Path]:
    if split is None:
        raise ValueError(f"{folder} is a folder: say which split to read, for example split='test'.")
    found = sorted(
        file
        for file in folder.iterdir()
        if file.name.endswith(_ENDINGS) and re.fullmatch(rf"{re.escape(split)}([-.].*)", file.name)
    )
    if not found:
        raise FileNotFoundError(f"{folder} holds no file of split {split!r} (looked for {split}*{'|'.join(_ENDINGS)}).")
    return found


# Files are read with what the package needs anyway. The data sets package would want one type for a key in all rows,
# and keeps a copy of each file.


def _read_file(path: Path, column: str) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"No text file {path}; check the path (it is relative to {Path.cwd()}).")
    if not path.name.endswith(_ENDINGS):
        raise ValueError(f"{path} ends in none of {', '.join(_ENDINGS)}; convert it or rename it.")
    if path.suffix == ".parquet":
        return _read_parquet(path, column)
    return _read_lines(path, None if path.name.endswith((".txt", ".txt.gz")) else column)


def _read_lines(path: Path, column: str | None) -> Iterator[str]:
    """The column of each row of JSON lines; without one the whole text, with the line ends that the file has."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8", newline="\n") as file:
        if column is None:
            yield file.read()
            return
        for number, line in enumerate(file, 1):
            if line != "\n":
                row = json.loads(line)
                _check_column(f"{path}, line {number}", column, row)
                yield row[column]


def _read_parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow.parquet  # slow to import, needed for this ending only

    table = pyarrow.parquet.ParquetFile(path)
    _check_column(str(path), column, table.schema_arrow.names)
    for batch in table.iter_batches(columns=[column]):
        yield from batch.column(column).to_pylist()


def _read_hub(name: str, column: str, split: str | None, *, streaming: bool) -> Iterable[str]:
    datasets = import_extra("datasets", "datasets", f"There is no file {name!r}, and reading data sets needs the extra")
    owner_name, *rest = name.split(":")
    split = split or (rest[1] if len(rest) > 1 else "train")
    rows = datasets.load_dataset(owner_name, rest[0] if rest else None, split=split, streaming=streaming)
    _check_column(name, column, rows.column_names or [column])
    return rows[column] if not streaming else (row[column] for row in rows)


def _check_column(place: str, column: str, names: Collection[str]) -> None:
    if column not in names:
        raise ValueError(f"{place} has no column {column!r}, only {list(names)}; name one of them with column=.")
