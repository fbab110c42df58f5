"""Labelled images of one size, as bytes: a value that is moved, taken from and split, not yet a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunus.machine import generator_of

__all__ = ["Images", "matched", "split_places"]


@dataclass(frozen=True, eq=False)
class Images:
    """Images and their labels. pixels: (N, C, H, W) uint8; labels: (N,) int64 in [0, classes). names: of the classes.

    Raises ValueError for other shapes, dtypes or (on the CPU) labels.

    >>> len(Images(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 1]), 2))
    3
    """

    pixels: Tensor
    labels: Tensor
    classes: int
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        pixels, labels = self.pixels, self.labels
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or not pixels.numel():
            raise ValueError(f"pixels must be (N, C, H, W) uint8, N > 0; got {tuple(pixels.shape)} {pixels.dtype}")
        if labels.dtype != torch.int64 or labels.shape != pixels.shape[:1]:
            raise ValueError(f"labels must be ({len(pixels)},) int64; got {tuple(labels.shape)} {labels.dtype}")
        if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(f"labels go from {labels.min()} to {labels.max()}; number {self.classes} classes from 0")

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """The same images on `device`."""
        return Images(self.pixels.to(device), self.labels.to(device), self.classes, self.names)

    def take(self, index: Tensor) -> Images:
        """The images at `index` (n,) int64, in that order."""
        index = index.to(self.pixels.device)
        return Images(self.pixels[index], self.labels[index], self.classes, self.names)

    def split(self, share: float, seed: int) -> tuple[Images, Images]:
        """(the rest, round(share * N) held out), chosen by `seed`; both keep the order of the images.

        Raises ValueError when either would be empty.
        """
        rest, held = split_places(len(self), share, seed)
        return self.take(rest), self.take(held)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel of pixels / 255, (C,) float32 on the CPU, summed exactly."""
        values = torch.arange(256, dtype=torch.float64) / 255
        counts = torch.stack([torch.bincount(each.flatten().int(), minlength=256) for each in self.pixels.unbind(1)])
        shares = counts.cpu().double() / (self.pixels.numel() // self.pixels.shape[1])  # (C, 256)
        mean = shares @ values
        variance = (shares * (values - mean[:, None]).square()).sum(1)
        return mean.float(), variance.sqrt().float()


def split_places(count: int, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """The places of (the rest, round(share * count) held out), each in order, int64.

    Raises ValueError when either would be empty.

    >>> [len(part) for part in split_places(10, 0.3, seed=0)]
    [7, 3]
    """
    held = round(share * count)
    if not 0 < held < count:
        raise ValueError(f"a share of {share} of {count} leaves {held} and {count - held}; give another, or more data")
    order = torch.randperm(count, generator=generator_of(seed, 0))
    return order[held:].sort().values, order[:held].sort().values


def matched(test: Images, train: Images) -> Images:
    """The test images with their classes numbered as in training.

    Raises ValueError for images of another size or number of channels, and for a class without a training image.

    >>> one = Images(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1]), 2)
    >>> matched(one, one).classes
    2
    """
    sizes = [tuple(each.pixels.shape[1:]) for each in (train, test)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"training images are {sizes[0]}, test images {sizes[1]} (channels, rows, columns); make them equal"
        )
    labels, seen = test.labels, set(train.labels.unique().tolist())
    if train.names and test.names and train.names != test.names:
        places = {name: place for place, name in enumerate(train.names)}
        alone = [name for name in test.names if name not in places]
        if alone:
            raise ValueError(f"class {alone[0]!r} is only among the test images; leave it out, or train on it, too")
        labels = torch.tensor([places[name] for name in test.names])[labels]
    alone = [label for label in labels.unique().tolist() if label not in seen]
    if alone:
        name = f" ({train.names[alone[0]]!r})" if alone[0] < len(train.names) else ""
        raise ValueError(f"class {alone[0]}{name} is only among the test images; leave it out, or train on it, too")
    return Images(test.pixels, labels, train.classes, train.names)
