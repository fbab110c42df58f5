"""What each standard corruption does to images, given its strength: x (n, C, H, W) float64 in [0, 1] to the same.

Results may leave [0, 1]; whoever calls cuts them. Definitions follow Hendrycks & Dietterich 2019, with a random draw of
its own for every image; which strengths are in use says `corrupt_images`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "brightness",
    "contrast",
    "defocus_blur",
    "elastic_transform",
    "fog",
    "frost",
    "gaussian_noise",
    "glass_blur",
    "impulse_noise",
    "jpeg_compression",
    "motion_blur",
    "pixelate",
    "shot_noise",
    "snow",
    "zoom_blur",
]

Array = np.ndarray[Any, np.dtype[Any]]


def gaussian_noise(x: Array, deviation: float, rng: np.random.Generator) -> Array:
    """Independent noise on every value."""
    return x + rng.normal(scale=deviation, size=x.shape)


def shot_noise(x: Array, photons: float, rng: np.random.Generator) -> Array:
    """As many photons as a Poisson draw around each value says; `photons` at full brightness."""
    return rng.poisson(x * photons) / photons


def impulse_noise(x: Array, share: float, rng: np.random.Generator) -> Array:
    """A share of the values black or white (salt and pepper), each channel by itself."""
    hit, salt = rng.random(x.shape) < share, rng.random(x.shape) < 0.5
    return np.where(hit, salt.astype(x.dtype), x)


def defocus_blur(x: Array, strength: tuple[float, float], rng: np.random.Generator) -> Array:
    """A disk as the kernel, its edge softened by a 3 x 3 Gaussian."""
    from scipy.ndimage import correlate

    radius, softness = strength
    along = np.arange(-math.ceil(radius) - 1, math.ceil(radius) + 2)
    disk = (along[:, None] ** 2 + along**2 <= radius**2).astype(float)
    edge = np.exp(-(np.arange(-1, 2) ** 2) / (2 * softness**2))
    soft = np.outer(edge, edge) / edge.sum() ** 2
    return correlate(x, correlate(disk / disk.sum(), soft, mode="constant")[None, None], mode="mirror")


def glass_blur(x: Array, strength: tuple[float, int, int], rng: np.random.Generator) -> Array:
    """A Gaussian before and after each pixel took the value of a near one.

    In the code behind CIFAR-10-C the swap of two pixels copies the second one: so it does here.
    """
    deviation, reach, rounds = strength
    height, width = x.shape[2:]
    y = (_gaussian(x, deviation) * 255).astype(np.uint8)
    image = np.arange(len(x))
    for _ in range(rounds):
        for row in range(height - reach, reach, -1):
            for column in range(width - reach, reach, -1):
                off = rng.integers(-reach, reach, size=(2, len(x)))
                y[:, :, row, column] = y[image, :, row + off[0], column + off[1]]
    return _gaussian(y / 255.0, deviation)


def _gaussian(x: Array, deviation: float, *, mode: str = "nearest", truncate: float = 4.0) -> Array:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, (0,) * (x.ndim - 2) + (deviation, deviation), mode=mode, truncate=truncate)


def motion_blur(x: Array, strength: tuple[float, float], rng: np.random.Generator) -> Array:
    """Each image smeared along an angle of its own, within 45 degrees of level."""
    return _moved(x, *strength, rng.uniform(-45, 45, size=len(x)))


def _moved(x: Array, radius: float, deviation: float, degrees: Array) -> Array:
    """Each image smeared one way along its angle: weights exp(-i^2 / 2 deviation^2), i = 0 .. 2 radius, sum 1."""
    height, width = x.shape[2:]
    weights = np.exp(-(np.arange(2 * math.ceil(radius) + 1) ** 2) / (2 * deviation**2))
    angle, total = np.deg2rad(degrees), np.zeros_like(x)
    image, channel = np.arange(len(x))[:, None, None, None], np.arange(x.shape[1])[:, None, None]
    for step, weight in enumerate(weights / weights.sum()):
        down, right = (np.ceil(step * each - 0.5).astype(int)[:, None] for each in (np.sin(angle), np.cos(angle)))
        rows = np.clip(np.arange(height) + down, 0, height - 1)[:, None, :, None]  # (n, 1, H, 1)
        columns = np.clip(np.arange(width) + right, 0, width - 1)[:, None, None, :]
        total += weight * x[image, channel, rows, columns]
    return total


def zoom_blur(x: Array, factors: Array, rng: np.random.Generator) -> Array:
    """The mean of the images and of their enlargements by all factors."""
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


def _zoomed(x: Array, factor: float) -> Array:
    """The middle of the images enlarged to their size, linearly between pixels: R x C^T."""
    rows, columns = (_zoom_matrix(side, factor) for side in x.shape[2:])
    return rows @ x @ columns.T


def _zoom_matrix(side: int, factor: float) -> Array:
    """(side, side): what each new place takes of the old ones along one axis."""
    from scipy.ndimage import zoom

    inner = math.ceil(side / factor)
    first = (side - inner) // 2
    grown: Any = zoom(np.eye(inner), (factor, 1), order=1)
    trim = (len(grown) - side) // 2
    whole = np.zeros((side, side))
    whole[:, first : first + inner] = grown[trim : trim + side]
    return whole


def snow(x: Array, strength: tuple[float, ...], rng: np.random.Generator) -> Array:
    """Zoomed and thresholded noise, smeared downwards, over a whitened image; and the same flakes upside down."""
    mean, deviation, zoom, threshold, radius, smear, share = strength
    flakes = _zoomed(rng.normal(mean, deviation, size=(len(x), 1, *x.shape[2:])), zoom)
    flakes = np.floor(np.clip(np.where(flakes < threshold, 0, flakes), 0, 1) * 255) / 255
    flakes = _moved(flakes, radius, smear, rng.uniform(-135, -45, size=len(x)))
    whitened = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return share * x + (1 - share) * whitened + flakes + flakes[:, :, ::-1, ::-1]


def _grey(x: Array) -> Array:
    """(n, 1, H, W)"""
    if x.shape[1] == 1:
        return x
    return np.tensordot((0.299, 0.587, 0.114), x, axes=(0, 1))[:, None]


def frost(x: Array, strength: tuple[float, float], rng: np.random.Generator) -> Array:
    """A random piece of one of five photographs of frost, at a fifth of its size, over the image.

    The photographs are imagecorruptions-imaug's, shrunk by Pillow, which also smooths them; CIFAR-10-C used OpenCV.
    """
    of_image, of_photograph = strength
    photographs = [_photograph(number, x.shape[2:]) for number in range(1, 6)]
    pieces: list[Array] = []
    for _ in range(len(x)):
        photograph = photographs[rng.integers(5)]
        row = rng.integers(0, photograph.shape[1] - x.shape[2])
        column = rng.integers(0, photograph.shape[2] - x.shape[3])
        pieces.append(photograph[:, row : row + x.shape[2], column : column + x.shape[3]])
    whole = np.stack(pieces)
    return of_image * x + of_photograph * (whole if x.shape[1] == 3 else _grey(whole))


def _photograph(number: int, size: Sequence[int]) -> Array:
    """(3, H, W) of the package's frost, larger than `size`."""
    from PIL import Image

    found = find_spec("imagecorruptions")
    if found is None or found.origin is None:
        raise ImportError("frost needs photographs: pip install --no-deps imagecorruptions-imaug")
    (path,) = (Path(found.origin).parent / "frost").glob(f"frost{number}.*")
    with Image.open(path) as image:
        scale = max(0.2, *(1.1 * side / whole for side, whole in zip(size, image.size[::-1], strict=True)))
        smaller = image.convert("RGB").resize([round(scale * side) for side in image.size], Image.Resampling.BILINEAR)
        return np.asarray(smaller).transpose(2, 0, 1) / 255.0


