"""A user's images and pretrained weights in a recipe: normalised and begun as asked, or refused before training."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from prunus.data import Images, build_model, load_weights_
from prunus.recipe import ClassifierRecipe, parse
from prunus.vision.setting import Setting


def arrays(folder: Path, train: Any, test: Any, channels: tuple[int, int] = (3, 3)) -> str:
    folder.mkdir(exist_ok=True)
    for (name, labels), depth in zip((("train", train), ("test", test)), channels, strict=True):
        pixels = np.random.default_rng(0).integers(0, 255, (len(labels), depth, 8, 8), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", pixels=pixels, labels=np.array(labels))
    return str(folder)


def setting(source: Any, tmp_path: Path, **changes: Any) -> Setting:
    train = {"epochs": 1, "batch_size": 4, "warmup": 0, "augment": {"resized": 0.5}}
    raw = {"images": source, "model": "resnet8", "train": train, "device": "cpu", "out": str(tmp_path)}
    return Setting.of(parse(raw | changes, ClassifierRecipe, "test"))


def test_names_of_test_images_are_those_of_training(tmp_path: Path):
    sets = setting(arrays(tmp_path / "a", ["b", "a", "c", "c"], ["c", "b"]), tmp_path).sets
    assert (sets.measured.labels.tolist(), sets.measured.classes) == ([2, 1], 3)


def test_images_are_normalised_as_asked(tmp_path: Path):
    source = {"source": arrays(tmp_path / "a", [0, 1, 1, 0], [0]), "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]}
    made = setting(source, tmp_path)
    x, _ = next(made.measured())
    expected = made.sets.measured.pixels / 255 - torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    torch.testing.assert_close(x, expected / torch.tensor([0.1, 0.2, 0.3])[:, None, None])
    assert made.batches(0)(0)[0].shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("train", "test", "channels", "more", "message"),
    [
        ([0, 1, 0, 1], [0, 2], (3, 3), {}, "class 2 is only among the test images"),
        (["a"] * 4, ["b"], (3, 3), {}, "class 'b' is only among the test images"),
        ([0, 1, 0, 1], [0], (3, 1), {}, r"training images are \(3, 8, 8\), test images \(1, 8, 8\)"),
        ([0, 1, 0, 1], [0], (3, 3), {"mean": [0.5]}, "images.mean: give one number a channel, 3"),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused(
    tmp_path: Path, train: Any, test: Any, channels: tuple[int, int], more: dict[str, Any], message: str
):
    source = {"source": arrays(tmp_path / "a", train, test, channels), **more}
    with pytest.raises(ValueError, match=message):
        setting(source, tmp_path)


def tiny(num_classes: int, wide: int = 4, **_: Any) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, wide, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, num_classes))


def test_pretrained_weights_are_loaded_but_for_the_last_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    home = SimpleNamespace(list_models=lambda: ["tiny"], get_model=lambda _name, weights, **how: tiny(**how))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=home))
    pretrained = tiny(1000, wide=6)
    torch.save(pretrained.state_dict(), tmp_path / "w.pt")
    source = arrays(tmp_path / "a", [0, 1, 1, 0], [0])
    asked: dict[str, Any] = {"model": "torchvision:tiny", "weights": str(tmp_path / "w.pt")}
    model = setting(source, tmp_path, **asked, arguments={"wide": 6}).new_model()
    assert torch.equal(model.state_dict()["0.weight"], pretrained.state_dict()["0.weight"])
    assert model.state_dict()["3.weight"].shape == (2, 6)
    with pytest.raises(ValueError, match=r"tensors differ in name or shape, first '0\.weight'"):
        setting(source, tmp_path, **asked).new_model()
    with pytest.raises(ValueError, match=r"weights: no file 'absent.pt'"):
        setting(source, tmp_path, model="resnet8", weights="absent.pt")
    with pytest.raises(ValueError, match=r"arguments .*'resnet8' has none"):
        setting(source, tmp_path, arguments={"wide": 6})


def test_weights_that_are_none_are_refused(tmp_path: Path):
    model = build_model("resnet8", classes=3)
    save_file(build_model("resnet8", classes=5).state_dict(), tmp_path / "a.safetensors")
    assert load_weights_(model, tmp_path / "a.safetensors", other_head=True) == ["linear.weight", "linear.bias"]
    with pytest.raises(ValueError, match=r"2 tensors differ in name or shape, first 'linear.weight'"):
        load_weights_(model, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="is a git-LFS pointer"):
        load_weights_(model, tmp_path / "b.safetensors")
    torch.save([1], tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_weights_(model, tmp_path / "c.pt")


def test_a_channel_without_contrast_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = Images(torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]), 2)
    monkeypatch.setattr("prunus.vision.setting.read_images", lambda *_, **__: plain)
    with pytest.raises(ValueError, match=r"the same value everywhere .*set images\.std"):
        setting("some/plain", tmp_path)
    assert setting({"source": "some/plain", "std": [1.0]}, tmp_path).sets.std.tolist() == [1.0]
