"""Where texts come from: files, folders, the embedded excerpts, Hugging Face data sets.

    source ─▶ rows, one at a time, with the place where each stands ─▶ documents, each in pieces

Nothing is kept: memory holds a row, or a piece of a long text. A row that is no text is refused with its place.
Files are read with what the package needs anyway: the data sets package would want one type for a key in all rows, and
keeps a copy of each file.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from prunus.machine import import_extra, read_json

__all__ = ["ASSETS", "ENDINGS", "SPLITS", "WRITTEN", "TextSource", "read_texts"]

ASSETS = Path(__file__).parent / "assets"
SPLITS = ("train", "validation", "test")
WRITTEN = "written.json"  # beside texts that a model writes: what was asked for, and `tokens` once all are there
ENDINGS = (*(kind + gz for kind in (".txt", ".jsonl", ".csv", ".tsv") for gz in ("", ".gz")), ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?(:[\w.-]+){0,2}")
_PIECE = 1 << 20  # characters of a long text at once
_ROWS = 256  # of a parquet file at once

Row = tuple[str, list[Any]]  # where it stands, and the values of the columns that are asked for


def read_texts(
    source: str | Path,
    *,
    column: str = "text",
    split: str | None = None,
    revision: str | None = None,
    most: int | None = None,
) -> list[str]:
    """The texts of a file, a folder, the embedded excerpts, or a Hugging Face data set, in their order.

    source: `.txt` (one text), `.jsonl`, `.csv`, `.tsv` (each also with `.gz`) or `.parquet` (one text a row, from
    `column`); a folder of such files, or with some for each split (`test.parquet`, `train-00000-of-00002.parquet`,
    `train/a.txt`);
    "embedded" (excerpts of novels that the embedded model never saw); or a data set "name" or "owner/name", with
    ":config" or ":config:split" behind it and a `revision`, which needs `pip install prunus[datasets]`.
    most: the first texts only; of a data set no more is then fetched than is read.

    Raises: FileNotFoundError for a missing file or split; ValueError for an unknown ending, column or split, a folder
    that a model has not written to the end, a damaged file, and a row that is no text, with file, row and column;
    ImportError without the data sets package.

    >>> len(read_texts("embedded", split="test"))
    1
    """
    asked = TextSource(str(source), column=column, split=split, revision=revision, streamed=most is not None)
    return ["".join(document) for document in islice(asked.documents(), most)]


@dataclass(frozen=True)
class TextSource:
    """Where texts or chats are read from; `source`, `column`, `split` and `revision` as in `read_texts`.

    streamed: fetch the rows of a data set while they are read, and keep none on disk.

    >>> next(iter(TextSource("embedded", split="test").documents()))
    """

    source: str
    column: str = "text"
    split: str | None = None
    revision: str | None = None
    streamed: bool = False

    def documents(self) -> Iterator[Iterable[str]]:
        """Each text as the pieces it consists of, to be read before the next one. Raises as `read_texts`."""
        if self._hub is not None:
            yield from self._texts(_hub_rows(self, [self.column]))
            return
        for path in self.files():
            if path.name.endswith((".txt", ".txt.gz")):
                yield _pieces(path)
            else:
                yield from self._texts(_file_rows(path, [self.column]))

    def rows(self, columns: Sequence[str]) -> Iterator[Row]:
        """The values of these columns, whatever they are, row by row. Raises as `read_texts`."""
        if self._hub is not None:
            yield from _hub_rows(self, columns)
            return
        for path in self.files():
            yield from _file_rows(path, columns)

    def files(self) -> list[Path]:
        """The local files that are read, in order; none of a data set. Raises for files that are not there."""
        if self.source == "embedded":
            return _embedded(self.split)
        path = Path(self.source).expanduser()
        if path.is_dir():
            return _files_of(path, self.split)
        if self._hub is not None:
            return []
        if self.split is not None:
            raise ValueError(f"split={self.split!r} was given, but {path} is one file: drop it, or name the folder.")
        if not path.is_file():
            raise FileNotFoundError(f"No text file {path}; check the path (it is relative to {Path.cwd()}).")
        if not path.name.endswith(ENDINGS):
            raise ValueError(f"{path} ends in none of {', '.join(ENDINGS)}; convert it or rename it.")
        return [path]

    @property
    def _hub(self) -> str | None:
        """The name of a data set, None for what is local."""
        path, name = Path(self.source).expanduser(), self.source
        local = name == "embedded" or path.exists() or name.endswith(ENDINGS) or not _HUB_NAME.fullmatch(name)
        return None if local else name

    def _texts(self, rows: Iterable[Row]) -> Iterator[Iterable[str]]:
        for place, (value,) in rows:
            yield (checked_text(value, place, self.column),)


def checked_text(value: Any, place: str, column: str) -> str:
    """The value, if it is a text that can be written as UTF-8. Raises ValueError with place and column."""
    if not isinstance(value, str):
        kinds = {type(None): "null", bool: "true or false", int: "a number", float: "a number", dict: "an object"}
        kind = kinds.get(type(value), "bytes" if isinstance(value, bytes) else "a list")
        mend = f"read chats with messages: {column}" if kind == "a list" else "leave the row out"
        raise ValueError(f"{place}, column {column!r}: {kind} is no text; {mend}, or name another column.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}, column {column!r}: half a character ({error.reason}); mend the row.") from None
    return value


# Files.


def _embedded(split: str | None) -> list[Path]:
    if split is not None and split not in SPLITS:
        raise ValueError(f"The embedded text has the splits {', '.join(SPLITS)}; {split!r} is none of them.")
    return [ASSETS / "text" / f"{name}.txt" for name in ((split,) if split else SPLITS)]


def _files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of a split, by their names or in its folder, or all of a folder without splits, at any depth."""
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.name.endswith(ENDINGS) and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if split is None:
        tops = {file: file.relative_to(folder).parts[0] for file in found}
        apart = {"train"} < set(SPLITS).intersection(tops.values())  # one alone may be of anything, such as tests
        named = (tops[file] if apart and tops[file] in SPLITS else file.name for file in found)
        parted = next((name for name in named if re.match(rf"({'|'.join(SPLITS)})([-.]|$)", name)), None)
        if parted is not None:
            raise ValueError(f"{folder} has splits ({parted}): say which to read, for example split='test'.")
    else:
        inside, named = folder / split, re.compile(rf"{re.escape(split)}[-.]")
        found = [file for file in found if named.match(file.name) or inside in file.parents]
    if not found:
        what = "text" if split is None else f"file of split {split!r}"
        raise FileNotFoundError(f"{folder} holds no {what} (looked for {split or ''}*{'|'.join(ENDINGS)}).")
    for place in sorted({file.parent for file in found}):
        _check_written(place)
    return found


