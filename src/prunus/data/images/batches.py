"""Batches of images as functions of the step, augmented on the images' own device; in order; or from a DataLoader.

Augmentation moves no pixel twice: crop and flip are row and column indices into the stored bytes, one gather brings
them, and what the crop or the cutout leaves outside becomes 0 after x = (pixel / 255 - mean) / std. Crops that are
resized are sampled bilinearly instead. A batch is a pure function of (seed, step), drawn on the CPU once an epoch, so
every device sees the same one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from prunus.data.images.sets import Images
from prunus.machine import generator_of, seed_of

__all__ = ["Augment", "ImageBatches", "LoaderBatches", "plain_batches"]

_RATIO = math.log(4 / 3)  # of a resized crop's sides, up or down
_BOXES = 0x5DEECE66D  # mixed into the seed of the boxes, so that they disturb no other draw
_JOINED = 0x2545F4914F6CDD1D  # and into that of mixup and cutmix
_OUTSIDE = -(1 << 40)  # stays negative whatever is added to it


@dataclass(frozen=True)
class Augment:
    """Random changes of training images. crop: pixels of border (of value 0 after normalising) before a crop of the
    image's own size; flip: left to right, half of them; cutout: side of a square of zeros around a random pixel.
    resized: in place of crop, a box of a share of the image's area in [resized, 1], its sides in a ratio in [3/4, 4/3],
    is sampled to the image's own size.
    mixup, cutmix: alpha of the share lam ~ Beta(alpha, alpha) of an image that stays, lam x_i + (1 - lam) x_j, or a box
    of x_j in x_i of 1 - lam of the area; of both, each batch takes one at random. Labels become shares of classes.

    Sources: He et al. 2016, Sec. 4.2 (crop, flip); DeVries & Taylor 2017 (cutout: the square may reach out of the
    image, so fewer pixels may be hidden); Szegedy et al. 2015, Sec. 6 (resized; a box too long for the image is cut to
    it); Zhang et al. 2018, Eq. 1 (mixup); Yun et al. 2019, Eq. 1 to 3 (cutmix). One lam a batch, as in their code; j
    stands in the batch as far from its end as i from its beginning.

    >>> Augment(crop=4, flip=True).cutout
    0
    """

    crop: int = 0
    flip: bool = False
    cutout: int = 0
    resized: float | None = None
    mixup: float = 0.0
    cutmix: float = 0.0


class ImageBatches:
    """Training batches as a pure function: step -> (x (B, C, H, W) normalised, y (B,) int64), on the images' device.

    With mixup or cutmix y is (B, classes) float32, the share of each class.

    Each epoch of N // B steps has a permutation and random changes of its own; the ragged rest is left out, so that all
    batches have one shape. mean, std: (C,) of pixels / 255, by default the images' own. On a GPU a call launches some
    ten kernels and does not wait for them. order_seed: of the permutations alone: in each epoch every image is then
    changed as `seed` says, whatever its place.
    Raises ValueError for a batch size outside 1..N, a crop that is negative or reaches the image's size, a negative
    cutout, a channel of standard deviation 0.

    >>> images = Images(torch.randint(256, (9, 3, 8, 8), dtype=torch.uint8), torch.arange(9), 9)
    >>> x, y = ImageBatches(images, batch_size=4, augment=Augment(crop=1, flip=True))(0)
    >>> x.shape, y.shape
    (torch.Size([4, 3, 8, 8]), torch.Size([4]))
    """

    def __init__(
        self,
        images: Images,
        *,
        batch_size: int,
        seed: int = 0,
        order_seed: int | None = None,
        augment: Augment = Augment(),
        mean: Tensor | None = None,
        std: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = False,
    ) -> None:
        _, _, height, width = images.pixels.shape
        if not 1 <= batch_size <= len(images):
            raise ValueError(f"a batch has 1 to {len(images)} images, as many as there are; got {batch_size}")
        if not 0 <= augment.crop < min(height, width) or augment.cutout < 0:
            raise ValueError(f"{augment} does not fit images of {height} x {width}; keep 0 <= crop < side, cutout >= 0")
        if augment.resized is not None and (augment.crop or not 0 < augment.resized <= 1):
            raise ValueError(f"{augment}: resized is a share of the area in (0, 1], in place of crop; leave out one")
        self.images, self.batch_size, self.augment = images, batch_size, augment
        self.seed, self.order_seed = seed, order_seed
        self.dtype, self.channels_last = dtype, channels_last
        self.epoch_steps = len(images) // batch_size
        own = images.statistics() if mean is None or std is None else (mean, std)
        self._scale, self._shift = _normaliser(own[0] if mean is None else mean, own[1] if std is None else std, images)
        self._bytes = images.pixels.permute(0, 2, 3, 1).reshape(-1, images.pixels.shape[1])  # (N * H * W, C)
        self._rows, self._columns, self._hides = (
            table.to(images.pixels.device) for table in _tables(height, width, augment)
        )
        self._epoch: tuple[int, Tensor, Tensor, Tensor | None] | None = None  # number, draws, labels, boxes

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """The batch of a step."""
        epoch, place = divmod(step, self.epoch_steps)
        if self._epoch is None or self._epoch[0] != epoch:
            draws, labels = self._draw(epoch)
            self._epoch = epoch, draws, labels, self._boxes(epoch, draws[0])
        part = slice(place * self.batch_size, (place + 1) * self.batch_size)
        first, top, left, middle, centre = self._epoch[1][:, part].unbind(0)
        rows = self._rows.index_select(0, top).add_(first[:, None])  # (B, H)
        index = rows[:, :, None] + self._columns.index_select(0, left)[:, None, :]  # (B, H, W)
        outside = None
        if self.augment.crop:
            outside = index < 0
            index.clamp_(min=0)
        if self.augment.cutout:
            height, width = index.shape[1:]
            across = self._hides[:, :width].index_select(0, centre)[:, None, :]
            hidden = self._hides[:, :height].index_select(0, middle)[:, :, None] & across
            outside = hidden if outside is None else outside.logical_or_(hidden)
        taken = self._bytes.index_select(0, index.view(-1)).view(*index.shape, -1)  # (B, H, W, C)
        x = torch.addcmul(self._shift, taken, self._scale)
        if self._epoch[3] is not None:
            x = _sampled(x, self._epoch[3][part])
        if outside is not None:
            x.masked_fill_(outside[..., None], 0.0)
        x, y = x.permute(0, 3, 1, 2).to(self.dtype), self._epoch[2][part]
        x = x if self.channels_last else x.contiguous()
        return self._joined(x, y, step) if self.augment.mixup or self.augment.cutmix else (x, y)

    def _joined(self, x: Tensor, y: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), each joined with another one of the batch, and the shares (B, classes) of classes."""
        generator, (*_, height, width) = generator_of(self.seed ^ _JOINED, step), x.shape
        cuts = self.augment.cutmix and not (self.augment.mixup and torch.rand((), generator=generator) < 0.5)
        own = _beta(self.augment.cutmix if cuts else self.augment.mixup, generator)
        if cuts:
            side, middle, centre = math.sqrt(1 - own), *torch.rand(2, generator=generator).tolist()
            top, bottom = _span(middle * height, side * height, height)
            left, right = _span(centre * width, side * width, width)
            own = 1 - (bottom - top) * (right - left) / (height * width)
            other, x = x.flip(0), x.clone(memory_format=torch.preserve_format)
            x[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
        else:
            x = torch.lerp(x.flip(0), x, own)
        shares = torch.nn.functional.one_hot(y, self.images.classes).float()
        return x, torch.lerp(shares.flip(0), shares, own)

    def _draw(self, epoch: int) -> tuple[Tensor, Tensor]:
        """(first byte, row offset, column offset, cutout's row and column), (5, n) int64, and labels (n,) of an epoch.

        All are drawn whatever `augment` is, so that one kind of change does not disturb another.
        """
        generator, (count, _, height, width) = generator_of(self.seed, epoch), self.images.pixels.shape
        order = torch.randperm(count, generator=generator)
        top, left = (torch.randint(2 * self.augment.crop + 1, (count,), generator=generator) for _ in range(2))
        flip = torch.randint(2, (count,), generator=generator)
        middle, centre = (torch.randint(side, (count,), generator=generator) for side in (height, width))
        if self.augment.flip:
            left = left + (2 * self.augment.crop + 1) * flip
        if self.order_seed is not None:  # what was drawn belongs to images now, no longer to places
            order = torch.randperm(count, generator=generator_of(self.order_seed, epoch))
            top, left, middle, centre = (each[order] for each in (top, left, middle, centre))
        used = self.epoch_steps * self.batch_size
        draws = torch.stack([order * height * width, top, left, middle, centre])[:, :used].contiguous()
        order = order[:used]
        device = self.images.pixels.device
        if device.type == "cuda":  # pinned, the copy needs no waiting
            draws, order = draws.pin_memory(), order.pin_memory()
        order = order.to(device, non_blocking=True)
        return draws.to(device, non_blocking=True), self.images.labels.index_select(0, order)

    def _boxes(self, epoch: int, first: Tensor) -> Tensor | None:
        """The boxes (n, 4) of an epoch that are sampled; first: (n,) each image's first byte."""
        if self.augment.resized is None:
            return None
        _, _, height, width = self.images.pixels.shape
        boxes = _boxes(self.augment.resized, self.images, self.seed, epoch).to(first.device)
        return boxes[: len(first)] if self.order_seed is None else boxes[first // (height * width)]


def plain_batches(
    images: Images,
    *,
    batch_size: int,
    mean: Tensor,
    std: Tensor,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order as (x (B, C, H, W) normalised, y (B,) int64), without augmentation; the last may be smaller.

    Raises ValueError for a channel of standard deviation 0.

    >>> images = Images(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), torch.zeros(5, dtype=torch.int64), 1)
    >>> [len(y) for _, y in plain_batches(images, batch_size=2, mean=torch.zeros(1), std=torch.ones(1))]
    [2, 2, 1]
    """
    scale, shift = (each[:, None, None] for each in _normaliser(mean, std, images))
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for pixels, labels in zip(images.pixels.split(batch_size), images.labels.split(batch_size), strict=True):
        yield torch.addcmul(shift, pixels, scale).to(dtype).contiguous(memory_format=layout), labels


class LoaderBatches:
    """A DataLoader as step -> batch, epoch after epoch: whatever it yields, moved nowhere.

    A step that does not follow the last one starts its epoch again and skips to it. An epoch's order depends on (seed,
    epoch) if the loader has a `generator` or a DistributedSampler; a loader that shuffles without is not resumable.
    Raises ValueError for a loader without a length, or of length 0.

    >>> LoaderBatches(torch.utils.data.DataLoader([1, 2, 3]))(4)
    tensor([2])
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int = 0) -> None:
        try:
            self.epoch_steps = len(loader)
        except TypeError as error:
            raise ValueError(
                "the DataLoader's data set has no length; give it a __len__, or a map-style one"
            ) from error
        if not self.epoch_steps:
            raise ValueError("the DataLoader yields no batch; use a smaller batch size or drop_last=False")
        self.loader, self.seed = loader, seed
        self._next, self._iterator = -1, iter(())

    def __call__(self, step: int) -> Any:
        """The batch of a step."""
        epoch, place = divmod(step, self.epoch_steps)
        if step != self._next or place == 0:
            self._iterator = self._start(epoch)
            for _ in range(place):
                next(self._iterator)
        self._next = step + 1
        return next(self._iterator)

    def _start(self, epoch: int) -> Iterator[Any]:
        if self.loader.generator is not None:
            self.loader.generator.manual_seed(seed_of(self.seed, epoch))
        if isinstance(self.loader.sampler, DistributedSampler):
            self.loader.sampler.set_epoch(epoch)
        return iter(self.loader)