def fog(x: Array, strength: tuple[float, float], rng: np.random.Generator) -> Array:
    """Clouds of light laid over, then everything darkened to the old maximum."""
    amount, decay = strength
    height, width = x.shape[2:]
    fog = _plasma(len(x), 1 << (max(height, width) - 1).bit_length(), decay, rng)[:, None, :height, :width]
    brightest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + amount * fog) * brightest / (brightest + amount)


def _plasma(count: int, side: int, decay: float, rng: np.random.Generator) -> Array:
    """(count, side, side) in [0, 1]: periodic height maps by the diamond-square algorithm; side is a power of two."""
    heights = np.zeros((count, side, side))
    step, rough = side, 100.0

    def between(total: Array) -> Array:
        return total / 4 + rough * rng.uniform(-rough, rough, size=total.shape)

    while step >= 2:
        half = step // 2
        corners = heights[:, ::step, ::step]
        along = corners + np.roll(corners, -1, axis=1)
        heights[:, half::step, half::step] = between(along + np.roll(along, -1, axis=2))
        middles = heights[:, half::step, half::step]
        heights[:, ::step, half::step] = between(
            middles + np.roll(middles, 1, axis=1) + corners + np.roll(corners, -1, axis=2)
        )
        heights[:, half::step, ::step] = between(
            middles + np.roll(middles, 1, axis=2) + corners + np.roll(corners, -1, axis=1)
        )
        step, rough = half, rough / decay
    heights -= heights.min(axis=(1, 2), keepdims=True)
    return heights / heights.max(axis=(1, 2), keepdims=True)