def _check_written(folder: Path) -> None:
    path = folder / WRITTEN
    said = read_json(path) if path.is_file() else None
    if isinstance(said, dict) and {"key", "asked"} <= said.keys() and "tokens" not in said:
        raise ValueError(f"{folder} is not all written yet; give its `prunus write` again first.")


@contextmanager
def _opened(path: Path) -> Generator[BinaryIO]:
    """The bytes of a file; what is wrong with them names it."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield file  # type: ignore[misc] - gzip's file is one of bytes
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise ValueError(f"{path} is no UTF-8 (byte {wrong:#04x}, {error.reason}); save it as UTF-8.") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no whole gzip file ({error}); make it again.") from None


def _pieces(path: Path) -> Iterator[str]:
    """A text with the line ends that the file has, without a byte order mark."""
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="\n")
        yield from iter(lambda: text.read(_PIECE), "")


def _file_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        return _parquet_rows(path, columns)
    if kind == "txt":
        raise ValueError(f"{path} has no columns; chats and pairs are read from {', '.join(ENDINGS[2:])}.")
    return _json_rows(path, columns) if kind == "jsonl" else _csv_rows(path, columns, "\t" if kind == "tsv" else ",")


def _json_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            place, text = f"{path}, line {number}", line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text or text.isspace():
                continue
            try:
                row = json.loads(text)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{place} is no JSON ({error}); each line is an object of its own.") from None
            if not isinstance(row, dict):
                raise ValueError(f'{place} is no object; each line is one, such as {{"{columns[0]}": ...}}.')
            _check_columns(place, columns, row)
            yield place, [row[column] for column in columns]


def _csv_rows(path: Path, columns: Sequence[str], delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)  # the module's own, 131,072, is a matter of taste
    with _opened(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
        reader = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(reader, [])
            _check_columns(str(path), columns, names)
            chosen = [names.index(column) for column in columns]
            for row in reader:
                place = f"{path}, line {reader.line_num}"
                if row and len(row) != len(names):
                    raise ValueError(f"{place} has {len(row)} fields, the first line {len(names)}; put them in quotes.")
                if row:
                    yield place, [row[number] for number in chosen]
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num} is no row ({error}); mend its quotes.") from None


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow.parquet  # slow to import, needed for this ending only

    try:
        table = pyarrow.parquet.ParquetFile(path)
        _check_columns(str(path), columns, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=_ROWS, columns=list(columns)):
            values = [batch.column(column).to_pylist() for column in columns]
            for number, row in enumerate(zip(*values, strict=True), number + 1):  # noqa: B020 - it goes on counting
                yield f"{path}, row {number}", list(row)
    except pyarrow.ArrowException as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no whole parquet file ({reason}); fetch it again.") from None


# Data sets.


def _hub_rows(asked: TextSource, columns: Sequence[str]) -> Iterator[Row]:
    name, *rest = asked.source.split(":")
    needed = f"There is no file or folder {asked.source!r}, and reading data sets needs the extra"
    datasets = import_extra("datasets", "datasets", needed)
    split = asked.split or (rest[1] if len(rest) > 1 else "train")
    config = rest[0] if rest else None
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=asked.revision, streaming=asked.streamed)
        if rows.column_names is not None:
            _check_columns(asked.source, columns, rows.column_names)
            rows = rows.select_columns(list(columns))
        for number, row in enumerate(rows):
            place = f"{asked.source}, split {split}, row {number}"
            _check_columns(place, columns, row)
            yield place, [row[column] for column in columns]
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(_hub_error(asked, error)) from None
    except ValueError as error:  # an unknown config or split; ours say all that there is to say
        raise error if str(error).startswith(asked.source) else ValueError(_hub_error(asked, error)) from None


def _hub_error(asked: TextSource, error: Exception) -> str:
    return f"{asked.source!r} is no file or folder here, and no data set that opens ({' '.join(str(error).split())})."


def _check_columns(place: str, columns: Sequence[str], names: Collection[str]) -> None:
    for column in columns:
        if column not in names:
            raise ValueError(f"{place} has no column {column!r}, only {list(names)}; name one of them.")
        count = sum(name == column for name in names)
        if count > 1:
            raise ValueError(f"{place} has {count} columns {column!r}; rename all but one.")
