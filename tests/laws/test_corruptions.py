"""Corruptions: alike for equal seeds, stronger with the severity, as independent code and hand-worked cases say."""

import math
from importlib.util import find_spec
from io import BytesIO

import corrupt_images  # pyright: ignore[reportMissingImports] - a script, on pytest's path
import distortions  # pyright: ignore[reportMissingImports] - beside it
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from prunus.data.images import Images, plain_batches
from prunus.measure import CORRUPTIONS, MEASURES, accuracy, corrupted_accuracy, corrupted_sets

PHOTOGRAPHS = find_spec("imagecorruptions") is not None
NAMES = [name for name in CORRUPTIONS if PHOTOGRAPHS or name != "frost"]


def corrupt(images, name, severity, seed=0):
    return torch.from_numpy(corrupt_images.corrupt(images.pixels.numpy(), name, severity, seed=seed))


def smooth(count=6, channels=3, side=32, seed=0):
    """Smooth colourful images, (count, channels, side, side)."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(seed))
    pixels = nn.functional.interpolate(coarse, (side, side), mode="bilinear", align_corners=True)
    return Images((255 * pixels).byte(), torch.arange(count) % 3, 3)


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("name", NAMES)
def test_every_corruption_is_a_function_of_its_seed(name):
    images = smooth()
    before = images.pixels.clone()
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    one, same, other = (corrupt(images, name, 3, seed=seed) for seed in (1, 1, 2))
    assert one.shape == before.shape
    assert one.dtype == torch.uint8
    assert torch.equal(one, same)
    random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    assert torch.equal(one, other) != random
    assert not torch.equal(one, before)
    assert torch.equal(images.pixels, before)
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "height", "width"), [(1, 8, 8), (3, 20, 33)])
def test_grey_small_and_oblong_images_are_corrupted(name, channels, height, width):
    pixels = smooth(3, channels, 40).pixels[:, :, :height, :width]
    images = Images(pixels, torch.arange(3), 3)
    assert corrupt(images, name, 5).shape == pixels.shape


# Stronger frost also darkens, stronger elastic transforms move less of the whole and more of the parts.
ORDERED = [name for name in CORRUPTIONS if name not in ("elastic_transform", "glass_blur", "frost")]


@pytest.mark.parametrize("name", ORDERED)
def test_images_move_away_with_the_severity(name):
    images = smooth(40)
    away = [(corrupt(images, name, s).float() - images.pixels.float()).abs().mean() for s in (1, 3, 5)]
    assert away[0] < away[1] < away[2]


def test_images_of_one_set_are_corrupted_differently_but_noise_has_the_stated_deviation():
    images = Images(torch.full((200, 3, 32, 32), 128, dtype=torch.uint8), torch.zeros(200).long(), 1)
    made = corrupt(images, "gaussian_noise", 5).double() / 255
    assert made.std() == pytest.approx(0.10, rel=0.01)
    assert not torch.equal(made[0], made[1])
    hit = corrupt(images, "impulse_noise", 5)
    assert (hit != 128).double().mean() == pytest.approx(0.07, rel=0.02)
    assert (hit == 255).double().mean() == pytest.approx(0.035, rel=0.03)
    shot = corrupt(images, "shot_noise", 5).double() / 255
    assert shot.std() == pytest.approx(math.sqrt(128 / 255 / 50), rel=0.01)


def test_parts_of_a_large_set_do_not_repeat(monkeypatch):
    monkeypatch.setattr(corrupt_images, "_AT_ONCE", 2)
    images = Images(torch.full((4, 1, 8, 8), 128, dtype=torch.uint8), torch.zeros(4).long(), 1)
    made = corrupt(images, "gaussian_noise", 3)
    assert not torch.equal(made[:2], made[2:])


def test_brightness_and_contrast_by_hand():
    pixels = torch.tensor([[[0, 100]], [[0, 50]], [[0, 0]]], dtype=torch.uint8)[None]  # a black pixel, an orange one
    bright = corrupt(Images(pixels, torch.tensor([0]), 1), "brightness", 3)  # 0.15 * 255 = 38.25 more
    assert bright[0, :, 0, 0].tolist() == [38, 38, 38]
    assert bright[0, :, 0, 1].tolist() == [138, 69, 0]
    flat = corrupt(Images(pixels, torch.tensor([0]), 1), "contrast", 2)  # halfway to each channel's mean
    assert flat[0].tolist() == [[[25, 75]], [[12, 37]], [[0, 0]]]


@pytest.mark.skipif(not PHOTOGRAPHS, reason="needs the photographs of imagecorruptions-imaug")
def test_frost_is_a_piece_of_a_photograph_in_its_share():
    black = np.zeros((3, 3, 32, 32))
    weak, strong = (distortions.frost(black, strength, rng(1)) for strength in ((1, 0.2), (0.75, 0.45)))
    assert strong == pytest.approx(2.25 * weak)
    assert 0.1 < strong.mean() < 0.45
    assert not np.array_equal(weak[0], weak[1])
    white = distortions.frost(np.ones((1, 1, 32, 32)), (0.75, 0.45), rng(1))
    grey = 0.299 * strong[0, 0] + 0.587 * strong[0, 1] + 0.114 * strong[0, 2]
    assert white[0, 0] == pytest.approx(0.75 + grey)


def test_pixelate_and_jpeg_are_pillows():
    image = smooth(1)
    pillow = Image.fromarray(image.pixels[0].permute(1, 2, 0).numpy())
    box = pillow.resize((20, 20), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    assert np.array_equal(corrupt(image, "pixelate", 5)[0].permute(1, 2, 0).numpy(), np.asarray(box))
    stored = BytesIO()
    pillow.save(stored, "JPEG", quality=40)
    made = corrupt(image, "jpeg_compression", 5)[0].permute(1, 2, 0).numpy()
    assert np.array_equal(made, np.asarray(Image.open(stored)))


@pytest.mark.parametrize(("radius", "softness"), [(1.5, 0.1), (3, 0.5)])
def test_defocus_is_a_soft_disk(radius, softness):
    cv2 = pytest.importorskip("cv2")

    x = smooth(2).pixels.numpy() / 255.0
    kernel = pytest.importorskip("imagecorruptions").corruptions.disk(radius, softness)
    expected = np.stack([[cv2.filter2D(channel, -1, kernel) for channel in image] for image in x])
    assert distortions.defocus_blur(x, (radius, softness), rng()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("angle", [-40.0, 10.0, -100.0])
def test_motion_is_that_of_independent_code(angle):
    x = smooth(1).pixels.numpy() / 255.0
    expected = (
        pytest.importorskip("imagecorruptions")
        .corruptions._motion_blur(x[0].transpose(1, 2, 0), 8, 2, angle)
        .transpose(2, 0, 1)
    )
    assert distortions._moved(x, 8, 2, np.array([angle]))[0] == pytest.approx(expected, abs=1e-6)


def test_fog_is_that_of_independent_code(monkeypatch):
    ours = distortions._plasma(1, 32, 1.75, rng(3))[0]
    monkeypatch.setattr(np.random, "uniform", rng(3).uniform)
    assert ours == pytest.approx(pytest.importorskip("imagecorruptions").corruptions.plasma_fractal(32, 1.75), abs=1e-5)


def test_zoom_is_scipys_of_the_middle():
    from scipy.ndimage import zoom

    x = smooth(1).pixels.numpy() / 255.0
    inner = math.ceil(32 / 1.21)
    first = (32 - inner) // 2
    grown = zoom(x[0, :, first : first + inner, first : first + inner], (1, 1.21, 1.21), order=1)
    trim = (grown.shape[1] - 32) // 2
    expected = grown[:, trim : trim + 32, trim : trim + 32]
    assert distortions._zoomed(x, 1.21)[0] == pytest.approx(expected, abs=1e-12)


def test_the_affine_map_of_elastic_transforms_is_opencvs():
    cv2 = pytest.importorskip("cv2")

    x = smooth(1).pixels.numpy() / 255.0
    ours = distortions.elastic_transform(x, (0, 0, 0.08), rng(5))[0]
    points = 16 + 10 * np.array([[1, 1], [1, -1], [-1, -1]], dtype=np.float32)
    moved = points + rng(5).uniform(-2.56, 2.56, size=(1, 3, 2))[0].astype(np.float32)
    matrix = cv2.getAffineTransform(points, moved)
    image = x[0].transpose(1, 2, 0).astype(np.float32)
    expected = cv2.warpAffine(image, matrix, (32, 32), borderMode=cv2.BORDER_REFLECT_101).transpose(2, 0, 1)
    assert np.abs(ours - expected).max() < 0.02  # OpenCV rounds places to 1/32 of a pixel


def test_glass_moves_pixels_by_no_more_than_its_reach():
    places = np.arange(32 * 32, dtype=np.float64).reshape(32, 32) % 251 / 255
    x = np.broadcast_to(places, (2, 3, 32, 32))
    y = distortions.glass_blur(x, (0.01, 1, 1), rng())
    near = np.stack([np.roll(places, (down, right), (0, 1)) for down in (0, 1) for right in (0, 1)])
    assert (np.abs(y[0, 0] - near).min(axis=0)[2:, 2:] < 1 / 255).mean() > 0.95  # the rest was moved twice
    assert (y[0, 0] != places).mean() > 0.5
    assert not np.array_equal(y[0], y[1])


class Mean(nn.Module):
    """Three classes by the mean of each channel."""

    def forward(self, x):
        return 4 * x.mean((2, 3))


def measure(images):
    return accuracy(Mean(), plain_batches(images, batch_size=4, mean=torch.zeros(3), std=torch.ones(3)))


def test_means_are_over_all_sets_and_each_set_is_measured_alone(tmp_path):
    images = smooth()
    for name in ("fog", "contrast"):
        corrupt_images.write_set(images, tmp_path, name, seed=3)
    found = corrupted_accuracy(images, measure, tmp_path, ["fog", "contrast"], [1, 5])
    alone = measure(Images(corrupt(images, "fog", 5, seed=3), images.labels, 3))
    assert found.sets["fog"][5] == alone
    each = [found.sets[name][severity] for name in ("fog", "contrast") for severity in (1, 5)]
    for which in MEASURES:
        assert found.mean()[which] == pytest.approx(sum(getattr(one, which) for one in each) / 4)
    assert found.mean(name="fog", severity=5)["loss"] == alone.loss
    assert found.mean(severity=1)["loss"] == pytest.approx((each[0].loss + each[2].loss) / 2)
    with pytest.raises(ValueError, match="name at least one corruption"):
        corrupted_accuracy(images, measure, tmp_path, [])
    with pytest.raises(ValueError, match="labels of other images: give another folder"):
        corrupt_images.write_set(images.take(torch.arange(3)), tmp_path, "snow")


def test_sets_are_read_as_published_and_those_of_the_first_images_too(tmp_path):
    images = smooth()
    whole = np.random.default_rng(0).integers(0, 256, size=(30, 32, 32, 3), dtype=np.uint8)
    np.save(tmp_path / "fog.npy", whole)
    np.save(tmp_path / "labels.npy", np.tile(images.labels.numpy(), 5).astype(np.uint8))
    for count in (6, 4):
        ((name, severity, found),) = corrupted_sets(images.take(torch.arange(count)), tmp_path, ["fog"], [2])
        assert (name, severity) == ("fog", 2)
        assert np.array_equal(found.pixels.permute(0, 2, 3, 1).numpy(), whole[6 : 6 + count])
        assert torch.equal(found.labels, images.labels[:count])
    with pytest.raises(ValueError, match=r"no .*snow\.npy, .* leave snow out"):
        corrupted_sets(images, tmp_path, ["fog", "snow"], [2])
    for others in (images.take(torch.arange(5, -1, -1)), smooth(6, 1), smooth(7)):
        with pytest.raises(ValueError, match="in another order: name another folder"):
            corrupted_sets(others, tmp_path, ["fog"], [2])
    for wrong in (0, 6):
        with pytest.raises(ValueError, match=f"severities go from 1 to 5; got {wrong}"):
            corrupted_sets(images, tmp_path, ["fog"], [2, wrong])
    np.save(tmp_path / "labels.npy", np.zeros(29))
    with pytest.raises(ValueError, match="in another order: name another folder"):
        corrupted_sets(images, tmp_path, ["fog"], [2])