def _tables(height: int, width: int, augment: Augment) -> tuple[Tensor, Tensor, Tensor]:
    """What a drawn number stands for, int64: source rows, source columns (not flipped, then flipped), hidden places.

    rows: (2 crop + 1, H), offsets r * W of the source rows; columns: (2 (2 crop + 1), W); _OUTSIDE beyond the image.
    hides: (side, side) bool, side = max(H, W): whether the square around a row or column covers another.
    """
    shift = torch.arange(2 * augment.crop + 1)[:, None] - augment.crop
    rows, columns = shift + torch.arange(height), shift + torch.arange(width)
    rows = torch.where((rows >= 0) & (rows < height), rows * width, _OUTSIDE)
    columns = torch.where((columns >= 0) & (columns < width), columns, _OUTSIDE)
    places = torch.arange(max(height, width))
    from_first = places[None, :] - (places[:, None] - augment.cutout // 2)
    return rows, torch.cat([columns, columns.flip(1)]), (from_first >= 0) & (from_first < augment.cutout)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """A number of Beta(alpha, alpha), as the share of one of two Gamma(alpha) numbers."""
    gammas = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator)  # pyright: ignore[reportPrivateImportUsage]
    one, other = gammas.tolist()
    return one / (one + other) if one + other else 0.5


