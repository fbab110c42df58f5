"""How good a classifier is out of distribution: its Accuracy on every corruption of the test images, at every severity.

    images ─ corrupt ─▶ FOLDER/<images, strengths, seed>/<name>-<severity>.safetensors ─▶ measure ─▶ means

Corrupted sets are written once and read by every later measurement of the same images. A folder that holds CIFAR-10-C
as its authors publish it (gaussian_noise.npy, ..., labels.npy) is read in their place.
"""

from __future__ import annotations

import hashlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from prunus.data import CORRUPTIONS, Images, Strengths, check_corruptions, corrupt
from prunus.machine import write_tensors
from prunus.measure.accuracy import Accuracy

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
    names: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    seed: int = 0,
    strengths: Strengths = "cifar",
    folder: Path | None = None,
) -> Corrupted:
    """What `measure` says of each corruption of `images` at each severity.

    measure: images -> Accuracy, such as `accuracy` of a network on batches normalised as in training, or that of an
    ensemble. seed, strengths: as `corrupt` takes them. folder: where corrupted sets are kept, or CIFAR-10-C itself;
    None makes them anew.
    Source: Hendrycks & Dietterich 2019, Sec. 4; their mean corruption error divides by AlexNet's, which is not done.
    Raises as `corrupt`, before anything is measured, and what `measure` raises.

    >>> def measure(images):
    ...     return accuracy(model, plain_batches(images, batch_size=500))
    >>> corrupted_accuracy(test, measure, ["fog"], [1, 3, 5]).mean()["top1"]
    """
    found: dict[str, dict[int, Accuracy]] = {}
    sets = corrupted_sets(images, names, severities, seed=seed, strengths=strengths, folder=folder)
    for name, severity, corrupted in sets:
        found.setdefault(name, {})[severity] = measure(corrupted)
    return Corrupted(found)


def corrupted_sets(
    images: Images,
    names: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    seed: int = 0,
    strengths: Strengths = "cifar",
    folder: Path | None = None,
) -> Iterator[tuple[str, int, Images]]:
    """Each corruption of `images` at each severity: its name, its severity, the images, one set at a time in memory.

    All else as `corrupted_accuracy` takes it, for those who measure several networks on each set.
    Raises as `corrupt`, before the first set is made.

    >>> [len(images) for _, _, images in corrupted_sets(test, ["fog"], [1, 5])]
    [10000, 10000]
    """
    check_corruptions(names, severities, strengths=strengths, size=tuple(images.pixels.shape[1:]))
    if not names or not severities:
        raise ValueError("nothing is corrupted: name at least one corruption and one severity")
    return (
        (name, severity, corrupted_images(images, name, severity, seed=seed, strengths=strengths, folder=folder))
        for name in names
        for severity in severities
    )


def corrupted_images(
    images: Images,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    strengths: Strengths = "cifar",
    folder: Path | None = None,
) -> Images:
    """What `corrupt` makes, from `folder` if it is there, and kept there otherwise; on the device of `images`.

    The files are images too: `read_images` takes them. Raises as `corrupt`; ValueError when a folder of CIFAR-10-C does
    not belong to these images.

    >>> corrupted_images(test, "fog", 3, folder=Path("cifar10-c"))
    """
    device = images.pixels.device
    if folder is None:
        return corrupt(images, name, severity, seed=seed, strengths=strengths).to(device)
    if (folder / "labels.npy").exists():
        return _published(images, name, severity, folder).to(device)
    path = folder / f"{_digest(images)}-{strengths}-{seed}" / f"{name}-{severity}.safetensors"
    if path.exists():
        stored = load_file(path)
        return Images(stored["pixels"], stored["labels"], images.classes).to(device)
    made = corrupt(images, name, severity, seed=seed, strengths=strengths)
    write_tensors(path, {"pixels": made.pixels, "labels": made.labels})
    return made.to(device)


def _digest(images: Images) -> str:
    """16 hexadecimal digits that tell sets of images apart."""
    found = hashlib.sha256(str(tuple(images.pixels.shape)).encode())
    for tensor in (images.pixels, images.labels):
        found.update(tensor.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def _published(images: Images, name: str, severity: int, folder: Path) -> Images:
    """One severity of <name>.npy (5 N, H, W, C) uint8, sorted by severity; labels.npy (5 N,)."""
    path = folder / f"{name}.npy"
    if not path.is_file():
        raise ValueError(f"{folder} has labels.npy, as CIFAR-10-C has, but no {name}.npy; leave {name} out")
    whole, labels = np.load(path, mmap_mode="r"), np.load(folder / "labels.npy", mmap_mode="r")
    count = len(images)
    rows = slice((severity - 1) * count, severity * count)
    height, width = images.pixels.shape[2:]
    expected = images.labels.cpu().numpy()
    if whole.shape != (5 * count, height, width, 3) or not np.array_equal(labels[rows], expected):
        raise ValueError(
            f"{path} holds {whole.shape} and other labels than these {count} images have, or in another order: it is "
            "read for the whole test set in the official order alone. Give another folder"
        )
    pixels = torch.from_numpy(np.array(whole[rows])).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, images.labels.cpu(), images.classes)
