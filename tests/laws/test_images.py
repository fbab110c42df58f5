"""Images: what is read is what was written; a batch is what a slow loop over pixels makes of the same draws."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader, IterableDataset

from prunus.data.images import Augment, ImageBatches, Images, LoaderBatches, plain_batches, read_images
from prunus.data.images import batches as batches_module
from tests.conftest import unwaited


def noise(count: Any = 11, channels: Any = 3, height: Any = 6, width: Any = 5, classes: Any = 4, seed: Any = 0):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, channels, height, width), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % classes, classes)


def encoded(array: Any, form: Any, **options: Any):
    file = io.BytesIO()
    Image.fromarray(array).save(file, form, **options)
    return file.getvalue()


def write_parquet(
    path: Any, images: Any, *, form: Any = "PNG", columns: Any = ("img", "label"), names: Any = None, plain: Any = False
):
    arrays = [array.squeeze(2) if array.shape[2] == 1 else array for array in images.pixels.permute(0, 2, 3, 1).numpy()]
    content = [encoded(array, form, **({"lossless": True} if form == "WEBP" else {})) for array in arrays]
    rows = content if plain else [{"bytes": each, "path": None} for each in content]
    table = pyarrow.table({columns[0]: rows, columns[1]: images.labels.tolist()})
    if names:
        info = {"info": {"features": {columns[1]: {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pyarrow.parquet.write_table(table, path)


def same(one: Any, other: Any):
    return torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)


# Reading


@pytest.mark.parametrize(
    ("form", "channels", "columns", "plain"),
    [
        ("PNG", 3, ("img", "label"), False),
        ("WEBP", 3, ("image", "fine_label"), False),
        ("PNG", 1, ("image", "labels"), True),
    ],
)
def test_a_folder_of_parquet_gives_back_every_pixel_in_order(
    tmp_path: Path, form: Any, channels: Any, columns: Any, plain: Any
):
    written = [noise(count, channels, seed=count) for count in (3, 300)]  # more than one thread's share
    (tmp_path / "z").mkdir()
    write_parquet(tmp_path / "train-1.parquet", written[1], form=form, columns=columns, plain=plain)
    write_parquet(tmp_path / "z" / "train-0.parquet", written[0], form=form, columns=columns, plain=plain)
    write_parquet(tmp_path / "training.parquet", noise(1, channels), columns=columns)  # another split
    found = read_images(str(tmp_path), "train")
    assert torch.equal(found.pixels, torch.cat([each.pixels for each in written]))
    assert torch.equal(found.labels, torch.cat([each.labels for each in written]))
    assert found.classes == 4
    with pytest.raises(FileNotFoundError, match=r"no test\*\.parquet"):
        read_images(str(tmp_path), "test")
    with pytest.raises(ValueError, match="say which split"):
        read_images(tmp_path, None)


def test_classes_are_those_that_the_data_set_names(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", noise(), names=list("abcdefg"))
    assert read_images(tmp_path / "a.parquet", None).classes == 7


def test_grey_among_coloured_images_becomes_grey_in_three_channels(tmp_path: Path):
    grey, coloured = np.full((2, 2), 7, np.uint8), np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    rows = [encoded(grey, "PNG"), encoded(coloured, "PNG")]
    pyarrow.parquet.write_table(pyarrow.table({"img": rows, "label": [0, 1]}), tmp_path / "a.parquet")
    pixels = read_images(tmp_path / "a.parquet", None).pixels
    assert pixels[0].unique().tolist() == [7]
    assert np.array_equal(pixels[1].permute(1, 2, 0).numpy(), coloured)


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_arrays_are_read_as_they_are(tmp_path: Path, ending: Any):
    images, path = noise(channels=1), tmp_path / f"train.{ending}"
    content: dict[str, Any] = {"pixels": images.pixels[:, 0].contiguous(), "labels": images.labels.int()}
    if ending == "npz":
        arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in content.items()}
        np.savez(path, **arrays)
    else:
        save_file(content, path)
    assert same(read_images(path, None), images)
    assert same(read_images(tmp_path, "train"), images)


def test_a_source_without_splits_is_split_once_and_for_all(tmp_path: Path):
    write_parquet(tmp_path / "a.parquet", images := noise(10))
    parts = [read_images(tmp_path / "a.parquet", split) for split in ("train", "test")]
    assert [len(part) for part in parts] == [8, 2]
    rows = {tuple(row.tolist()) for part in parts for row in part.pixels.flatten(1)}
    assert rows == {tuple(row.tolist()) for row in images.pixels.flatten(1)}
    assert same(read_images(tmp_path / "a.parquet", "test"), parts[1])
    assert same(read_images(tmp_path / "a.parquet", "train", test_share=0), images)
    with pytest.raises(ValueError, match="no splits of its own"):
        read_images(tmp_path / "a.parquet", "validation")


def test_digits_are_scikit_learns():
    train, test = read_images("digits"), read_images("digits", "test")
    assert (train.pixels.shape, test.pixels.shape) == ((1438, 1, 8, 8), (359, 1, 8, 8))
    assert train.classes == 10
    whole = read_images("digits", None)
    assert (whole.pixels.min(), whole.pixels.max(), whole.labels[:3].tolist()) == (0, 255, [0, 1, 2])
    assert whole.pixels[0, 0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]  # 0 0 5 13 9 1 0 0, times 255 / 16


def test_what_is_no_image_set_is_refused(tmp_path: Path):
    def parquet(**columns: Any):
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")

    def refused(message: Any, error: Any = ValueError, source: Any = tmp_path / "a.parquet"):
        with pytest.raises(error, match=message):
            read_images(source, None)

    small, large = (encoded(np.zeros((side, 4, 3), np.uint8), "PNG") for side in (4, 5))
    parquet(img=[small, large], label=[0, 1])
    refused(r"image 0 is \(4, 4\), image 1 is \(5, 4\).*LoaderBatches")
    parquet(picture=[small], label=[0])
    refused("columns .*'picture'.*rename")
    parquet(img=[b"text"], label=[0])
    refused("image 0 is no image that Pillow can read")
    parquet(img=[encoded(np.zeros((4, 4), np.uint16), "PNG")], label=[0])
    refused("more than 8 bits")
    parquet(img=[small], label=[-1])
    refused("image 0 has the label -1; classes are 0 and up")
    refused("no file", FileNotFoundError, tmp_path / "absent.parquet")
    (tmp_path / "a.txt").touch()
    refused("ends in none of", source=tmp_path / "a.txt")
    np.savez(tmp_path / "b.npz", images=np.zeros(1))
    refused(r"holds \['images'\]", source=tmp_path / "b.npz")


@pytest.mark.parametrize(("package", "source"), [("datasets", "owner/name"), ("sklearn.datasets", "digits")])
def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, package: Any, source: Any):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'prunus\["):
        read_images(source)


def test_hub_data_sets_are_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    datasets = pytest.importorskip("datasets")
    images = noise(5)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdef"))})
    pictures = [Image.fromarray(array) for array in images.pixels.permute(0, 2, 3, 1).numpy()]
    rows = datasets.Dataset.from_dict({"img": pictures, "label": images.labels.tolist()}, features=features)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: asked.append((*names, split)) or rows)
    found = read_images("owner/name:plain", "test")
    assert same(found, images)
    assert found.classes == 6
    assert asked == [("owner/name", "plain", "test")]


# The value


def test_images_check_themselves():
    pixels = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    for bad, labels, message in [
        (pixels.float(), torch.zeros(2).long(), "uint8"),
        (pixels[0], torch.zeros(2).long(), r"\(N, C, H, W\)"),
        (pixels, torch.zeros(2), "int64"),
        (pixels, torch.zeros(3).long(), r"\(2,\) int64"),
        (pixels, torch.tensor([0, 2]), "labels go from 0 to 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Images(bad, labels, 2)


def test_split_parts_are_disjoint_complete_ordered_and_seeded():
    images = Images(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), torch.arange(50), 50)
    rest, held = images.split(0.1, seed=3)
    assert len(held) == 5
    assert sorted([*rest.labels.tolist(), *held.labels.tolist()]) == list(range(50))
    assert held.labels.tolist() == sorted(held.labels.tolist()) == held.pixels.flatten().tolist()
    assert same(images.split(0.1, seed=3)[1], held)
    assert not same(images.split(0.1, seed=4)[1], held)
    with pytest.raises(ValueError, match="leaves 50 and 0"):
        images.split(1.0, seed=0)


def test_statistics_are_those_of_the_pixels():
    images = noise()
    values = images.pixels.double().div(255).transpose(0, 1).flatten(1)
    mean, std = images.statistics()
    torch.testing.assert_close(mean, values.mean(1).float())
    torch.testing.assert_close(std, values.std(1, correction=0).float())


# Batches


def slow(images: Any, draw: Any, mean: Any, std: Any, augment: Any, flipped: Any):
    """One image as a loop over its pixels makes it: (C, H, W) float64."""
    number, top, left, middle, centre = draw
    channels, height, width = images.shape[1:]
    x = np.zeros((channels, height, width))
    for row in range(height):
        for column in range(width):
            source_row = row + top - augment.crop
            source_column = (width - 1 - column if flipped else column) + left - augment.crop
            inside = 0 <= source_row < height and 0 <= source_column < width
            low, side = augment.cutout // 2, augment.cutout
            cut = middle - low <= row < middle - low + side and centre - low <= column < centre - low + side
            if inside and not cut:
                x[:, row, column] = (images[number, :, source_row, source_column] / 255 - mean) / std
    return x


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "augment", [Augment(), Augment(crop=2), Augment(flip=True), Augment(cutout=3), Augment(2, True, 4)], ids=str
)
def test_a_batch_is_what_a_loop_over_pixels_makes(augment: Any, channels_last: Any):
    images = noise(40)
    mean, std = images.statistics()
    made = ImageBatches(images, batch_size=16, seed=5, augment=augment, channels_last=channels_last)
    draws, labels = made._draw(1)
    assert draws.shape == (5, 32)  # the ragged rest is left out
    places = 2 * augment.crop + 1
    seen = []
    for step in (2, 3):
        x, y = made(step)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert x.is_contiguous(memory_format=layout)
        part = slice(16 * (step - 2), 16 * (step - 1))
        for place, (first, top, left, middle, centre) in enumerate(draws[:, part].T.tolist()):
            number = first // 30
            draw = (number, top, left % places, middle, centre)
            expected = slow(images.pixels.double().numpy(), draw, mean.numpy(), std.numpy(), augment, left >= places)
            np.testing.assert_allclose(x[place].numpy(), expected, atol=2e-6)
            assert (x[place].numpy() == 0).sum() >= (expected == 0).sum()  # what is outside is exactly 0
            assert y[place] == images.labels[number]
            seen.append(number)
    assert len(set(seen)) == 32
    assert torch.equal(labels, images.labels[seen])


def test_joined_images_have_the_labels_of_both_by_their_shares():
    images = noise(40)
    plain = ImageBatches(images, batch_size=16, seed=5)
    for augment in (Augment(mixup=0.8), Augment(cutmix=1.0)):
        made = ImageBatches(images, batch_size=16, seed=5, augment=augment)
        owns = []
        for step in range(4):
            (x, y), (one, label) = plain(step), made(step)
            assert torch.equal(one, made(step)[0])
            share = torch.linalg.lstsq((x - x.flip(0)).reshape(-1, 1), (one - x.flip(0)).reshape(-1, 1)).solution.item()
            if augment.cutmix:
                stays = (one == x).all(0).all(0)
                assert torch.equal(torch.where(stays, x, x.flip(0)), one)
                share = stays.double().mean().item()
            shares = torch.nn.functional.one_hot(y, images.classes).float()
            torch.testing.assert_close(label, share * shares + (1 - share) * shares.flip(0), atol=1e-4, rtol=0)
            owns.append(share)
        assert len({round(own, 2) for own in owns}) > 1


def test_all_offsets_flips_and_centres_are_drawn():
    images = noise(2000, 1, 4, 3)
    draws = ImageBatches(images, batch_size=2000, augment=Augment(1, True, 2))._draw(0)[0]
    assert [sorted(row.unique().tolist()) for row in draws[1:]] == [[0, 1, 2], list(range(6)), [0, 1, 2, 3], [0, 1, 2]]
    for row, sides in zip(draws[1:], (3, 6, 4, 3), strict=True):  # evenly: 6 standard deviations
        share = row.bincount() / 2000
        assert (share - 1 / sides).abs().max() < 6 * (1 / sides / 2000) ** 0.5


def test_a_batch_depends_on_seed_and_step_alone():
    def make(seed: Any = 1, **changes: Any):
        return ImageBatches(noise(), batch_size=4, seed=seed, augment=Augment(1, True, 2), **changes)

    one, other = make(), make()
    assert one.epoch_steps == 2
    forth = [one(step) for step in range(6)]
    back = [other(step) for step in reversed(range(6))][::-1]
    assert all(torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in zip(forth, back, strict=True))
    orders = [torch.cat([one(2 * epoch)[1], one(2 * epoch + 1)[1]]).tolist() for epoch in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert not torch.equal(make(seed=2)(0)[0], forth[0][0])
    assert make(seed=0)._draw(5)[0].tolist() != make(seed=5)._draw(0)[0].tolist()
    half = make(dtype=torch.bfloat16)(3)[0]
    assert torch.equal(half, forth[3][0].to(torch.bfloat16))


def test_turning_one_change_on_leaves_the_others():
    images = noise(8, 1, 4, 4)
    plain, flipped = (
        ImageBatches(images, batch_size=8, augment=Augment(1, flip))._draw(0)[0] for flip in (False, True)
    )
    assert torch.equal(plain[[0, 1, 3, 4]], flipped[[0, 1, 3, 4]])
    assert torch.equal(plain[2], flipped[2] % 3)


def test_other_statistics_are_used_when_given():
    images = noise(4, 2)
    mean, std = torch.tensor([0.5, 0.0]), torch.tensor([0.25, 1.0])
    x, _ = ImageBatches(images, batch_size=4, mean=mean, std=std)(0)
    order = ImageBatches(images, batch_size=4)._draw(0)[0][0] // 30
    torch.testing.assert_close(x[:, 0], images.pixels[order, 0] / 255 * 4 - 2)
    torch.testing.assert_close(x[:, 1], images.pixels[order, 1] / 255)


def test_batches_that_cannot_be_made_are_refused():
    images = noise(5)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"batch_size": 6}, "1 to 5 images"),
        ({"batch_size": 0}, "1 to 5 images"),
        ({"batch_size": 2, "augment": Augment(crop=5)}, "does not fit images of 6 x 5"),
        ({"batch_size": 2, "augment": Augment(cutout=-1)}, "does not fit"),
        ({"batch_size": 2, "std": torch.tensor([1.0, 0.0, 1.0])}, "cannot be normalised"),
        ({"batch_size": 2, "mean": torch.zeros(1)}, "one entry a channel, 3"),
    ]
    for options, message in refused:
        with pytest.raises(ValueError, match=message):
            ImageBatches(images, **options)


@pytest.mark.parametrize("channels_last", [False, True])
def test_plain_batches_show_every_image_once_in_order(channels_last: Any):
    images = noise()
    mean, std = images.statistics()
    made = list(plain_batches(images, batch_size=4, mean=mean, std=std, channels_last=channels_last))
    assert [len(y) for _, y in made] == [4, 4, 3]
    expected = (images.pixels / 255 - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(torch.cat([x for x, _ in made]), expected, atol=2e-6, rtol=0)
    assert torch.equal(torch.cat([y for _, y in made]), images.labels)
    assert made[0][0].is_contiguous(memory_format=torch.channels_last) == channels_last


def test_epochs_are_drawn_once(monkeypatch: pytest.MonkeyPatch):
    drawn = []
    draw = ImageBatches._draw
    monkeypatch.setattr(batches_module.ImageBatches, "_draw", lambda self, e: drawn.append(e) or draw(self, e))
    made = ImageBatches(noise(), batch_size=4)
    for step in range(5):
        made(step)
    assert drawn == [0, 1, 2]


# Loaders


def loader(**options: Any):
    return DataLoader([*range(10)], batch_size=3, **options)  # pyright: ignore[reportArgumentType]


def shuffled(seed: Any = 0):
    return LoaderBatches(loader(shuffle=True, generator=torch.Generator()), seed=seed)


def test_a_loader_is_served_epoch_by_epoch():
    made = LoaderBatches(loader())
    assert made.epoch_steps == 4
    assert [made(step).tolist() for step in range(5)] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9], [0, 1, 2]]


def test_a_shuffling_loader_resumes_at_any_step():
    whole = shuffled()
    steps = [whole(step).tolist() for step in range(12)]
    assert sorted(number for step in steps[:4] for number in step) == list(range(10))
    assert steps[:4] != steps[4:8] != steps[8:]
    resumed = shuffled()
    assert [resumed(step).tolist() for step in range(6, 12)] == steps[6:]
    assert [resumed(step).tolist() for step in (3, 4, 4, 1)] == [steps[3], steps[4], steps[4], steps[1]]
    assert [shuffled(1)(step).tolist() for step in range(4)] != steps[:4]


def test_loaders_without_a_length_are_refused():
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(())

    with pytest.raises(ValueError, match="no length"):
        LoaderBatches(DataLoader(Endless()))
    with pytest.raises(ValueError, match="no batch"):
        LoaderBatches(DataLoader([0, 1], batch_size=3, drop_last=True))  # pyright: ignore[reportArgumentType]


# On a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_sees_the_batches_of_the_cpu_and_is_not_waited_for():
    images = noise(600, 3, 16, 12)
    options: dict[str, Any] = {"batch_size": 256, "seed": 3, "augment": Augment(2, True, 4), "channels_last": True}
    here, there = ImageBatches(images, **options), ImageBatches(images.to("cuda"), **options)
    with unwaited():
        found = [there(step) for step in range(5)]  # three epochs
    for step, (x, y) in enumerate(found):
        expected = here(step)
        torch.testing.assert_close(x.cpu(), expected[0], atol=2e-6, rtol=0)
        assert torch.equal(y.cpu(), expected[1])
