"""Long commands killed at random points, begun again, and compared with ones that nothing happened to, bit for bit.

    python -m tests.kills --points 20 [--seed 0] [NAME ...]

A process is killed (SIGKILL) after a random share of the time that an unbroken run takes, and once more while it goes
on; then the same command ends the work.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from prunus.report import read_metrics
from tests.conftest import byte_tokenizer, set_up, tiny_llama
from tests.processes import start_command, stop

_TIMES = ("seconds", "train_seconds", "tokens_per_second", "images_per_second", "joules", "peak_memory", "memory")
_PLACES = ("key", "saved", "recipe", "out", "model")
_WAIT = 300.0  # seconds


def language(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of a language model that takes about a second."""
    text = str(folder / "text.txt")
    return {
        "model": str(folder / "model"), "device": "cpu", "prune": {"criterion": "sparsegpt", "sparsity": 0.5},
        "calibrate": {"data": text, "samples": 8, "length": 32, "batch_size": 4},
        "retrain": {"data": text, "steps": 60, "batch_size": 4, "length": 32, "lr": 1e-2, "rank": 4},
        "evaluate": {"data": {"text": text}, "window": 32, "batch_size": 128},
    } | changes  # fmt: skip


def _watched(folder: Path) -> dict[str, Any]:
    """The same, measured while it is retrained."""
    text = str(folder / "text.txt")
    texts = {"choosing": {"source": text, "part": [0.5, 1.0]}, "text": text}
    how = {"evaluate_every": 7, "keep_best": True, "patience": 5, "schedule": "cosine", "weight_decay": 0.1}
    plain = language(folder)
    return plain | {"retrain": plain["retrain"] | how, "evaluate": plain["evaluate"] | {"data": texts}}


def classifier(**changes: Any) -> dict[str, Any]:
    """A recipe of a classifier that takes some seconds."""
    return {
        "images": "digits", "model": "resnet8", "device": "cpu", "train": {"epochs": 2, "warmup": 0},
        "prune": {"sparsity": 0.8, "phases": 2}, "retrain": {"epochs": 1},
    } | changes  # fmt: skip


def _grid(folder: Path) -> dict[str, Any]:
    base = language(folder, save=False)
    del base["retrain"]
    retrain = {**language(folder)["retrain"], "steps": 20}
    axes = {"way": {"pruned": {}, "norms": {"retrain": {**retrain, "train": ["norms"]}}, "all": {"retrain": retrain}}}
    return {"base": base, "axes": axes, "seeds": [0, 1]}


def _classifiers(_: Path) -> dict[str, Any]:
    axes = {
        "way": {"pruned": {"retrain": None}, "retrained": {}, "soup": {"soup": {"members": 2, "line": 0, "plane": 0}}}
    }
    return {"base": classifier(), "axes": axes}


RECIPES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "language": language,
    "watched": _watched,
    "streamed": lambda folder: language(folder, streaming=True),
    "language soup": lambda folder: language(folder, soup={"members": 2}),
    "classifier": lambda _: classifier(),
    "classifier soup": lambda _: classifier(soup={"members": 2}),
    "grid": _grid,
    "grid of classifiers": _classifiers,
}


def prepare(folder: Path) -> None:
    """Write the model and the text of the recipes."""
    tiny_llama().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    lines = [f"The {i % 7}th plum tree of row {i % 11} bears {i * i % 13} plums." for i in range(180)]
    (folder / "text.txt").write_text("\n".join(lines))


def run(name: str, folder: Path, out: str, kills: tuple[float, ...] = ()) -> float:
    """Run a command to its end, killed after so many seconds each time before; the seconds of the last time."""
    path = folder / f"{out}.yaml"
    path.write_text(yaml.safe_dump({**RECIPES[name](folder), "out": str(folder / out)}))
    for seconds in kills:
        process = start_command("grid" if name.startswith("grid") else "run", path)
        process.join(seconds)
        process.kill()
        process.join()
    started = time.perf_counter()
    process = start_command("grid" if name.startswith("grid") else "run", path)
    process.join(_WAIT)
    assert process.exitcode == 0, f"{name} ended with {process.exitcode} after kills at {kills}"
    return time.perf_counter() - started


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves that must not depend on kills: files, tensors, numbers without times."""
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    tensors = {name: load_file(folder / name) for name in files if name.endswith(".safetensors")}
    numbers = {name: _numbers(json.loads((folder / name).read_text())) for name in files if _is_result(name)}
    log = folder / "metrics.jsonl"
    rows = read_metrics(log) if log.exists() else []
    seen = sorted(json.dumps([row.get("stage"), row.get("name"), row.get("epoch"), row.get("phase")]) for row in rows)
    return {"files": files, "tensors": tensors, "numbers": numbers, "rows": seen}


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In what two runs differ."""
    found = [part for part in ("files", "numbers", "rows") if one[part] != other[part]]
    for name, tensors in one["tensors"].items():
        again = other["tensors"].get(name, {})
        if tensors.keys() != again.keys() or any(not torch.equal(t, again[key]) for key, t in tensors.items()):
            found.append(name)
    return found


def _is_result(name: str) -> bool:
    return name in ("result.json", "table.json") or (name.startswith("members/") and name.endswith(".json"))


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items() if key not in (*_TIMES, *_PLACES)}
    return [_numbers(item) for item in value] if isinstance(value, list) else value


def main() -> None:
    """Kill each command at so many random points."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(RECIPES))
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    wrong = 0
    set_up()
    with tempfile.TemporaryDirectory() as name:
        folder, random_ = Path(name), random.Random(asked.seed)
        prepare(folder)
        for name in asked.names:
            seconds = run(name, folder, f"{name}-whole")
            whole = left(folder / f"{name}-whole")
            for point in range(asked.points):
                kills = (random_.uniform(0, seconds), random_.uniform(0, seconds))
                run(name, folder, f"{name}-{point}", kills)
                found = differences(whole, left(folder / f"{name}-{point}"))
                wrong += bool(found)
                if found:
                    sys.stdout.write(f"{name} killed after {kills}: {', '.join(found)}\n")
            sys.stdout.write(f"{name}: {asked.points} times, a run takes {seconds:.1f} s\n")
    stop()
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
