"""How wrong inputs are refused: hundreds of them, made from valid ones by one mutation each, and given to the command.

    recipe, grid, flag, file, checkpoint, text, image set ─ one mutation ─▶ prunus ... ─▶ one line, status 2, no file

    python scripts/malformed.py --count 200        counts by kind, and every one that was not refused so

A line is good that names the value and the place (the words of a case) and says what should be there instead.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
import yaml
from PIL import Image
from pydantic import BaseModel
from safetensors.torch import load_file, save_file
from torch.nn.utils.prune import random_unstructured

from prunus.data import ASSETS, build_model
from prunus.recipe import ClassifierRecipe, LanguageRecipe, merge
from prunus.run import cli

TEXT = "The plum tree of row seven bears thirteen plums.\n" * 400
MENDS = (
    "give|set |use|did you mean|known|should|leave |check |number |take it out|there (is|are)|see |needs|at least"
    "|at most|delete|make |install|write|save it|stands twice|takes|is auto|lies in|in \\[0|as in|line \\d|put "
    "|get it|fetch|get the |pass |goes by|must|without|convert|rename|more|by: |not allowed|download"
    "|belong to another|copy "
)


@dataclass(frozen=True)
class Case:
    """A call of the command that is to be refused; words: what its line names; make: what is written first."""

    kind: str
    arguments: tuple[str, ...]
    words: tuple[str, ...] = ()
    make: Callable[[Path], object] = lambda _: None


@dataclass(frozen=True)
class Outcome:
    """How a call ended. verdict: "good", or what was wrong with it."""

    case: Case
    verdict: str
    said: str
    seconds: float


def outcome(case: Case) -> Outcome:
    """How a case ends, in a folder of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder, here = Path(name), os.getcwd()
        case.make(folder)
        before = sorted(folder.rglob("*"))
        os.chdir(folder)
        started = time.perf_counter()
        try:
            status, said = _called([part.replace("{f}", name) for part in case.arguments])
        finally:
            os.chdir(here)
        left = [path for path in sorted(folder.rglob("*")) if path not in before]
        said = said.replace(name, "")
        return Outcome(case, _verdict(case, status, said, left), said, time.perf_counter() - started)