def brightness(x: Array, more: float, rng: np.random.Generator) -> Array:
    """The value V = max(R, G, B) raised, hue and saturation kept: all channels in proportion."""
    value = x.max(axis=1, keepdims=True)
    raised = np.clip(value + more, 0, 1)
    return np.where(value > 0, x * raised / np.where(value > 0, value, 1), raised)


def contrast(x: Array, share: float, rng: np.random.Generator) -> Array:
    """Every channel drawn towards its mean."""
    mean = x.mean(axis=(2, 3), keepdims=True)
    return (x - mean) * share + mean


def elastic_transform(x: Array, strength: tuple[float, float, float], rng: np.random.Generator) -> Array:
    """Three points of the image moved at random (an affine map), then every pixel by a smooth random field."""
    height, width = x.shape[2:]
    side = min(height, width)
    amount, smooth, shift = (side * part for part in strength)
    middle, reach = np.array([width // 2, height // 2]), side // 3
    points = middle + reach * np.array([[1, 1], [1, -1], [-1, -1]])  # (x, y)
    moved = points + rng.uniform(-shift, shift, size=(len(x), 3, 2))
    ones = np.ones((len(x), 3, 1))
    back = np.linalg.solve(np.concatenate([moved, ones], axis=2), points.astype(float))  # (n, 3, 2): new -> old
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    old = np.stack([columns, rows, np.ones_like(rows)], axis=-1) @ back[:, None]  # (n, H, W, 2)
    y = _sampled(x, old[..., 1], old[..., 0], mode="mirror")
    down, right = (
        amount * _gaussian(rng.uniform(-1, 1, size=(len(x), height, width)), smooth, mode="reflect", truncate=3)
        for _ in range(2)
    )
    return _sampled(y, rows + down, columns + right, mode="reflect") if amount else y


def _sampled(x: Array, rows: Array, columns: Array, *, mode: str) -> Array:
    """The images at places (n, H, W), linearly between pixels; mode: how they go on outside, as scipy says."""
    from scipy.ndimage import map_coordinates

    return np.stack(
        [
            [map_coordinates(channel, [down, right], order=1, mode=mode) for channel in image]
            for image, down, right in zip(x, rows, columns, strict=True)
        ]
    )


def pixelate(x: Array, share: float, rng: np.random.Generator) -> Array:
    """Shrunk to a share of its side by area, and enlarged again."""
    from PIL import Image

    height, width = x.shape[2:]
    small = max(1, int(width * share)), max(1, int(height * share))
    box = Image.Resampling.BOX
    return _by_pillow(x, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(x: Array, quality: int, rng: np.random.Generator) -> Array:
    """Compressed and read again."""
    from PIL import Image

    def compressed(image: Any) -> Any:
        stored = io.BytesIO()
        image.save(stored, "JPEG", quality=quality)
        return Image.open(stored)

    return _by_pillow(x, compressed)


def _by_pillow(x: Array, change: Callable[[Any], Any]) -> Array:
    from PIL import Image

    pixels = np.rint(x * 255).astype(np.uint8).transpose(0, 2, 3, 1)
    made = [np.asarray(change(Image.fromarray(each.squeeze(2) if each.shape[2] == 1 else each))) for each in pixels]
    return np.stack(made).reshape(pixels.shape).transpose(0, 3, 1, 2) / 255.0