def _span(middle: float, length: float, side: int) -> tuple[int, int]:
    """Where a stretch begins and ends, as far as it lies within [0, side)."""
    return max(0, round(middle - length / 2)), min(side, round(middle + length / 2))


def _boxes(least: float, images: Images, seed: int, epoch: int) -> Tensor:
    """(N, 4) float32: top, left, height and width of a box for each image, as shares of the image's sides."""
    generator, (count, _, rows, columns) = generator_of(seed ^ _BOXES, epoch), images.pixels.shape
    area, ratio, down, right = torch.rand(4, count, generator=generator)
    area, ratio = least + (1 - least) * area, torch.exp((2 * ratio - 1) * _RATIO)  # ratio: width by height, in pixels
    high = (area / ratio * (columns / rows)).sqrt().clamp(max=1)
    wide = (area * ratio * (rows / columns)).sqrt().clamp(max=1)
    return torch.stack([down * (1 - high), right * (1 - wide), high, wide], 1)


def _sampled(x: Tensor, boxes: Tensor) -> Tensor:
    """The boxes (B, 4) of images (B, H, W, C), bilinearly sampled to (B, H, W, C)."""
    count, rows, columns, _ = x.shape
    top, left, high, wide = boxes.t()[:, :, None]  # (B, 1)
    down, right = ((torch.arange(side, device=x.device) + 0.5) / side for side in (rows, columns))
    y, z = 2 * (top + high * down) - 1, 2 * (left + wide * right) - 1  # (B, H), (B, W), in [-1, 1]
    grid = torch.stack([z[:, None, :].expand(count, rows, columns), y[:, :, None].expand(count, rows, columns)], -1)
    found = torch.nn.functional.grid_sample(x.permute(0, 3, 1, 2), grid, padding_mode="border", align_corners=False)
    return found.permute(0, 2, 3, 1)


def _normaliser(mean: Tensor, std: Tensor, images: Images) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) float32 on the images' device: pixel * scale + shift = (pixel / 255 - mean) / std."""
    channels = images.pixels.shape[1]
    if mean.shape != (channels,) or std.shape != (channels,):
        raise ValueError(
            f"mean and std have one entry a channel, {channels}; got {tuple(mean.shape)}, {tuple(std.shape)}"
        )
    if bool((std <= 0).any()):
        raise ValueError(f"channels cannot be normalised by the standard deviations {std.tolist()}; give others as std")
    mean, std = mean.double(), std.double()
    device = images.pixels.device
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)