def _called(arguments: Sequence[str]) -> tuple[object, str]:
    out, err, own = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["prunus", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as error:
        return error.code, err.getvalue()
    except BaseException as error:
        return type(error).__name__, f"{type(error).__name__}: {error}"
    finally:
        sys.argv = own
    return 0, err.getvalue()


def _verdict(case: Case, status: object, said: str, left: Sequence[Path]) -> str:
    lines = [line for line in said.splitlines() if line.startswith("prunus: ")]
    rest = [line for line in said.splitlines() if line.strip() and line not in lines and "it/s" not in line]
    if status == 0:
        return "accepted"
    if status != 2 or not lines:
        return f"ended with {status}"
    if left:
        return f"late: {left[0].name} was written"
    if len(lines) != 1 or rest:
        return "more than a line"
    missing = [word for word in case.words if word not in lines[0]]
    if missing:
        return f"does not name {missing[0]!r}"
    return "good" if re.search(MENDS, lines[0], re.IGNORECASE) else "says no mend"


def cases(seed: int = 0) -> list[Case]:
    """All cases, in an order that the seed decides."""
    found = [*_recipes(), *_flags(), *_files(), *_grids(), *_checkpoints(), *_texts(), *_images(), *_weights()]
    random.Random(seed).shuffle(found)
    return found


LANGUAGE: dict[str, Any] = {
    "model": "embedded",
    "device": "cpu",
    "prune": {},
    "calibrate": {"samples": 2, "length": 16},
    "reconstruct": {"steps": 1},
    "retrain": {"steps": 1, "length": 16, "batch_size": 1, "dense": {"steps": 100}},
    "train": {"steps": 1, "dense": {"steps": 100}},
    "soup": {"members": 2},
    "evaluate": {"data": {"text": {"source": "text.txt"}}, "window": 16},
    "save": False,
}
IMAGES: dict[str, Any] = {
    "images": {"source": "digits"},
    "model": "resnet8",
    "device": "cpu",
    "train": {"epochs": 1, "warmup": 0, "augment": {}},
    "prune": {"sparsity": 0.5},
    "retrain": {"epochs": 1},
    "corruptions": {"images": 1, "folder": "./corrupted"},
}


def _recipes() -> Iterator[Case]:
    """Every key of both recipes misspelt, and with values of another type or out of bounds."""
    for base, model in ((LANGUAGE, LanguageRecipe), (IMAGES, ClassifierRecipe)):
        for key, field in _leaves(model):
            last = key.rpartition(".")[2]
            if len(last) > 3:
                yield _recipe(base, key[:-2] + key[-1], 1, words=(key[:-2] + key[-1],))
            for value in _wrong(field):
                shown = () if isinstance(value, (dict, float)) else (str(value),)
                yield _recipe(base, key, value, words=(last, *shown))


def _recipe(base: dict[str, Any], key: str, value: Any, words: tuple[str, ...]) -> Case:
    def make(folder: Path) -> None:
        (folder / "text.txt").write_text(TEXT)
        (folder / "recipe.yaml").write_text(yaml.safe_dump(merge(base, {key: value})))

    return Case("recipe", ("run", "recipe.yaml", "--out", "out"), words, make)


def _leaves(model: type[BaseModel], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, field) of all that is no section."""
    for name, field in model.model_fields.items():
        options = [] if get_origin(field.annotation) is tuple else [field.annotation, *get_args(field.annotation)]
        section = next((each for each in options if isinstance(each, type) and issubclass(each, BaseModel)), None)
        if name == "out":
            continue  # the command's own flag wins
        if section is None:
            yield f"{before}{name}", field
        elif name not in ("optimizer", "penalty", "data", "vary"):  # one of several, of a short form, or a list
            yield from _leaves(section, f"{before}{name}.")


def _wrong(field: Any) -> list[Any]:
    """Values that no field of this type takes."""
    kinds = set(_flat(field.annotation))
    if {int, float} & kinds:
        bound = any(getattr(each, "ge", getattr(each, "gt", None)) in (0, 1, 2) for each in _bounds(field))
        return ["many", {"a": 1}, math.nan, *([-1] if bound else [])]
    if bool in kinds:
        return ["perhaps", {"a": 1}]
    if any(get_origin(each) is Literal for each in kinds):
        return ["nonsense", {"a": 1}]
    return [{"a": 1}, 7] if kinds <= {str, type(None)} else [7]


def _flat(annotation: Any) -> Iterator[Any]:
    yield annotation
    if get_origin(annotation) is not Literal:
        for each in get_args(annotation):
            yield from _flat(each)


def _bounds(field: Any) -> list[Any]:
    inner = [each for part in get_args(field.annotation) for each in getattr(part, "__metadata__", ())]
    return [bound for each in [*field.metadata, *inner] for bound in (each, *getattr(each, "metadata", ()))]


def _flags() -> Iterator[Case]:
    for flag in cli.run_flags():
        yield Case("flag", ("run", f"--{flag.name}x", "1"), (f"--{flag.name}x",))
        if flag.takes in ("INTEGER", "FLOAT", "BOOLEAN"):
            yield Case("flag", ("run", f"--{flag.name}", "many"), (flag.key.rpartition(".")[2],))


def _files() -> Iterator[Case]:
    """YAML that is none, or not what it should be."""
    bomb = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    texts = {
        "torn": b"prune: {sparsity: 0.5",
        "a list": b"- prune",
        "a word": b"prune",
        "tabs": b"prune:\n\tsparsity: 0.5",
        "twice": b"prune: {sparsity: 0.5, sparsity: 0.6}",
        "latin": "# für\nprune: {}".encode("latin-1"),
        "zeros": bytes(64),
        "a bomb": bomb.encode(),
        "itself": b"prune: &a {b: *a}",
        "deep": b"prune: " + b"[" * 2000 + b"]" * 2000,
        "a set": b"prune: !!set {sparsity, pattern}",
        "no truth": b"save: !!bool maybe",
        "python": b"prune: !!python/object/apply:os.system [ls]",
        "no alias": b"prune: *nothing",
        "two documents": b"prune: {}\n---\nprune: {}",
    }
    for command in ("run", "grid"):
        for text in texts.values():
            yield Case("file", (command, "r.yaml"), ("r.yaml",), lambda f, text=text: (f / "r.yaml").write_bytes(text))
    for command in ("run", "grid", "inspect", "evaluate"):
        yield Case("file", (command, "./nowhere.yaml"), ("nowhere.yaml",))


def _grids() -> Iterator[Case]:
    base = {"base": {"images": "digits", "model": "resnet8"}, "axes": {"a": {"b": {}, "c": {"seed": 1}}}, "out": "out"}
    changes: list[tuple[dict[str, Any], tuple[str, ...]]] = [
        ({"axes": {}}, ("axes",)),
        ({"axes": {"a": {}}}, ("axes.a",)),
        ({"axes": {"a": {"b": {"trian.epochs": 1}}}}, ("trian",)),
        ({"axes": {"a": {"b": {"prune.sparsity": 2}}}}, ("2", "sparsity")),
        ({"axes": {"a": {"b": 1}}}, ("axes.a.b",)),
        ({"seeds": []}, ("seeds",)),
        ({"seeds": [0, 0]}, ("seeds", "0")),
        ({"seeds": ["one"]}, ("seeds", "one")),
        ({"skip": [{"d": ["b"]}]}, ("'d'",)),
        ({"skip": [{"a": ["d"]}]}, ("'d'",)),
        ({"skip": [{"a": ["b", "c"]}]}, ("skip",)),
        ({"more_seeds": {"seeds": [1], "where": {"d": ["b"]}}}, ("'d'",)),
        ({"tune": {"axis": "a", "cells": {}}}, ("tune",)),
        ({"tune": {"axis": "d", "by": "accuracy", "cells": {}}}, ("'d'",)),
        ({"tune": {"axis": "a", "by": "accuracy", "cells": {"b": {"key": "train.lr", "values": []}}}}, ("values",)),
        ({"show": {"columns": ["speed"]}}, ("speed",)),
        ({"show": {"across": "d"}}, ("'d'",)),
        ({"base": {}}, ()),
        ({"axis": {}}, ("axis",)),
    ]
    for change, words in changes[:-2] + changes[-1:]:
        text = yaml.safe_dump({**base, **change})
        yield Case("grid", ("grid", "g.yaml"), words, lambda f, text=text: (f / "g.yaml").write_text(text))
    for flag in (["--workers=-1"], ["--together=0"], ["--minutes=nan"], ["--minutes=-1"], ["--workers", "two"]):
        text = yaml.safe_dump(base)
        yield Case("grid", ("grid", "g.yaml", *flag), (), lambda f, text=text: (f / "g.yaml").write_text(text))


def _checkpoints() -> Iterator[Case]:
    """Copies of the embedded model that are damaged, or not what they say."""
    for name, damage in DAMAGES.items():
        for command in (("run", "--model", "model", "--out", "out"), ("evaluate", "model")):

            def make(folder: Path, damage: Callable[[Path], object] = damage) -> None:
                shutil.copytree(ASSETS, folder / "model", ignore=shutil.ignore_patterns("text", "*.jsonl"))
                (folder / "text.txt").write_text(TEXT)
                damage(folder / "model")

            data = ("--set", "evaluate.data=text.txt") if command[0] == "run" else ("--data", "text.txt")
            few = ("--set", "calibrate.samples=1", "--set", "calibrate.data=text.txt") if command[0] == "run" else ()
            yield Case(f"checkpoint, {name}", (*command, *data, *few, "--device", "cpu"), (), make)


def _tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return damage


def _config(**changes: Any) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        raw = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**raw, **changes}))

    return damage


def _cut(name: str, share: float) -> Callable[[Path], None]:
    def damage(model: Path) -> None:
        data = (model / name).read_bytes()
        (model / name).write_bytes(data[: int(share * len(data))])

    return damage


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut weights": _cut("model.safetensors", 0.5),
    "empty weights": _cut("model.safetensors", 0),
    "no weights": lambda model: (model / "model.safetensors").unlink(),
    "pointer": lambda model: (model / "model.safetensors").write_text(POINTER),
    "cut config": _cut("config.json", 0.5),
    "a list for a config": lambda model: (model / "config.json").write_text("[1, 2]"),
    "an index of numbers": lambda model: (
        (model / "model.safetensors").unlink(),
        (model / "model.safetensors.index.json").write_text('{"weight_map": {"lm_head.weight": 3}}'),
    ),
    "no config": lambda model: (model / "config.json").unlink(),
    "cut tokenizer": _cut("tokenizer.json", 0.5),
    "no tokenizer": lambda model: [path.unlink() for path in model.glob("tokenizer*")],
    "a tensor missing": _tensors(lambda tensors: tensors.popitem()),
    "a tensor left over": _tensors(lambda tensors: tensors.update({"other.weight": torch.zeros(2)})),
    "another shape": _tensors(lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(3, 3)})),
    "not finite": _tensors(lambda tensors: next(iter(tensors.values())).flatten()[:1].fill_(math.nan)),
    "another kind": _config(model_type="vit", architectures=["ViTModel"]),
    "unknown kind": _config(model_type="nonsense"),
    "too many layers": _config(num_hidden_layers=40),
}


def _texts() -> Iterator[Case]:
    """Texts that cannot be read, or are too short."""
    texts: dict[str, bytes] = {
        "empty.txt": b"",
        "short.txt": b"A plum.",
        "latin.txt": ("für " * 4000).encode("latin-1"),
        "zeros.parquet": bytes(64),
        "torn.jsonl": b'{"text": "a"}\n{"text": \n',
        "other.jsonl": b'{"words": "a"}\n' * 40,
        "number.jsonl": b'{"text": 3}\n' * 40,
        "odd.xyz": TEXT.encode(),
    }
    for name, text in texts.items():

        def make(folder: Path, name: str = name, text: bytes = text) -> None:
            (folder / name).write_bytes(text)

        for key in ("evaluate", "calibrate"):
            data = f"{key}.data=" + (f"{{t: ./{name}}}" if key == "evaluate" else f"./{name}")
            yield Case(
                f"text, {key}", ("run", "--out", "out", "--device", "cpu", "--set", data), (f"{key}.data",), make
            )
    yield Case("text", ("run", "--out", "out", "--set", "calibrate.data=./nowhere.txt"), ("nowhere.txt",))


def _classifier(kind: str, make: Callable[[Path], object], *words: str, ending: str = "", **changes: Any) -> Case:
    """A run of a classifier on the images that `make` writes; changes: keys of the recipe, with __ for dots.

    Their name is new, because a process reads images once; in words and texts it is `set`.
    """
    name = f"set{next(_NUMBERS)}{ending}"
    base = merge(IMAGES, {"images.source": f"./{name}", "train.batch_size": 4, "corruptions": None})
    recipe = merge(base, {key.replace("__", "."): value for key, value in changes.items()})

    def write(folder: Path) -> None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        make(folder / name)

    return Case(kind, ("run", "recipe.yaml", "--out", "out"), words or (name,), write)


_NUMBERS = itertools.count()


def _picture(seed: int = 0, shape: tuple[int, ...] = (8, 8, 3), kind: Any = np.uint8) -> bytes:
    written = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, shape).astype(kind)).save(written, "PNG")
    return written.getvalue()


def _set(folder: Path, classes: Sequence[str] = ("a", "b"), count: int = 8) -> None:
    """A good folder of pictures, one folder for each class."""
    for place in range(count * len(classes)):
        path = folder / classes[place % len(classes)] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_picture(place))


def _images() -> Iterator[Case]:
    """Image sets that cannot be trained on: folders, arrays, tables, and sizes that do not fit them."""
    whole, larger = _picture(), _picture(shape=(9, 9, 3))
    pictures: list[tuple[str, bytes, str]] = [
        ("a/0.png", whole[: len(whole) // 2], "a/0.png"),
        ("a/2.png", b"", "a/2.png"),
        ("b/1.jpg", b"a plum", "b/1.jpg"),
        ("b/3.png", larger, "b/3.png"),
        ("b/5.png", _picture(shape=(8, 8), kind=np.uint16), "b/5.png"),
        ("a/notes.txt", b"a plum", "a/notes.txt"),
        ("c/.hidden", b"", "/c"),
        ("test/c/1.png", whole, "'c'"),
        ("test/a/1.png", larger, "9"),
    ]
    for path, content, word in pictures:

        def make(place: Path, path: str = path, content: bytes = content) -> None:
            _set(place / ("train" if path.startswith("test/") else ""))
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            (place / path).write_bytes(content)

        yield _classifier("images, picture", make, word)
    yield _classifier("images, empty", lambda place: place.mkdir())
    yield _classifier("images, one class", lambda place: _set(place, ("a",)), "1 class")
    yield _classifier("images, few", lambda place: _set(place, count=1), "2 images")
    yield _classifier("images, no test", lambda place: _set(place / "train"), "test")
    yield _classifier("images, small", _set, "vgg16_bn", "8", model="vgg16_bn")
    sizes: dict[str, Any] = {"images__size": -1, "images__mean": [0.5], "images__std": [0.0, 0.1, 0.1]}
    sizes |= {"train__augment": {"resized": 2.0}, "train__augment__crop": -1, "train__batch_size": 100}
    for key, value in sizes.items():
        yield _classifier("images, sizes", _set, key.rpartition("__")[2], **{key: value})
    for name, change in ARRAYS.items():

        def write(place: Path, change: Callable[[dict[str, Any]], object] = change) -> None:
            pixels = np.random.default_rng(0).integers(0, 255, (16, 3, 8, 8), dtype=np.uint8)
            arrays: dict[str, Any] = {"pixels": pixels, "labels": np.arange(16) % 2}
            change(arrays)
            np.savez(place, **arrays)

        yield _classifier(f"images, arrays {name}", write, ending=".npz")
    for name, alter in TABLES.items():

        def table(place: Path, alter: Callable[[dict[str, list[Any]]], object] = alter) -> None:
            columns: dict[str, list[Any]] = {"img": [_picture(n) for n in range(16)], "label": [0, 1] * 8}
            alter(columns)
            pyarrow.parquet.write_table(pyarrow.table(columns), place)

        yield _classifier(f"images, table {name}", table, ending=".parquet")
    for ending in (".npz", ".parquet", ".safetensors"):
        for content in (b"", bytes(64), POINTER.encode()):
            yield _classifier("images, file", lambda place, content=content: place.write_bytes(content), ending=ending)


ARRAYS: dict[str, Callable[[dict[str, Any]], object]] = {
    "without labels": lambda arrays: arrays.pop("labels"),
    "without pixels": lambda arrays: arrays.pop("pixels"),
    "of floats": lambda arrays: arrays.update(pixels=arrays["pixels"] / 255),
    "of one axis": lambda arrays: arrays.update(pixels=arrays["pixels"].reshape(-1)),
    "of five axes": lambda arrays: arrays.update(pixels=arrays["pixels"][None]),
    "of no image": lambda arrays: arrays.update(pixels=arrays["pixels"][:0], labels=arrays["labels"][:0]),
    "of cubes": lambda arrays: arrays.update(pixels=np.zeros((16, 8, 8, 8), np.uint8)),
    "shorter": lambda arrays: arrays.update(labels=arrays["labels"][:9]),
    "with labels of floats": lambda arrays: arrays.update(labels=arrays["labels"] / 2),
    "with a label of -1": lambda arrays: arrays.update(labels=arrays["labels"] - 1),
    "with objects": lambda arrays: arrays.update(labels=np.array([{}] * 16, object)),
    "with two labels": lambda arrays: arrays.update(labels=np.zeros((16, 2), np.int64)),
    "of one class": lambda arrays: arrays.update(labels=0 * arrays["labels"]),
}
TABLES: dict[str, Callable[[dict[str, list[Any]]], object]] = {
    "without images": lambda columns: columns.pop("img"),
    "without labels": lambda columns: columns.pop("label"),
    "an image missing": lambda columns: columns["img"].__setitem__(3, None),
    "a label missing": lambda columns: columns["label"].__setitem__(3, None),
    "a label of -1": lambda columns: columns["label"].__setitem__(3, -1),
    "labels of floats": lambda columns: columns.update(label=[0.5] * 16),
    "an image cut": lambda columns: columns["img"].__setitem__(3, columns["img"][3][:60]),
    "images of numbers": lambda columns: columns.update(img=[1] * 16),
    "images elsewhere": lambda columns: columns.update(img=["nowhere.png"] * 16),
    "no row": lambda columns: columns.update(img=[], label=[]),
}


def _weights() -> Iterator[Case]:
    """Pretrained weights of a classifier that are none, or those of another one."""
    for name, write in WEIGHTS.items():
        for ending in (".pt", ".safetensors") if name in ("cut", "empty", "pointer", "nowhere") else (".pt",):
            file = f"w{ending}"

            def make(place: Path, write: Callable[[Path, Any], object] = write, file: str = file) -> None:
                _set(place)
                path, model = place.with_name(file), build_model("resnet8", classes=2)
                (torch.save if file == "w.pt" else save_file)(model.state_dict(), path)
                write(path, model)

            yield _classifier(f"weights, {name}", make, file, weights=f"./{file}")


WEIGHTS: dict[str, Callable[[Path, Any], object]] = {
    "cut": lambda path, _: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path, _: path.write_bytes(b""),
    "pointer": lambda path, _: path.write_text(POINTER),
    "nowhere": lambda path, _: path.unlink(),
    "a whole module": lambda path, model: torch.save(model, path),
    "a list": lambda path, model: torch.save(list(model.state_dict().values()), path),
    "a whole checkpoint": lambda path, model: torch.save({"state_dict": model.state_dict(), "epoch": 3}, path),
    "wrapped": lambda path, model: torch.save({f"module.{n}": t for n, t in model.state_dict().items()}, path),
    "another network": lambda path, _: torch.save(build_model("resnet14", classes=2).state_dict(), path),
    "a tensor missing": lambda path, model: torch.save(dict(list(model.state_dict().items())[:-3]), path),
    "not finite": lambda path, model: torch.save({n: t / 0 for n, t in model.state_dict().items()}, path),
    "masked": lambda path, model: torch.save(
        random_unstructured(model.stem, "weight", 0.5) and model.state_dict(), path
    ),
}


def main() -> None:
    """Print how many were refused well, and what was not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    found = [outcome(case) for case in cases(asked.seed)[: asked.count]]
    say = sys.stdout.write
    for each in found:
        if each.verdict != "good":
            say(f"{each.verdict}: {' '.join(each.case.arguments)} ({each.case.kind})\n")
            say(f"    {each.said.strip()[:400]}\n")
    verdicts = Counter(each.verdict.partition(":")[0] for each in found)
    say(f"{verdicts['good']} of {len(found)} were refused in one line before work; {dict(verdicts)}\n")
    times = [each.seconds for each in found]
    say(f"{sum(times):.0f} s, the longest {max(times):.1f} s\n")


if __name__ == "__main__":
    main()
