"""What a refusal tells the user to do is done, word for word, and then nothing is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.utils import prune

from prunus.data import build_model, load_weights_
from prunus.language import stages
from prunus.language.single import planned
from prunus.recipe import ClassifierRecipe, Recipe, merge, parse
from prunus.vision.setting import Setting
from tests.conftest import byte_tokenizer

RECIPES: list[tuple[dict[str, Any], str, dict[str, Any]]] = [  # wrong, what the line says, mended
    ({"prune.pattern": "2:32"}, r'exclude=\["mlp.down_proj"\]', {"prune.exclude": ["mlp.down_proj"]}),
    ({"retrain.rank": 33}, "set it to 32 or less", {"retrain.rank": 32}),
    ({"retrain.train": ["biases"]}, "add_biases", {"retrain.add_biases": True}),
    ({"calibrate.length": 128}, "set calibrate.length to 64", {"calibrate.length": 64}),
    ({"calibrate.samples": 100000}, "fewer samples", {"calibrate.samples": 8}),
    ({"out": "model/run"}, "give another output folder", {"out": "run"}),
    ({"calibrate.data": "null.jsonl"}, "leave the row out", {"calibrate.data": "rows.jsonl"}),
    ({"calibrate.data": "body.jsonl"}, "name one of them", {"calibrate.data": {"source": "body.jsonl", "column": "b"}}),
    ({"calibrate.data": "c.jsonl"}, "messages: text", {"calibrate.data": {"messages": "text", "source": "c.jsonl"}}),
    ({"calibrate.data": "latin.txt"}, "save it as UTF-8", {"calibrate.data": "utf.txt"}),
    ({"calibrate.data": "split"}, "split='test'", {"calibrate.data": {"source": "split", "split": "test"}}),
]  # fmt: skip


@pytest.fixture
def raw(tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe of a tiny model, in a folder with texts that are wrong and right."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "model")
    text, turns = text_file.read_text(), [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 9}]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained("model")
    good = json.dumps({"text": text}) + "\n"
    Path("rows.jsonl").write_text(good)
    Path("null.jsonl").write_text(good + '{"text": null}\n')
    Path("body.jsonl").write_text(good.replace('"text"', '"b"'))
    Path("c.jsonl").write_text(f"{json.dumps({'text': turns})}\n" * 99)
    Path("latin.txt").write_bytes(("für " * 999).encode("latin-1"))
    Path("utf.txt").write_text("für " * 999, encoding="utf-8")
    Path("split").mkdir()
    for name in ("train", "test"):
        Path("split", f"{name}.txt").write_text(text)
    return {
        "model": "./model", "device": "cpu", "out": "run",
        "calibrate": {"data": str(text_file), "samples": 4, "length": 16},
        "retrain": {"data": str(text_file), "steps": 3, "batch_size": 2, "length": 16, "rank": 2},
        "evaluate": {"data": {"text": str(text_file)}, "window": 32, "batch_size": 128},
    }  # fmt: skip


@pytest.mark.parametrize(("wrong", "said", "mended"), RECIPES, ids=[said for _, said, _ in RECIPES])
def test_recipes_are_mended_as_said(
    raw: dict[str, Any], wrong: dict[str, Any], said: str, mended: dict[str, Any]
) -> None:
    broken = merge(raw, wrong)
    with pytest.raises(ValueError, match=said):
        planned(parse(broken, Recipe, ""))
    planned(parse(merge(broken, mended), Recipe, ""))


def stored(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file("model/model.safetensors")), "model/model.safetensors", {"format": "pt"})


def config(**keys: Any) -> None:
    Path("model/config.json").write_text(json.dumps({**json.loads(Path("model/config.json").read_text()), **keys}))


def wider() -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained("model")
    tokenizer.add_tokens([f"plum{place}" for place in range(9)])
    tokenizer.save_pretrained("model")


def resized() -> None:
    model = tf.AutoModelForCausalLM.from_pretrained("model")
    model.resize_token_embeddings(266, mean_resizing=False)
    model.save_pretrained("model")


MODELS: list[tuple[Callable[[], object], str, Callable[[], object]]] = [
    (lambda: stored(lambda tensors: {f"module.{name}": each for name, each in tensors.items()}),
     "take the prefix off the names",
     lambda: stored(lambda tensors: {name.removeprefix("module."): each for name, each in tensors.items()})),
    (lambda: config(tie_word_embeddings=False),
     "set tie_word_embeddings: true in config.json", lambda: config(tie_word_embeddings=True)),
    (lambda: stored(lambda tensors: {**tensors, "lm_head.weight": torch.ones(260, 32)}),
     "set tie_word_embeddings: false in config.json", lambda: config(tie_word_embeddings=False)),
    (wider, r"resize the embedding \(resize_token_embeddings\) and save it", resized),
    (lambda: Path("model/adapter_config.json").touch(),
     "move it out of the folder", lambda: Path("model/adapter_config.json").rename("adapter_config.json")),
    (lambda: Path("model/model.safetensors").rename("other.safetensors"),
     "give a folder of transformers", lambda: Path("other.safetensors").rename("model/model.safetensors")),
]  # fmt: skip


@pytest.mark.parametrize(("break_", "said", "mend"), MODELS, ids=[said for _, said, _ in MODELS])
def test_checkpoints_are_mended_as_said(
    raw: dict[str, Any], break_: Callable[[], object], said: str, mend: Callable[[], object]
) -> None:
    recipe = parse(raw, Recipe, "")
    break_()
    with pytest.raises(ValueError, match=said):
        stages.load(recipe)
    mend()
    stages.load(recipe)


def test_weights_are_mended_as_said(tmp_path: Path) -> None:
    path, model = tmp_path / "w.pt", build_model("resnet8", classes=3)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    with pytest.raises(ValueError, match=r"torch.save\(torch.load\(path, weights_only=True\)\['state_dict'\], path\)"):
        load_weights_(model, path)
    torch.save(torch.load(path, weights_only=True)["state_dict"], path)
    load_weights_(model, path)
    pruned = build_model("resnet8", classes=3)
    prune.random_unstructured(pruned.stem, "weight", 0.5)
    torch.save(pruned.state_dict(), path)
    with pytest.raises(ValueError, match=r"torch.nn.utils.prune.remove\(module, 'weight'\) for every pruned module"):
        load_weights_(model, path)
    prune.remove(pruned.stem, "weight")
    torch.save(pruned.state_dict(), path)
    load_weights_(model, path)


IMAGES: list[tuple[tuple[int, ...], dict[str, Any], str, dict[str, Any]]] = [  # sides of pictures, recipe, line, mend
    ((8, 8, 8, 9), {}, "images.size", {"images.size": 8}),
    ((8, 8, 8, 8), {"model": "vgg16_bn"}, "give another, images.size, or its arguments", {"images.size": 32}),
    ((8, 8, 8, 8), {"train.batch_size": 9}, "is more than the 6 training images", {"train.batch_size": 6}),
    ((0, 0, 0, 0), {}, r"set images\.std", {"images.std": [1.0]}),
]


@pytest.mark.parametrize(("sides", "wrong", "said", "mended"), IMAGES, ids=[said for *_, said, _ in IMAGES])
def test_images_are_mended_as_said(
    sides: tuple[int, ...], wrong: dict[str, Any], said: str, mended: dict[str, Any], tmp_path: Path
) -> None:
    for place, side in enumerate(sides):
        pixels = np.random.default_rng(place).integers(0, 255, (side, side)) if side else np.zeros((8, 8))
        for kind in ("a", "b"):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / kind / f"{place}.png")
    train = {"epochs": 1, "batch_size": 4, "warmup": 0}
    raw = {"images": {"source": str(tmp_path)}, "model": "resnet8", "train": train, "device": "cpu", "out": "run"}
    broken = merge(raw, wrong)
    with pytest.raises(ValueError, match=said):
        Setting.of(parse(broken, ClassifierRecipe, ""))
    Setting.of(parse(merge(broken, mended), ClassifierRecipe, ""))
