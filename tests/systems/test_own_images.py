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

from prunus.data import build_model, load_weights_
from prunus.run.recipe import parse
from prunus.run.vision.setting import ClassifierRecipe, Setting


def arrays(folder: Path, train: Any, test: Any, channels: tuple[int, int] = (3, 3)) -> str:
    folder.mkdir(exist_ok=True)
    for (name, labels), depth in zip((("train", train), ("test", test)), channels, strict=True):
        pixels = np.random.default_rng(0).integers(0, 255, (len(labels), depth, 8, 8), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", pixels=pixels, labels=np.array(labels))
    return str(folder)


def setting(source: Any, tmp_path: Path, **changes: Any) -> Setting:
    train = {"epochs": 1, "batch_size": 4, "warmup": 0, "augment": {"crop": 1}}
    raw = {"images": source, "model": "resnet8", "train": train, "device": "cpu", "out": str(tmp_path)}
    return Setting.of(parse(raw | changes, ClassifierRecipe, "test"))


def test_names_of_test_images_are_those_of_training(tmp_path: Path):
    sets = setting(arrays(tmp_path / "a", ["b", "a", "c", "c"], ["c", "b"]), tmp_path).sets
    assert (sets.measured.labels.tolist(), sets.measured.classes) == ([2, 1], 3)


@pytest.mark.parametrize(
    ("train", "test", "channels", "more", "message"),
    [
        ([0, 1, 0, 1], [0, 2], (3, 3), {}, "class 2 is only among the test images"),
        (["a"] * 4, ["b"], (3, 3), {}, "class 'b' is only among the test images"),
        ([0, 1, 0, 1], [0], (3, 1), {}, r"training images are \(3, 8, 8\), test images \(1, 8, 8\)"),
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
    wrapped = {f"module.{name}": each for name, each in pretrained.state_dict().items()}
    torch.save({"state_dict": wrapped}, tmp_path / "w.pt")
    model = build_model("torchvision:tiny", classes=2, arguments={"wide": 6})
    assert load_weights_(model, tmp_path / "w.pt", other_head=True) == ["3.weight", "3.bias"]
    assert torch.equal(model.state_dict()["0.weight"], pretrained.state_dict()["0.weight"])
    with pytest.raises(ValueError, match=r"3 tensors differ in name or shape, first '0\.weight'"):
        load_weights_(build_model("torchvision:tiny", classes=2), tmp_path / "w.pt", other_head=True)
    with pytest.raises(ValueError, match=r"arguments .*'resnet8' has none"):
        build_model("resnet8", classes=2, arguments={"wide": 6})


def test_weights_that_are_none_are_refused(tmp_path: Path):
    model = build_model("resnet8", classes=3)
    save_file(build_model("resnet8", classes=5).state_dict(), tmp_path / "a.safetensors")
    assert load_weights_(model, tmp_path / "a.safetensors", other_head=True) == ["linear.weight", "linear.bias"]
    with pytest.raises(ValueError, match=r"2 tensors differ in name or shape, first 'linear.weight'"):
        load_weights_(model, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match="is no state dict that can be read"):
        load_weights_(model, tmp_path / "b.safetensors")
    torch.save([1], tmp_path / "c.pt")
    with pytest.raises(ValueError, match="holds a list, not a state dict"):
        load_weights_(model, tmp_path / "c.pt")
