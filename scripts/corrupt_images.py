"""Make what the key `corruptions` of a recipe or a grid reads: corrupted test images, in processes, without a GPU.

    python scripts/corrupt_images.py recipes/soups/resnet18-grid.yaml --processes 8

They are the 15 standard corruptions at the five strengths of CIFAR-10-C, for sides of about 32 pixels, drawn anew, and
go into `corruptions.folder` in the form in which CIFAR-10-C is published: <name>.npy and labels.npy, five times all
images, sorted by severity. What is there stays. Needs scipy and Pillow (`prunus[images]`); frost also photographs:
`pip install --no-deps imagecorruptions-imaug`. For ImageNet-C's strengths, for larger images, that package is enough.

    bytes ─ x in [0, 1], (n, C, H, W) ─▶ distortion(x, strength, rng) ─ cut to [0, 1], to bytes ─▶ bytes
"""

from __future__ import annotations

import argparse
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import distortions
import numpy as np
import torch

from prunus.data.images import Images
from prunus.machine import atomic
from prunus.measure import CORRUPTIONS
from prunus.recipe import ClassifierRecipe, parse
from prunus.recipe.plain import read_yaml
from prunus.run.grid import Grid
from prunus.vision.setting import Setting

Array = np.ndarray[Any, np.dtype[Any]]
_AT_ONCE = 500  # images


def corrupt(pixels: Array, name: str, severity: int, *, seed: int = 0) -> Array:
    """Bytes (n, C, H, W), C 1 or 3, with one of CORRUPTIONS, weak (1) to strong (5): a function of the arguments alone.

    Two images of a set are corrupted differently, in two calls alike. Values are cut, not rounded, to bytes.
    Source: Hendrycks & Dietterich 2019, and the strengths of their CIFAR-10-C.

    >>> int(corrupt(np.full((2, 3, 32, 32), 100, dtype=np.uint8), "brightness", 5)[0, 0, 0, 0])  # 100 + 0.3 * 255
    176
    """
    parts: list[Array] = []
    for start in range(0, len(pixels), _AT_ONCE):
        draws = np.random.SeedSequence([seed % 2**64, zlib.crc32(name.encode()), severity, start])
        x, strength = pixels[start : start + _AT_ONCE] / 255.0, STRENGTHS[name][severity - 1]
        made = getattr(distortions, name)(x, strength, np.random.default_rng(draws))
        # A sum that is a whole number but for rounding must not lose a level.
        parts.append((np.clip(made, 0, 1) * 255 + 1e-6).astype(np.uint8))
    return np.concatenate(parts)


def write_set(images: Images, folder: Path, name: str, *, seed: int = 0) -> None:
    """<name>.npy and labels.npy of the images, unless they are there. Raises ValueError if other images' are."""
    labels = np.tile(images.labels.cpu().numpy(), 5)
    if not (folder / "labels.npy").exists():
        _save(folder / "labels.npy", labels)
    elif not np.array_equal(np.load(folder / "labels.npy"), labels):
        raise ValueError(f"{folder} holds labels of other images: give another folder")
    if not (folder / f"{name}.npy").exists():
        pixels = images.pixels.cpu().numpy()
        whole = np.concatenate([corrupt(pixels, name, severity, seed=seed) for severity in range(1, 6)])
        _save(folder / f"{name}.npy", whole.transpose(0, 2, 3, 1))


def _save(path: Path, array: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as part, part.open("wb") as file:
        np.save(file, array)


def make(recipe: ClassifierRecipe, name: str, seed: int = 0) -> None:
    """One corruption of the images that the recipe measures on."""
    torch.set_num_threads(1)
    asked = recipe.corruptions
    assert asked is not None
    plain = Setting.of(recipe.model_copy(update={"device": "cpu", "corruptions": None}))
    write_set(plain.corruptible(asked), Path(asked.folder).expanduser(), name, seed=seed)


def recipes(raw: dict[str, Any], name: str) -> Iterator[ClassifierRecipe]:
    """The recipe of a file, or those of its cells."""
    if "base" not in raw:
        yield parse(raw, ClassifierRecipe, name)
        return
    grid = parse(raw, Grid, name)
    yield from grid.recipes(grid.seeds[0])


def main() -> None:
    """Collect the sets of all cells, each once, and make them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--processes", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    parser.add_argument("--seed", type=int, default=0, help="of the random draws")
    args = parser.parse_args()
    found = [each for each in recipes(read_yaml(args.recipe), str(args.recipe)) if each.corruptions is not None]
    asked = [(recipe, recipe.corruptions) for recipe in found if recipe.corruptions is not None]
    jobs = {(each.folder, name): recipe for recipe, each in asked for name in each.names or CORRUPTIONS}
    if not jobs:
        parser.error("no cell has corruptions")
    with ProcessPoolExecutor(args.processes) as pool:
        for done in [pool.submit(make, recipe, name, args.seed) for (_, name), recipe in jobs.items()]:
            done.result()
    sys.stdout.write(f"{len(jobs)} corruptions are there\n")


# CIFAR-10-C's strengths; lengths in pixels of an image of 32, those of elastic_transform in sides.
STRENGTHS: dict[str, Sequence[Any]] = {
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


if __name__ == "__main__":
    main()
