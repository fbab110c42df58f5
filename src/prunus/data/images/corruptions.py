"""The 15 standard corruptions of images at five strengths: noise, blur, weather, digital (Hendrycks & Dietterich 2019).

    bytes ─ x in [0, 1], (N, C, H, W) ─▶ distortion(x, strength, rng) ─ cut to [0, 1], to bytes ─▶ bytes

Two tables of strengths are in use. "cifar" is that of CIFAR-10-C, for images of about 32 pixels; no package has it, so
`distortions` does them, over scipy and Pillow, for many images at once. "imagenet" is that of ImageNet-C, and is
the package imagecorruptions, an image at a time. Values are cut, not rounded, to bytes, as in the published sets.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch

from prunus.data.images import distortions
from prunus.data.images.sets import Images

__all__ = ["CORRUPTIONS", "Strengths", "check_corruptions", "corrupt"]

Array = np.ndarray[Any, np.dtype[Any]]
Strengths = Literal["cifar", "imagenet"]

CORRUPTIONS = (
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
)
_AT_ONCE = 500  # images
_EXTRA = "pip install 'prunus[corruptions]'"
_lock = threading.Lock()  # imagecorruptions draws from numpy's global generator


def corrupt(images: Images, name: str, severity: int, *, seed: int = 0, strengths: Strengths = "cifar") -> Images:
    """The images with one corruption, in their order, on the CPU: a function of the arguments alone.

    name: one of CORRUPTIONS; severity: 1 (weak) to 5. Grey images stay grey. "cifar" is meant for sides of about 32,
    "imagenet" for larger ones, and at least 32. Two images of a set are corrupted differently, in two calls alike.
    Source: Hendrycks & Dietterich 2019, and the strengths of their CIFAR-10-C and ImageNet-C.
    Raises ValueError for a name, severity or size that does not go; ImportError naming the extra.

    >>> images = Images(torch.full((2, 3, 32, 32), 100, dtype=torch.uint8), torch.tensor([0, 1]), 2)
    >>> int(corrupt(images, "brightness", 5).pixels[0, 0, 0, 0])  # 100 + 0.3 * 255
    176
    """
    check_corruptions([name], [severity], strengths=strengths, size=tuple(images.pixels.shape[1:]))
    pixels = images.pixels.cpu().numpy()
    made = _corrupt_by_package if strengths == "imagenet" else _corrupt
    parts: list[Array] = []
    for start in range(0, len(pixels), _AT_ONCE):
        draws = np.random.SeedSequence([seed % 2**64, zlib.crc32(name.encode()), severity, start])
        parts.append(made(pixels[start : start + _AT_ONCE], name, severity, np.random.default_rng(draws)))
    return Images(torch.from_numpy(np.concatenate(parts)), images.labels.cpu(), images.classes)


def check_corruptions(
    names: Sequence[str],
    severities: Sequence[int],
    *,
    strengths: Strengths = "cifar",
    size: tuple[int, ...] | None = None,
) -> None:
    """Raise what `corrupt` would for these names and severities, before any work; size: (C, H, W) of the images.

    >>> check_corruptions(["fog"], [1, 5])
    """
    strange = [name for name in names if name not in CORRUPTIONS]
    if strange:
        raise ValueError(f"no corruption {strange[0]!r}; there are {', '.join(CORRUPTIONS)}")
    wrong = [severity for severity in severities if severity not in (1, 2, 3, 4, 5)]
    if wrong:
        raise ValueError(f"a severity is 1, 2, 3, 4 or 5; got {wrong[0]}")
    if find_spec("scipy") is None or find_spec("PIL") is None:
        raise ImportError(f"corruptions need scipy and Pillow: {_EXTRA}")
    if (strengths == "imagenet" or "frost" in names) and find_spec("imagecorruptions") is None:
        what = "frost needs the photographs" if strengths == "cifar" else "ImageNet-C's strengths are those"
        raise ImportError(f"{what} of the package imagecorruptions-imaug: {_EXTRA}")
    if size is not None and (size[0] not in (1, 3) or (strengths == "imagenet" and min(size[1:]) < 32)):
        raise ValueError(
            f"images of {size[0]} channels and {size[1]} x {size[2]} pixels cannot be corrupted: channels are 1 or 3, "
            "and ImageNet-C's strengths need sides of at least 32 (use strengths: cifar)"
        )


def _corrupt(pixels: Array, name: str, severity: int, rng: np.random.Generator) -> Array:
    """Bytes to bytes, (n, C, H, W)."""
    made = getattr(distortions, name)(pixels / 255.0, _CIFAR[name][severity - 1], rng)
    # A sum that is a whole number but for rounding must not lose a level.
    return (np.clip(made, 0, 1) * 255 + 1e-6).astype(np.uint8)


def _corrupt_by_package(pixels: Array, name: str, severity: int, rng: np.random.Generator) -> Array:
    from imagecorruptions import corrupt as corrupt_one

    # Two of its corruptions draw from generators of their own, and take a seed.
    own = name in ("impulse_noise", "glass_blur")
    made: list[Array] = []
    with _lock:
        before = np.random.get_state()  # noqa: NPY002
        try:
            for image in pixels.transpose(0, 2, 3, 1):
                seed = int(rng.integers(2**31))
                np.random.seed(seed)  # noqa: NPY002
                done: Array = corrupt_one(
                    np.ascontiguousarray(image), severity, name, **({"seed": seed} if own else {})
                )
                made.append(done.transpose(2, 0, 1)[: image.shape[2]])
        finally:
            np.random.set_state(before)  # noqa: NPY002
    return np.stack(made)


# CIFAR-10-C's strengths; lengths in pixels of an image of 32, those of elastic_transform in sides.
_CIFAR: dict[str, Sequence[Any]] = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # deviation
    "shot_noise": (500, 250, 100, 75, 50),  # photons at full brightness
    "impulse_noise": (0.01, 0.02, 0.03, 0.05, 0.07),  # share of values
    "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),  # radius, softness of its edge
    "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),  # deviation, reach, rounds
    "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),  # radius, deviation
    "zoom_blur": tuple(np.arange(1, stop, 0.01) for stop in (1.06, 1.11, 1.16, 1.21, 1.26)),  # factors
    "snow": (  # mean, deviation, zoom, threshold, radius and deviation of motion, share of the image
        *((0.1, 0.2, 1, 0.6, 8, 3, 0.95), (0.1, 0.2, 1, 0.5, 10, 4, 0.9), (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9)),
        *((0.25, 0.3, 2.25, 0.6, 12, 6, 0.85), (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8)),
    ),
    "frost": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),  # of the image, of the photograph
    "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),  # amount, decay of its roughness
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "elastic_transform": ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    "pixelate": (0.95, 0.9, 0.85, 0.75, 0.65),  # of the side
    "jpeg_compression": (80, 65, 58, 50, 40),  # quality
}
