"""How good a classifier is out of distribution: its Accuracy on every corruption of the test images, at every severity.

    images, FOLDER/<name>.npy, FOLDER/labels.npy ─▶ corrupted images, one set at a time ─ measure ─▶ means

The folder is as CIFAR-10-C is published: five times all images, sorted by severity. `scripts/corrupt_images.py` makes
such folders of other images.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunus.data import Images
from prunus.measure.accuracy import Accuracy

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
_PARTS = 5  # of a file, by severity
MEASURES = ("top1", "loss", "calibration_error", "maximum_calibration_error", "worst_class")


@dataclass(frozen=True)
class Corrupted:
    """What `corrupted_accuracy` measures: corruption -> severity -> Accuracy.

    >>> found = Corrupted({"fog": {1: Accuracy(0.9, None, 0.3, 0.02, 0.1, 0.8, 100)}})
    >>> found.mean()["top1"]
    0.9
    """

    sets: Mapping[str, Mapping[int, Accuracy]]

    def mean(self, *, name: str | None = None, severity: int | None = None) -> dict[str, float]:
        """Measure -> its mean over all sets, or over those of one corruption, of one severity.

        Of loss, accuracy, both calibration errors and the worst class alike; every set counts the same.
        """
        chosen = [
            found
            for corruption, row in self.sets.items()
            for strength, found in row.items()
            if name in (None, corruption) and severity in (None, strength)
        ]
        return {measure: statistics.fmean(getattr(each, measure) for each in chosen) for measure in MEASURES}


def corrupted_accuracy(
    images: Images,
    measure: Callable[[Images], Accuracy],
    folder: Path,
    names: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
) -> Corrupted:
    """What `measure` says of each corruption of `images` at each severity.

    measure: images -> Accuracy, such as `accuracy` of a network on batches normalised as in training, or that of an
    ensemble. folder, names, severities: as `corrupted_sets` takes them.
    Source: Hendrycks & Dietterich 2019, Sec. 4; their mean corruption error divides by AlexNet's, which is not done.
    Raises as `corrupted_sets`, before anything is measured, and what `measure` raises.

    >>> def measure(images):
    ...     return accuracy(model, plain_batches(images, batch_size=500))
    >>> corrupted_accuracy(test, measure, Path("CIFAR-10-C"), ["fog"], [1, 3, 5]).mean()["top1"]
    """
    found: dict[str, dict[int, Accuracy]] = {}
    for name, severity, corrupted in corrupted_sets(images, folder, names, severities):
        found.setdefault(name, {})[severity] = measure(corrupted)
    return Corrupted(found)


def corrupted_sets(
    images: Images,
    folder: Path,
    names: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
) -> Iterator[tuple[str, int, Images]]:
    """Each corruption of `images` at each severity: its name, its severity, the images, one set at a time in memory.

    folder: <name>.npy, (5 N, H, W, C) uint8, sorted by severity, and labels.npy, (5 N,), of N images of which `images`
    are the first ones. They come on the device of `images`.
    Raises ValueError, before the first set is read, for a severity that there is not, and for a file that is missing or
    of other images.

    >>> [len(images) for _, _, images in corrupted_sets(test, Path("CIFAR-10-C"), ["fog"], [1, 5])]
    [10000, 10000]
    """
    if not names or not severities:
        raise ValueError("nothing is corrupted: name at least one corruption and one severity")
    strange = [severity for severity in severities if not 1 <= severity <= _PARTS]
    if strange:
        raise ValueError(f"severities go from 1 to {_PARTS}; got {strange[0]}")
    opened = {name: _opened(images, folder, name) for name in names}

    def read(name: str, severity: int) -> Images:
        pixels = torch.from_numpy(np.array(opened[name][severity - 1, : len(images)])).permute(0, 3, 1, 2)
        return Images(pixels.contiguous().to(images.pixels.device), images.labels, images.classes)

    return ((name, severity, read(name, severity)) for name in names for severity in severities)


def _opened(images: Images, folder: Path, name: str) -> np.ndarray[Any, np.dtype[Any]]:
    """(5, N, H, W, C) uint8, on disk."""
    path, beside = folder / f"{name}.npy", folder / "labels.npy"
    for file in (path, beside):
        if not file.is_file():
            raise ValueError(
                f"corrupted images: no {file}, which CIFAR-10-C as published has, and what scripts/corrupt_images.py "
                f"makes; leave {name} out, or name another folder"
            )
    whole, labels = np.load(path, mmap_mode="r"), np.load(beside)
    (channels, *size), count = images.pixels.shape[1:], len(images)
    expected = images.labels.cpu().numpy()
    if (
        len(labels) % _PARTS
        or whole.shape != (len(labels), *size, channels)
        or any(not np.array_equal(each[:count], expected) for each in np.split(labels, _PARTS))
    ):
        raise ValueError(
            f"corrupted images: {path} holds {whole.shape} and labels other than those of these {count} images of "
            f"{channels} x {size[0]} x {size[1]}, or in another order: name another folder"
        )
    return whole.reshape(_PARTS, -1, *whole.shape[1:])
