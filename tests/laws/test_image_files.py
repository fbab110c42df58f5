"""People's image sets: what has another form is recognised, or refused before training with file and row."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from prunus.data import Augment, ImageBatches, Images, count_images, read_images
from prunus.data.images import matched

RANDOM = np.random.default_rng(0)


def pixels(rows: int = 6, columns: int = 6, channels: int = 3) -> Any:
    return RANDOM.integers(0, 255, (rows, columns, channels) if channels > 1 else (rows, columns), dtype=np.uint8)


def png(array: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def picture(path: Path, array: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def table(path: Path, images: list[Any], labels: list[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"img": images, "label": labels}), path)


@pytest.mark.parametrize("test", ["test", "val"])
def test_folders_of_pictures_are_read_by_class(tmp_path: Path, test: str):
    arrays = {name: pixels() for name in ("b", "a", "c")}
    for name, array in arrays.items():
        picture(tmp_path / "train" / name / "1.png", array)
    picture(tmp_path / test / "c" / "x.PNG", arrays["c"])
    train, held = read_images(tmp_path, "train"), read_images(tmp_path, "test")
    assert train.names == ("a", "b", "c")
    assert train.labels.tolist() == [0, 1, 2]
    assert np.array_equal(train.pixels[1].permute(1, 2, 0).numpy(), arrays["b"])
    assert held.names == ("c",)
    aligned = matched(held, train)
    assert (aligned.labels.tolist(), aligned.classes, aligned.names) == ([2], 3, train.names)
    (tmp_path / "train" / "a" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"a/notes\.txt is no picture"):
        read_images(tmp_path, "train")
    (tmp_path / "train" / "empty").mkdir()
    (tmp_path / "train" / "a" / "notes.txt").unlink()
    with pytest.raises(ValueError, match="empty holds no picture"):
        read_images(tmp_path, "train")


def test_a_folder_of_classes_is_split_once_and_for_all(tmp_path: Path):
    for number in range(10):
        picture(tmp_path / "ab"[number % 2] / f"{number}.jpg", pixels(8, 9))
    train, test = read_images(tmp_path, "train"), read_images(tmp_path, "test")
    assert (len(train), len(test), len(read_images(tmp_path, None))) == (8, 2, 10)
    assert train.names == test.names == ("a", "b")


def test_pictures_of_all_sizes_are_brought_to_one(tmp_path: Path):
    wide, high = np.zeros((10, 30, 3), np.uint8), np.zeros((40, 20, 3), np.uint8)
    wide[:, 10:20], high[10:30] = 200, 100  # the middle squares
    picture(tmp_path / "a" / "1.png", wide)
    picture(tmp_path / "b" / "2.png", high)
    found = read_images(tmp_path, None, size=10)
    assert found.pixels.shape == (2, 3, 10, 10)
    assert (found.pixels[0, :, 1:-1, 1:-1] == 200).all()
    assert (found.pixels[1, :, 1:-1, 1:-1] == 100).all()
    with pytest.raises(ValueError, match=r"1\.png is \(10, 30\), .*2\.png is \(40, 20\).*images\.size"):
        read_images(tmp_path, None)


def test_texts_are_classes_over_all_files_of_a_split(tmp_path: Path):
    table(tmp_path / "train-0.parquet", [png(pixels())] * 2, ["wren", "crow"])
    table(tmp_path / "train-1.parquet", [png(pixels())], ["owl"])
    found = read_images(tmp_path, "train")
    assert found.names == ("crow", "owl", "wren")
    assert found.labels.tolist() == [2, 0, 1]


def test_images_are_counted_without_decoding_them(tmp_path: Path):
    for number in range(10):
        picture(tmp_path / "classes" / "ab"[number % 2] / f"{number}.jpg", pixels())
    for place, split in enumerate(("train-0", "train-1", "test")):
        table(tmp_path / "splits" / f"{split}.parquet", [png(pixels())] * (3 + place), ["b"] * (3 + place))
    np.savez(tmp_path / "splits" / "train-2.npz", pixels=np.zeros((2, 6, 6, 3), np.uint8), labels=np.zeros(2, int))
    sources = [tmp_path / "classes", tmp_path / "splits", tmp_path / "splits" / "test.parquet", "digits"]
    asked = [(source, split) for source in sources for split in ("train", "test")]
    counts = [len(read_images(source, split)) for source, split in asked]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("prunus.data.images.read._decode")
        assert [count_images(source, split) for source, split in asked] == counts
    assert counts[:6] == [8, 2, 9, 5, 4, 1]


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("shape", [(4, 3, 8, 6), (4, 8, 6, 3), (4, 1, 8, 6), (4, 8, 6, 1), (4, 8, 6), (4, 5, 8, 6)])
def test_arrays_may_have_their_channels_first_or_last(tmp_path: Path, ending: str, shape: tuple[int, ...]):
    array = RANDOM.integers(0, 255, shape, dtype=np.uint8)
    content: dict[str, Any] = {"pixels": array, "labels": np.arange(4)[:, None]}
    if ending == "npz":
        np.savez(tmp_path / "a.npz", **content)
    else:
        save_file(content, tmp_path / "a.safetensors")
    found = read_images(tmp_path / f"a.{ending}", None)
    assert found.pixels.shape[2:] == (8, 6)
    wanted = (
        array.transpose(0, 3, 1, 2) if len(shape) == 4 and shape[3] in (1, 3) else array.reshape(found.pixels.shape)
    )
    assert np.array_equal(found.pixels.numpy(), wanted)
    assert found.labels.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"pixels": np.zeros((4, 8, 8, 4), np.uint8), "labels": np.arange(4)}, "which axis of .* is that of channels"),
        ({"pixels": np.zeros((4, 3, 8, 8), np.float32), "labels": np.arange(4)}, "uint8"),
        ({"pixels": np.zeros((4, 3, 8, 8), np.uint8), "labels": np.arange(4) / 2}, "labels of float64"),
        ({"pixels": np.zeros((4, 3, 8, 8), np.uint8), "labels": np.arange(3)}, "labels must be"),
        ({"pixels": np.zeros((4, 3, 8, 8), np.uint8), "labels": np.arange(4) - 1}, "labels go from -1"),
        ({"pixels": np.array([None]), "labels": np.arange(1)}, "no arrays that can be read"),
    ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path: Path, content: dict[str, Any], message: str):
    np.savez(tmp_path / "a.npz", **content)
    with pytest.raises(ValueError, match=message) as caught:
        read_images(tmp_path / "a.npz", None)
    assert "a.npz" in str(caught.value)


def test_labels_of_arrays_may_be_names(tmp_path: Path):
    np.savez(tmp_path / "a.npz", pixels=np.zeros((3, 8, 8), np.uint8), labels=np.array(["b", "a", "b"]))
    found = read_images(tmp_path / "a.npz", None)
    assert (found.names, found.labels.tolist()) == (("a", "b"), [1, 0, 1])


GOOD = png(pixels())
ROWS: list[tuple[list[Any], list[Any], str]] = [
    ([GOOD, GOOD], [0, None], "image 1 has no label"),
    ([GOOD, None], [0, 1], "image 1 has no image"),
    ([{"bytes": None, "path": None}], [0], "image 0 has no image"),
    ([{"bytes": None, "path": "absent.png"}], [0], "image 0 names the picture 'absent.png', which is not there"),
    ([[1, 2, 3]], [0], "image 0 holds a list, no encoded picture"),
    ([GOOD, GOOD[:60]], [0, 1], "image 1 is damaged"),
    ([GOOD, b"text"], [0, 1], "image 1 is no image that Pillow can read"),
    ([GOOD], [0.5], "image 0 has the label 0.5; give integers"),
    ([GOOD, GOOD], [[0], [1]], r"image 0 has the label \[0\]"),
    ([GOOD, GOOD], [0, -1], "image 1 has the label -1; classes are 0 and up"),
]


@pytest.mark.parametrize(("images", "labels", "message"), ROWS, ids=[message[:24] for _, _, message in ROWS])
def test_rows_that_cannot_be_trained_on_are_refused(tmp_path: Path, images: list[Any], labels: list[Any], message: str):
    table(tmp_path / "a.parquet", images, labels)
    with pytest.raises(ValueError, match=message) as caught:
        read_images(tmp_path / "a.parquet", None)
    assert str(tmp_path / "a.parquet") in str(caught.value)


def test_test_images_must_be_like_those_of_training():
    def images(labels: list[int], channels: int = 3, names: tuple[str, ...] = ()) -> Images:
        shape = (len(labels), channels, 4, 4)
        return Images(torch.zeros(shape, dtype=torch.uint8), torch.tensor(labels), max(labels) + 1, names)

    train = images([0, 1, 2], names=("a", "b", "d"))
    assert matched(images([1, 0], names=("b", "d")), train).labels.tolist() == [2, 1]
    assert matched(images([2]), images([2, 0])).labels.tolist() == [2]
    for test, message in [
        (images([0], channels=1), r"training images are \(3, 4, 4\), test images \(1, 4, 4\)"),
        (images([0, 1], names=("a", "c")), "class 'c' is only among the test images"),
        (images([3]), "class 3 is only among the test images"),
    ]:
        with pytest.raises(ValueError, match=message):
            matched(test, train)


def test_resized_crops_sample_a_box_of_the_image():
    ramp = torch.arange(0, 240, 10, dtype=torch.uint8).expand(64, 1, 24, 24).contiguous()  # brighter to the right
    images = Images(ramp, torch.zeros(64, dtype=torch.int64), 1)
    how: dict[str, Any] = {"batch_size": 32, "mean": torch.zeros(1), "std": torch.ones(1)}
    plain, made = ImageBatches(images, **how), ImageBatches(images, augment=Augment(resized=0.25), **how)
    x, _ = made(0)
    assert torch.equal(x, ImageBatches(images, augment=Augment(resized=0.25), **how)(0)[0])
    assert not torch.equal(x, made(1)[0])
    width = (255 * (x[:, 0, 12, 20] - x[:, 0, 12, 4])) / 160  # of each box, as a share: 16 columns apart
    assert ((width > (0.25 * 3 / 4) ** 0.5 - 0.01) & (width < 1.01)).all()
    assert width.std() > 0.05
    assert torch.equal(plain(0)[1], made(0)[1])
    with pytest.raises(ValueError, match="in place of crop"):
        ImageBatches(images, augment=Augment(crop=1, resized=0.5), **how)
    with pytest.raises(ValueError, match="share of the area"):
        ImageBatches(images, augment=Augment(resized=0.0), **how)
