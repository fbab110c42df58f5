"""Where images are read from: Parquet with encoded images, arrays in .npz or .safetensors, the hub, the digits."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunus.data.images.sets import Images
from prunus.machine import import_extra

__all__ = ["read_images"]

_PIXELS, _LABELS = ("img", "image"), ("label", "labels", "fine_label")
_ENDINGS = (".parquet", ".npz", ".safetensors")
_IN_A_ROW = 256  # images that one thread decodes before it asks for more


def read_images(source: str | Path, split: str | None = "train", *, test_share: float = 0.2) -> Images:
    """The images of a folder, a file, a Hugging Face data set, or the embedded digits, in their order, on the CPU.

    source: a folder that holds, at any depth, {split}*.parquet, .npz or .safetensors; such a file; "owner/name" or
    "owner/name:config" on the hub; "digits", scikit-learn's 1,797 handwritten digits of 8 x 8 pixels. Parquet has
    encoded images in `img` or `image` and int labels in `label`, `labels` or `fine_label`; the other files hold
    `pixels` (N, C, H, W) or (N, H, W) uint8 and `labels` (N,).
    A file and the digits have no splits of their own: "test" is `test_share` of them, chosen once and for all, "train"
    the rest, None all.
    Raises: FileNotFoundError, ValueError for another form or images of different sizes, ImportError for an extra.

    >>> read_images("digits", "test").pixels.shape
    torch.Size([359, 1, 8, 8])
    """
    path = Path(source)
    if path.is_dir():
        return _joined([_read_file(file) for file in _files(path, split)])
    if str(source) != "digits" and not path.suffix:
        return _read_hub(str(source), split)
    images = _read_digits() if str(source) == "digits" else _read_file(path)
    if split is None or (split == "train" and test_share == 0):
        return images
    if split not in ("train", "test"):
        raise ValueError(f"'{source}' has no splits of its own: ask for 'train', 'test' or None, not {split!r}")
    return images.split(test_share, seed=0)[split == "test"]


def _files(folder: Path, split: str | None) -> list[Path]:
    if split is None:
        raise ValueError(f"{folder} is a folder: say which split to read, for example split='test'")
    files = [file for file in folder.rglob(f"{split}*") if file.suffix in _ENDINGS]
    files = [file for file in files if not file.name[len(split)].isalnum()]  # "train" is not "training"
    if not files:
        raise FileNotFoundError(f"{folder} holds no {split}*.parquet, .npz or .safetensors, at any depth")
    return sorted(files, key=lambda file: (file.name, file))


def _joined(parts: Sequence[Images]) -> Images:
    shapes = {tuple(part.pixels.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"the files of one split hold images of different shapes {sorted(shapes)}; make them equal")
    pixels, labels = (torch.cat(each) for each in zip(*((p.pixels, p.labels) for p in parts), strict=True))
    return Images(pixels, labels, max(part.classes for part in parts))


def _read_file(path: Path) -> Images:
    if not path.is_file():
        raise FileNotFoundError(f"no file, folder or known data set '{path}' (relative to {Path.cwd()})")
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix not in _ENDINGS:
        raise ValueError(f"{path} ends in none of {', '.join(_ENDINGS)}; convert it")
    return _read_arrays(path)


def _read_parquet(path: Path) -> Images:
    import pyarrow.parquet  # slow to import, needed for this ending only

    file = pyarrow.parquet.ParquetFile(path)
    image, label = _columns(file.schema_arrow.names, str(path))
    table = file.read(columns=[image, label])
    features = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
    names = features.get("info", {}).get("features", {}).get(label, {}).get("names", ())
    return _decoded(table.column(image).to_pylist(), table.column(label).to_pylist(), len(names), str(path))


def _read_arrays(path: Path) -> Images:
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as file:
            found = {name: torch.from_numpy(file[name]) for name in file.files}
    else:
        from safetensors.torch import load_file

        found = load_file(path)
    if not {"pixels", "labels"} <= found.keys():
        raise ValueError(f"{path} holds {sorted(found)}; images are 'pixels' (N, C, H, W) uint8 and 'labels' (N,)")
    pixels, labels = found["pixels"], found["labels"].long()
    return Images(pixels[:, None] if pixels.ndim == 3 else pixels, labels, _classes(labels, 0))


def _read_digits() -> Images:
    load = import_extra("sklearn.datasets", "images", "the digits come with scikit-learn").load_digits
    values, labels = load(return_X_y=True)  # (N, 64) in 0..16
    pixels = torch.from_numpy(np.rint(values * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8)
    return Images(pixels, torch.from_numpy(labels).long(), 10)


def _read_hub(source: str, split: str | None) -> Images:
    datasets = import_extra("datasets", "datasets", f"there is no folder '{source}', and data sets need the extra")
    if split is None:
        raise ValueError(f"'{source}' is a data set: say which split to read, for example split='test'")
    name, _, config = source.partition(":")
    rows: Any = datasets.load_dataset(name, config or None, split=split)
    image, label = _columns(rows.column_names, source)
    classes = getattr(rows.features[label], "num_classes", 0)
    return _decoded(rows.cast_column(image, datasets.Image(decode=False))[image], rows[label], classes, source)


def _columns(names: Sequence[str], place: str) -> tuple[str, str]:
    image = next((name for name in _PIXELS if name in names), None)
    label = next((name for name in _LABELS if name in names), None)
    if image is None or label is None:
        raise ValueError(
            f"{place} has the columns {list(names)}; images are in one of {', '.join(_PIXELS)}, labels in one of "
            f"{', '.join(_LABELS)}: rename them"
        )
    return image, label


def _decoded(encoded: Sequence[Any], labels: Sequence[int], classes: int, place: str) -> Images:
    parts = [range(start, min(start + _IN_A_ROW, len(encoded))) for start in range(0, len(encoded), _IN_A_ROW)]
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as threads:
        done = threads.map(
            lambda part: [_decode(encoded[number], f"{place}, image {number}") for number in part], parts
        )
        arrays = [array for part in done for array in part]
    if not arrays:
        raise ValueError(f"{place} holds no images")
    for number, array in enumerate(arrays):
        if array.shape[:2] != arrays[0].shape[:2]:
            raise ValueError(
                f"{place}: image 0 is {arrays[0].shape[:2]}, image {number} is {array.shape[:2]} (rows, columns); "
                "make all one size first, or train from a DataLoader (LoaderBatches)"
            )
    depth = max(array.shape[2] for array in arrays)  # grey images among coloured ones have three equal channels
    whole = np.stack([array if array.shape[2] == depth else array.repeat(depth, 2) for array in arrays])
    targets = torch.tensor(labels, dtype=torch.int64)
    return Images(torch.from_numpy(whole).permute(0, 3, 1, 2), targets, _classes(targets, classes))


def _decode(encoded: Any, place: str) -> np.ndarray:
    """One image as (H, W, 1 or 3) uint8."""
    pillow = import_extra("PIL.Image", "images", "decoding images needs the extra")
    content = encoded
    if isinstance(encoded, Mapping):
        content = encoded["bytes"] if encoded.get("bytes") is not None else Path(encoded["path"]).read_bytes()
    try:
        with pillow.open(io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{place} has more than 8 bits a pixel (mode {image.mode}); convert it to 8 bits")
            array = np.asarray(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except pillow.UnidentifiedImageError as error:
        raise ValueError(f"{place} is no image that Pillow can read; check the column, or Pillow's formats") from error
    return array[:, :, None] if array.ndim == 2 else array


def _classes(labels: torch.Tensor, named: int) -> int:
    return named or int(labels.max()) + 1
