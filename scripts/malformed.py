"""How wrong inputs are refused: hundreds of them, made from valid ones by one mutation each, and given to the command.

    recipe, grid, flag, file, checkpoint, text ─ one mutation ─▶ prunus ... ─▶ one line, status 2, nothing written

    python scripts/malformed.py --count 200        counts by kind, and every one that was not refused so

A line is good that names the value and the place (the words of a case) and says what should be there instead.
"""

from __future__ import annotations

import argparse
import contextlib
import io
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

import torch
import yaml
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from prunus.data import ASSETS
from prunus.run import cli
from prunus.run.recipe import ClassifierRecipe, LanguageRecipe, merge

TEXT = "The plum tree of row seven bears thirteen plums.\n" * 400
MENDS = (
    "give|set |use|did you mean|known|should|leave (it )?out|there (is|are)|see |needs|at least|at most|delete|install"
    "|write|save it|stands twice|takes|is auto|lies in|in \\[0|as in|line \\d|put |get it|fetch|get the |make |pass "
    "|goes by|must|without|convert|rename|more|by: |not allowed|download|belong to another"
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
    found = [*_recipes(), *_flags(), *_files(), *_grids(), *_checkpoints(), *_texts()]
    random.Random(seed).shuffle(found)
    return found


LANGUAGE: dict[str, Any] = {
    "model": "embedded",
    "device": "cpu",
    "prune": {},
    "calibrate": {"samples": 2, "length": 16},
    "reconstruct": {"steps": 1},
    "retrain": {"steps": 1, "length": 16, "batch_size": 1, "dense": {"steps": 100}},
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
    "corruptions": {"images": 1},
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
