"""Where images are read from: folders of pictures, Parquet with encoded ones, arrays, the hub, the digits.

    source ─▶ rows (picture, label, where it stands) ─ decoded by threads, labels numbered ─▶ Images

What cannot be trained on is refused here, with file and row.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunus.data.images.sets import Images, split_places
from prunus.machine import import_extra

__all__ = ["count_images", "read_images"]

_PIXELS, _LABELS = ("img", "image"), ("label", "labels", "fine_label")
_ENDINGS = (".parquet", ".npz", ".safetensors")
_PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
_OTHER_NAMES = {"test": ("test", "val", "validation", "valid")}  # of a split's folder, the first that is there
_IN_A_ROW = 256  # images that one thread decodes before it asks for more
_CHANNELS = (1, 3)


def read_images(
    source: str | Path, split: str | None = "train", *, test_share: float = 0.2, size: int | None = None
) -> Images:
    """The images of a folder, a file, a Hugging Face data set, or the embedded digits, in their order, on the CPU.

    source: a folder with pictures in `{split}/CLASS/`, or in `CLASS/`; a folder that holds, at any depth,
    {split}*.parquet, .npz or .safetensors; such a file; "name", "owner/name" or "owner/name:config" on the hub;
    "digits", scikit-learn's 1,797 handwritten digits of 8 x 8 pixels. Parquet and the hub have encoded images in `img`
    or `image` and int or text labels in `label`, `labels` or `fine_label`; arrays are `pixels` (N, C, H, W),
    (N, H, W, C) or (N, H, W) uint8 and `labels` (N,). Classes that have names are numbered in their order.
    A file, a folder of classes and the digits have no splits: "test" is `test_share` of them, chosen once and for all,
    "train" the rest, None all.
    size: the shorter side of each picture is scaled to it, and the middle square cut out; arrays stay as they are.
    Raises: FileNotFoundError; ValueError, with file and row, for another form, images of different sizes, and rows
    without image or label; ImportError for an extra.

    >>> read_images("digits", "test").pixels.shape
    torch.Size([359, 1, 8, 8])
    """
    parts, own = _found(source, split)
    images = _joined([part if isinstance(part, Images) else _decoded(part, size) for part in parts])
    if own or _is_whole(source, split, test_share, len(images)):
        return images
    return images.split(test_share, seed=0)[split == "test"]


def count_images(source: str | Path, split: str | None = "train", *, test_share: float = 0.2) -> int:
    """How many images `read_images` would read; none is decoded. Raises as it does for what is seen without that.

    >>> count_images("digits", "test")
    359
    """
    parts, own = _found(source, split)
    count = sum(len(part) for part in parts)
    if own or _is_whole(source, split, test_share, count):
        return count
    return len(split_places(count, test_share, seed=0)[split == "test"])


def _is_whole(source: str | Path, split: str | None, test_share: float, count: int) -> bool:
    """Whether all images of a source without splits are asked for. Raises ValueError for a share that it has not."""
    if split is None or (split == "train" and test_share == 0):
        return True
    if split not in ("train", "test"):
        raise ValueError(f"'{source}' has no splits of its own: ask for 'train', 'test' or None, not {split!r}")
    if not 0 < round(test_share * count) < count:
        raise ValueError(f"'{source}' has {count} images, too few for a share of {test_share}; give more")
    return False


@dataclass(frozen=True)
class _Row:
    """An encoded image, or a path to one, with its label; `place` says where it stands."""

    image: Any
    label: Any
    place: str


@dataclass(frozen=True)
class _Rows:
    rows: Sequence[_Row]
    names: tuple[str, ...] = ()  # of the numbers that are labels

    def __len__(self) -> int:
        return len(self.rows)


def _found(source: str | Path, split: str | None) -> tuple[Sequence[_Rows | Images], bool]:
    """The parts of a source, pictures as they lie there, and whether they are a split of its own."""
    path = Path(source).expanduser()
    if path.is_dir() and (parts := _split_folder(path, split)) is not None:
        return parts, True
    if str(source) == "digits":
        return [_read_digits()], False
    if path.is_dir():
        return [_class_rows(path)], False
    if path.suffix:
        return _read_files([path]), False
    return [_hub_rows(str(source), split)], True


# Folders.


def _split_folder(folder: Path, split: str | None) -> Sequence[_Rows | Images] | None:
    """The parts of a split of a folder; None if it has classes in place of splits."""
    inside = {each.name for each in folder.iterdir() if each.is_dir()}
    own = next((name for name in _OTHER_NAMES.get(split or "", (split,)) if name in inside), None)
    if own is not None and any(each.is_dir() for each in (folder / own).iterdir()) and _has_pictures(folder / own):
        return [_class_rows(folder / own)]
    files = [file for file in folder.rglob(f"{split or ''}*") if file.suffix in _ENDINGS]
    files = [file for file in files if split is None or not file.name[len(split)].isalnum()]  # not "training"
    if not files and _has_pictures(folder) and not any(name in inside for name in ("train", "test")):
        return None
    if split is None:
        raise ValueError(f"{folder} is a folder: say which split to read, for example split='test'")
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no {split}*.parquet, .npz or .safetensors, at any depth, and no pictures in {split}/CLASS/"
            "; put them there, or name another folder"
        )
    return _read_files(sorted(files, key=lambda file: (file.name, file)))


def _has_pictures(folder: Path) -> bool:
    return any(
        file.suffix.lower() in _PICTURES for each in folder.iterdir() if each.is_dir() for file in each.iterdir()
    )


def _class_rows(folder: Path) -> _Rows:
    """The pictures of a folder with one for each class."""
    classes = sorted(each.name for each in folder.iterdir() if each.is_dir() and not each.name.startswith("."))
    rows: list[_Row] = []
    for label in classes:
        files = sorted(file for file in (folder / label).rglob("*") if file.is_file() and not file.name.startswith("."))
        other = next((file for file in files if file.suffix.lower() not in _PICTURES), None)
        if other is not None or not files:
            what = f"{other} is no picture ({', '.join(_PICTURES)})" if other else f"{folder / label} holds no picture"
            raise ValueError(f"{what}; take it out of the folder of a class")
        rows += [_Row(file, label, str(file)) for file in files]
    return _Rows(rows)


# Files.


def _read_files(files: Sequence[Path]) -> Sequence[_Rows | Images]:
    for path in files:
        if not path.is_file():
            raise FileNotFoundError(f"no file, folder or known data set '{path}' (relative to {Path.cwd()})")
        if path.suffix not in _ENDINGS:
            raise ValueError(f"{path} ends in none of {', '.join(_ENDINGS)}; convert it")
    tables = [_parquet_rows(path) for path in files if path.suffix == ".parquet"]
    parts: list[_Rows | Images] = [_read_arrays(path) for path in files if path.suffix != ".parquet"]
    if tables:
        rows = _Rows([row for table in tables for row in table.rows], max((table.names for table in tables), key=len))
        if not rows.rows:
            raise ValueError(f"{files[0]} holds no image; give a file that does")
        parts.append(rows)
    return parts


def _joined(parts: Sequence[Images]) -> Images:
    if len(parts) == 1:
        return parts[0]
    shapes = {tuple(part.pixels.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"the files of one split hold images of different shapes {sorted(shapes)}; make them equal")
    pixels, labels = (torch.cat(each) for each in zip(*((p.pixels, p.labels) for p in parts), strict=True))
    return Images(pixels, labels, max(part.classes for part in parts), max((part.names for part in parts), key=len))


def _parquet_rows(path: Path) -> _Rows:
    import json

    import pyarrow.parquet  # slow to import, needed for this ending only

    try:
        file = pyarrow.parquet.ParquetFile(path)
        image, label = _columns(file.schema_arrow.names, str(path))
        table = file.read(columns=[image, label])
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is no whole parquet file ({' '.join(str(error).split())}); fetch it again") from None
    features = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = features.get("info", {}).get("features", {}).get(label, {}).get("names") or ()
    pairs = zip(table.column(image).to_pylist(), table.column(label).to_pylist(), strict=True)
    return _Rows([_Row(*pair, f"{path}, image {number}") for number, pair in enumerate(pairs)], tuple(names))


def _read_arrays(path: Path) -> Images:
    found = _arrays(path)
    if not {"pixels", "labels"} <= found.keys():
        raise ValueError(
            f"{path} holds {sorted(found)}; rename images 'pixels' (N, C, H, W) uint8, classes 'labels' (N,)"
        )
    labels, names = found["labels"], tuple[str, ...]()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.dtype.kind == "U":
        names, labels = _numbered(labels.tolist())
    if np.asarray(labels).dtype.kind not in "iu":
        raise ValueError(f"{path} has labels of {np.asarray(labels).dtype}; give integers or texts")
    numbers = torch.from_numpy(np.asarray(labels, np.int64))
    if not numbers.numel():
        raise ValueError(f"{path} holds no image; give a file that does")
    try:
        pixels = torch.from_numpy(_channels_first(found["pixels"]))
        return Images(pixels, numbers, len(names) or int(numbers.max()) + 1, names)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (SafetensorError, zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        why = "objects, or a file of another kind" if "pickle" in str(error) else " ".join(str(error).split())
        raise ValueError(f"{path} holds no arrays that can be read ({why}); make it again, of plain numbers") from None


def _channels_first(pixels: np.ndarray) -> np.ndarray:
    """(N, C, H, W) of that, of (N, H, W) and of (N, H, W, C); channels are 1 or 3, or fewer than rows and columns."""
    if pixels.ndim == 3:
        return pixels[:, None]
    if pixels.ndim != 4 or pixels.shape[1] in _CHANNELS:
        return pixels
    if pixels.shape[3] in _CHANNELS:
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    if pixels.shape[1] >= min(pixels.shape[2:]):
        raise ValueError(f"which axis of {pixels.shape} is that of channels? Give pixels as (N, C, H, W), C of 1 or 3")
    return pixels


def _read_digits() -> Images:
    load = import_extra("sklearn.datasets", "images", "the digits come with scikit-learn").load_digits
    values, labels = load(return_X_y=True)  # (N, 64) in 0..16
    pixels = torch.from_numpy(np.rint(values * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    return Images(pixels, torch.from_numpy(labels).long(), 10)


def _hub_rows(source: str, split: str | None) -> _Rows:
    datasets = import_extra("datasets", "datasets", f"there is no folder '{source}', and data sets need the extra")
    if split is None:
        raise ValueError(f"'{source}' is a data set: say which split to read, for example split='test'")
    name, _, config = source.partition(":")
    try:
        rows: Any = datasets.load_dataset(name, config or None, split=split)
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"'{source}' is no file or folder here, and no data set that opens ({reason})") from None
    image, label = _columns(rows.column_names, source)
    names = tuple(getattr(rows.features[label], "names", None) or ())
    if isinstance(rows.features[image], datasets.Image):
        rows = rows.cast_column(image, datasets.Image(decode=False))
    pairs = zip(rows[image], rows[label], strict=True)
    return _Rows([_Row(*pair, f"{source}, split {split}, image {number}") for number, pair in enumerate(pairs)], names)


def _columns(names: Sequence[str], place: str) -> tuple[str, str]:
    image = next((name for name in _PIXELS if name in names), None)
    label = next((name for name in _LABELS if name in names), None)
    if image is None or label is None:
        raise ValueError(
            f"{place} has the columns {list(names)}; images are in one of {', '.join(_PIXELS)}, labels in one of "
            f"{', '.join(_LABELS)}: rename them"
        )
    return image, label


# Rows.


def _decoded(found: _Rows, size: int | None) -> Images:
    rows = found.rows
    if not rows:
        raise ValueError("there are no images in this split")
    names, labels = _targets(found)
    parts = [rows[start : start + _IN_A_ROW] for start in range(0, len(rows), _IN_A_ROW)]
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        done = threads.map(lambda part: [_decode(row, size) for row in part], parts)
        arrays = [array for part in done for array in part]
    for row, array in zip(rows, arrays, strict=True):
        if array.shape[:2] != arrays[0].shape[:2]:
            other = row.place.removeprefix(rows[0].place.rpartition(", ")[0] + ", ")  # the file is said once
            raise ValueError(
                f"{rows[0].place} is {arrays[0].shape[:2]}, {other} is {array.shape[:2]} (rows, columns); give a size "
                "for all (images.size), or train from a DataLoader (LoaderBatches)"
            )
    depth = max(array.shape[2] for array in arrays)  # grey images among coloured ones have three equal channels
    whole = np.stack([array if array.shape[2] == depth else array.repeat(depth, 2) for array in arrays])
    targets = torch.tensor(labels, dtype=torch.int64)
    return Images(torch.from_numpy(whole).permute(0, 3, 1, 2), targets, len(names) or int(targets.max()) + 1, names)


def _targets(found: _Rows) -> tuple[tuple[str, ...], list[int]]:
    """(names of the classes, or none, and the number of each row's)."""
    kind = str if isinstance(found.rows[0].label, str) else int
    for row in found.rows:
        if row.label is None:
            raise ValueError(f"{row.place} has no label; leave the row out")
        if not isinstance(row.label, kind) or isinstance(row.label, bool):
            raise ValueError(f"{row.place} has the label {row.label!r}; give integers for all, or names for all")
    labels: list[Any] = [row.label for row in found.rows]
    if kind is str:
        return _numbered(labels)
    for row in found.rows:
        if row.label < 0 or (found.names and row.label >= len(found.names)):
            last = f"to {len(found.names) - 1}" if found.names else "and up"
            raise ValueError(f"{row.place} has the label {row.label}; classes are 0 {last}: number them so")
    return found.names, labels


def _numbered(labels: Iterable[str]) -> tuple[tuple[str, ...], list[int]]:
    """The names in order, and each label's place among them."""
    labels = list(labels)
    places = {name: place for place, name in enumerate(sorted(set(labels)))}
    return tuple(places), [places[label] for label in labels]


def _decode(row: _Row, size: int | None) -> np.ndarray:
    """One image as (H, W, 1 or 3) uint8."""
    pillow = import_extra("PIL.Image", "images", "decoding images needs the extra")
    content = _content(row)
    try:
        with pillow.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{row.place} has more than 8 bits a pixel (mode {image.mode}); convert it to 8 bits")
            image = image.convert("L" if image.mode in ("1", "L") else "RGB")
            array = np.asarray(image if size is None else _squared(image, size))
    except pillow.UnidentifiedImageError:
        raise ValueError(
            f"{row.place} is no image that Pillow can read; check the column, or Pillow's formats"
        ) from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{row.place} is damaged ({error}); make it again, or leave it out") from None
    return array[:, :, None] if array.ndim == 2 else array


def _content(row: _Row) -> bytes:
    content = row.image
    if isinstance(content, Mapping):
        content = content.get("bytes") if content.get("bytes") is not None else content.get("path")
    if content is None:
        raise ValueError(f"{row.place} has no image; leave the row out")
    if isinstance(content, (str, Path)):
        if not Path(content).is_file():
            raise ValueError(f"{row.place} names the picture {str(content)!r}, which is not there; put it there")
        return Path(content).read_bytes()
    if not isinstance(content, bytes):
        raise ValueError(
            f"{row.place} holds a {type(content).__name__}, no encoded picture; give PNG or JPEG bytes, or .npz arrays"
        )
    return content


def _squared(image: Any, size: int) -> Any:
    """The middle square, side `size`, of the image whose shorter side has been scaled to it."""
    width, height = image.size
    scale = size / min(width, height)
    wide, high = max(size, round(width * scale)), max(size, round(height * scale))
    left, top = (wide - size) // 2, (high - size) // 2
    return image.resize((wide, high), resample=2).crop((left, top, left + size, top + size))  # 2: bilinear, antialiased
