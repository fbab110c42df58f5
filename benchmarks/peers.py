"""Perplexity, layer errors and seconds of other implementations of one-shot pruning, and of ours, on the same inputs.

    python benchmarks/peers.py --wanda CHECKOUT --sparsegpt CHECKOUT --admm CHECKOUT --alps CHECKOUT --ria CHECKOUT \\
        --llm-compressor CHECKOUT --out peers.json

Each option names a folder with the code that its authors published. Whatever is given is run by its own driver, as it
stands: the embedded model, float32, on a CPU, the same token ids. What those drivers take for granted is stood in for
while they run (`standing_in`): a GPU, a data set to download, a global `args`. Beside each stands what is nearest to it
here, under the same pattern. --out is written row by row; a call with the same file goes on after its last row.

    error: ||X (W - W')^T||^2 / ||X W^T||^2 on the dense model's inputs X, the mean over layers

Layers of the first block were given just those inputs; later ones were solved with what the pruned blocks before them
leave. Where a driver rounds its zeros down, ours is run once more with as many in each layer, and that is what stands
beside it. docs/results/peers.md says what was found.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import io
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch import Tensor, nn

import prunus
from prunus.language import stages
from prunus.language.texts import calibration_windows
from prunus.layers import Layer
from prunus.machine import read_json, write_json
from prunus.measure import perplexity
from prunus.patterns import NM, Pattern, Unstructured
from prunus.recipe import load_recipe
from prunus.report import print_table
from prunus.score import Allocation, Count, Criterion, allocation, uniform

WINDOW = 512
FEWER = 2e-4  # as a share of all weights: with fewer zeros than that a method has another budget


@dataclass(frozen=True)
class Asked:
    """What is pruned away: a share of zeros, or `zeros` of each `of` (then the share is theirs)."""

    sparsity: float
    zeros: int = 0
    of: int = 0

    @property
    def pattern(self) -> Pattern | None:
        """Ours; None is any entries, compared as the criterion compares."""
        return NM(self.of - self.zeros, self.of) if self.of else None


FREE = {"50 %": Asked(0.5), "60 %": Asked(0.6), "70 %": Asked(0.7)}
GROUPS = {"2:4": Asked(0.5, 2, 4), "4:8": Asked(0.5, 4, 8)}
PATTERNS = FREE | GROUPS

OURS: dict[str, Criterion] = {
    "magnitude": prunus.magnitude,
    "Wanda": prunus.wanda,
    "RIA": prunus.ria,
    "SparseGPT": prunus.sparsegpt(),
    "ADMM": prunus.admm(),
    "magnitude, refit": prunus.refit(prunus.magnitude),
    "Wanda, refit": prunus.refit(prunus.wanda),
    "RIA, refit": prunus.refit(prunus.ria),
    "ALPS, refit": prunus.refit(prunus.alps(), damping=0.01),
}

Drive = Callable[[Path, nn.Module, Tensor, Asked], None]


@dataclass(frozen=True)
class Peer:
    """A method of a folder: what of ours stands beside it, what prunes a model in place, under which patterns."""

    folder: str
    method: str
    ours: str
    drive: Drive
    patterns: Iterable[str] = tuple(PATTERNS)


# How each folder's own driver is called.


def listed(module: str, function: str, **flags: Any) -> Drive:
    """Drivers of the form `function(args, model, tokenizer, device, prune_n, prune_m)` that call `get_loaders`."""

    def drive(folder: Path, model: nn.Module, ids: Tensor, asked: Asked) -> None:
        args = argparse.Namespace(nsamples=len(ids), seed=0, sparsity_ratio=asked.sparsity, **flags)
        with standing_in(folder, module, model, ids) as lib:
            vars(lib)["get_loaders"] = lambda *_, **__: (_batches(ids), None)
            getattr(lib, function)(args, model, None, torch.device("cpu"), prune_n=asked.zeros, prune_m=asked.of)

    return drive


def sequential(flags: Callable[[Asked], dict[str, Any]]) -> Drive:
    """Drivers `opt_sequential(model, batches, device)` that read a global `args`."""

    def drive(folder: Path, model: nn.Module, ids: Tensor, asked: Asked) -> None:
        with standing_in(folder, "opt", model, ids) as lib:
            vars(lib)["args"] = argparse.Namespace(nsamples=len(ids), **flags(asked))
            lib.opt_sequential(model, _batches(ids), torch.device("cpu"))

    return drive


def modifier(name: str) -> Drive:
    """`oneshot` of llm-compressor with one modifier, whose pipeline runs a block at a time."""

    def drive(folder: Path, model: nn.Module, ids: Tensor, asked: Asked) -> None:
        rows = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
        version = ModuleType("llmcompressor.version")  # its build writes this file
        vars(version).update(__version__="0", version="0")
        sys.modules.setdefault(version.__name__, version)
        with mock.patch.object(sys, "path", [str(folder / "src"), *sys.path]), redirect_stdout(io.StringIO()):
            lib, pruning = map(importlib.import_module, ("llmcompressor", "llmcompressor.modifiers.pruning"))
            structure = f"{asked.zeros}:{asked.of}" if asked.of else "0:0"
            recipe = getattr(pruning, name)(sparsity=asked.sparsity, mask_structure=structure, ignore=["re:.*lm_head"])
            lib.oneshot(
                model=model, dataset=Dataset.from_dict(rows), recipe=recipe, max_seq_length=ids.shape[1],
                num_calibration_samples=len(ids), shuffle_calibration_samples=False,
            )  # fmt: skip

    return drive


def _sparsegpt(asked: Asked) -> dict[str, Any]:
    every = {"minlayer": -1, "maxlayer": 1000, "prune_only": "", "invert": False}
    its_defaults = {"wbits": 16, "percdamp": 0.01, "blocksize": 128}
    return every | its_defaults | {"sparsity": asked.sparsity, "prunen": asked.zeros, "prunem": asked.of}


def _alps(asked: Asked) -> dict[str, Any]:
    return {"method": "ALPS", "sp": asked.sparsity, "nm_n": asked.of - asked.zeros, "nm_m": asked.of}


def _ria(**changes: bool) -> Drive:
    off = ("reconstruction", "reallocation", "lsa", "per_outneuron", "gptq", "semi_sparse_acc", "fast")
    flags = {"model": "opt", "seqlen": WINDOW, "calib_dataset": "", "a": 0.5, "importance_score": "sum"}
    return listed("lib.prune", "prune_ria", prune_method="ria", **flags, **(dict.fromkeys(off, False) | changes))


def _ablation(method: str) -> Drive:
    return listed("lib.prune_opt", "prune_ablate", prune_method=method)


PEERS = [
    Peer("wanda", "magnitude", "magnitude", listed("lib.prune_opt", "prune_magnitude")),
    Peer("wanda", "Wanda", "Wanda", listed("lib.prune_opt", "prune_wanda")),
    Peer("wanda", "Wanda, variant", "Wanda", listed("lib.prune", "prune_wanda", use_variant=True), FREE),
    Peer("wanda", "SparseGPT", "SparseGPT", listed("lib.prune_opt", "prune_sparsegpt")),
    Peer("wanda", "magnitude, then swept", "magnitude, refit", _ablation("ablate_mag_seq")),
    Peer("wanda", "Wanda, then swept", "Wanda, refit", _ablation("ablate_wanda_seq")),
    Peer("wanda", "magnitude, while swept", "magnitude, refit", _ablation("ablate_mag_iter")),
    Peer("wanda", "Wanda, while swept", "Wanda, refit", _ablation("ablate_wanda_iter")),
    Peer("sparsegpt", "SparseGPT", "SparseGPT", sequential(_sparsegpt)),
    Peer("admm", "ADMM", "ADMM", listed("lib.prune", "prune_admm"), [*FREE, "2:4"]),  # its groups are of four
    Peer("alps", "ALPS", "ALPS, refit", sequential(_alps)),
    Peer("ria", "RIA", "RIA", _ria()),
    Peer("ria", "RIA, rows", "RIA", _ria(per_outneuron=True), FREE),
    Peer("ria", "RIA, reconstruction", "RIA, refit", _ria(reconstruction=True), FREE),
    Peer("ria", "RIA, columns permuted", "RIA", _ria(reallocation=True, lsa=True), GROUPS),
    Peer("llm-compressor", "Wanda", "Wanda", modifier("WandaPruningModifier")),
    Peer("llm-compressor", "SparseGPT", "SparseGPT", modifier("SparseGPTModifier")),
]


# What they take for granted.


@contextmanager
def standing_in(folder: Path, module: str, model: nn.Module, ids: Tensor) -> Generator[ModuleType]:
    """A module of the folder, while what it takes for granted is there; afterwards no module of the folder is left.

    Imports find the folder first, as its own scripts do; "cuda" is the CPU; prints go nowhere. The model, a copy, says
    its length and where its parts are, and has its blocks at `model.model.layers` too, where drivers for Llama look.
    """
    to: Any = Tensor.to
    before, inner = set(sys.modules), model.get_submodule("model")

    def on_cpu(x: Tensor, *where: Any, **how: Any) -> Tensor:
        return to(x, *("cpu" if _is_cuda(each) else each for each in where), **how)

    vars(model).update(seqlen=ids.shape[1], hf_device_map={})
    inner.add_module("layers", inner.get_submodule("decoder.layers"))
    with ExitStack() as stack:
        stack.callback(_forget, before, folder)
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(mock.patch.object(sys, "path", [str(folder), *sys.path]))
        stack.enter_context(mock.patch.object(Tensor, "to", on_cpu))
        stack.enter_context(mock.patch.object(Tensor, "cuda", lambda x, *_, **__: x))
        for name in ("synchronize", "empty_cache"):
            stack.enter_context(mock.patch.object(torch.cuda, name))
        yield importlib.import_module(module)


def _is_cuda(where: Any) -> bool:
    return isinstance(where, str | torch.device) and torch.device(where).type == "cuda"


def _forget(before: set[str], folder: Path) -> None:
    """Names such as `lib` and `quant` are those of several folders."""
    for name in set(sys.modules) - before:
        places = [getattr(sys.modules[name], "__file__", None), *getattr(sys.modules[name], "__path__", ())]
        if any(place and Path(place).is_relative_to(folder) for place in places):
            del sys.modules[name]


def _batches(ids: Tensor) -> list[tuple[Tensor, None]]:
    return [(row[None], None) for row in ids]


# What is measured.


@dataclass(frozen=True)
class Inputs:
    """What everything is run on: the dense model, test tokens (N,), calibration windows (samples, 512), its layers."""

    model: nn.Module
    test: Tensor
    ids: Tensor
    layers: Sequence[Layer]


def read(seed: int, samples: int) -> Inputs:
    """The embedded model, its held-out text, and windows of the text that it is calibrated on."""
    recipe = load_recipe(None, {"model": "embedded", "dtype": "float32", "device": "cpu"})
    loaded = stages.load(recipe)
    calibrate = recipe.calibrate.model_copy(update={"samples": samples, "length": WINDOW, "seed": seed})
    ids = calibration_windows(calibrate, loaded.tokenizer)
    test = prunus.tokenize(prunus.read_texts("embedded", split="test"), loaded.tokenizer)
    return Inputs(loaded.model, test, ids, dense_layers(loaded.model, ids))


def dense_layers(model: nn.Module, ids: Tensor) -> list[Layer]:
    """The layers of a model as they are, each with its inputs."""
    layers: list[Layer] = []

    def look(layer: Layer, pattern: Pattern, kept: int) -> tuple[Tensor, Tensor]:
        layers.append(Layer(layer.name, layer.weight.clone(), layer.inputs))
        return layer.weight, torch.ones_like(layer.weight, dtype=torch.bool)

    prunus.stream(copy.deepcopy(model), Criterion(look, needs="gram"), sparsity=0.5, tokens=ids)
    return layers


def measured(inputs: Inputs, prune: Callable[[nn.Module], object]) -> tuple[dict[str, float], dict[str, int]]:
    """Perplexity, errors, share of zeros and seconds after `prune` has pruned a copy; what is kept of each layer."""
    model = copy.deepcopy(inputs.model)
    started = time.perf_counter()
    prune(model)
    seconds = time.perf_counter() - started
    weights = [model.get_submodule(layer.name).get_parameter("weight").detach() for layer in inputs.layers]
    errors = [relative_error(layer, weight) for layer, weight in zip(inputs.layers, weights, strict=True)]
    first = [each for layer, each in zip(inputs.layers, errors, strict=True) if ".layers.0." in layer.name]
    kept = {layer.name: int(each.count_nonzero()) for layer, each in zip(inputs.layers, weights, strict=True)}
    found = {
        "perplexity": perplexity(model, inputs.test, window=WINDOW, batch_size=8),
        "error": statistics.fmean(errors),
        "first": statistics.fmean(first),
        "zeros": 1 - sum(kept.values()) / sum(each.numel() for each in weights),
        "seconds": seconds,
    }
    return {key: float(f"{value:.6g}") for key, value in found.items()}, kept


def relative_error(layer: Layer, weight: Tensor) -> float:
    """||X (W - W')^T||^2 / ||X W^T||^2 in float64."""
    assert layer.inputs is not None
    assert layer.inputs.gram is not None
    gram, dense = layer.inputs.gram.double(), layer.weight.double()
    lost, whole = (((each @ gram) * each).sum() for each in (dense - weight.double(), dense))
    return float(lost / whole)


def run(inputs: Inputs, row: Mapping[str, Any], given: Mapping[str, Path]) -> dict[str, Any]:
    """What came of a method, or the error that it ended with; `beside`, ours with as few zeros where it has fewer."""
    asked = PATTERNS[row["pattern"]]
    if row["folder"] == "prunus":
        return measured(inputs, lambda model: ours(model, row["method"], asked, inputs.ids))[0]
    peer = next(each for each in PEERS if (each.folder, each.method) == (row["folder"], row["method"]))
    try:
        found, kept = measured(inputs, lambda model: peer.drive(given[peer.folder], model, inputs.ids, asked))
    except Exception as error:  # of code that is not ours
        return {"failed": f"{type(error).__name__}: {error}"}
    if asked.of or found["zeros"] > asked.sparsity - FEWER:
        return found
    as_many = allocation(reads="shapes")(lambda shapes, sparsity: kept)
    beside = measured(inputs, lambda model: ours(model, peer.ours, asked, inputs.ids, as_many))[0]
    return found | {"beside": beside}


def ours(model: nn.Module, name: str, asked: Asked, ids: Tensor, counts: Allocation | Count = uniform) -> None:
    """Prune the model in place by one of `OURS`."""
    criterion = OURS[name]
    pattern = asked.pattern or Unstructured(criterion.compare)
    prunus.stream(model, criterion, pattern, asked.sparsity, tokens=ids, allocation=counts)


def commit_of(folder: Path) -> dict[str, str]:
    """The commit of a checkout and its date, and which of its files were changed."""

    def git(*command: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *command], capture_output=True, text=True).stdout.strip()

    commit, _, date = git("log", "-1", "--format=%H %cs").partition(" ")
    return {"commit": commit or "unknown", "date": date, "changed": git("diff", "--name-only", "HEAD")}


# Rows and table.


def missing(
    rows: Sequence[Mapping[str, Any]], seed: int, patterns: Iterable[str], given: Iterable[str]
) -> list[dict[str, Any]]:
    """What is to be run and stands in none of the rows: the methods of what is given, and ours beside them."""
    found: dict[tuple[str, str, str], None] = {}
    for pattern in patterns:
        asked = [peer for peer in PEERS if peer.folder in given and pattern in peer.patterns]
        found |= dict.fromkeys((pattern, "prunus", peer.ours) for peer in asked)
        found |= dict.fromkeys((pattern, peer.folder, peer.method) for peer in asked)
    done = {_key(row) for row in rows if row["seed"] == seed}
    return [
        {"pattern": pattern, "folder": folder, "method": method, "seed": seed}
        for pattern, folder, method in found
        if (pattern, folder, method) not in done
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line for each method of a peer under each pattern, and what of ours stands beside it; means over seeds."""
    lines: list[dict[str, str]] = []
    for peer in PEERS:
        for pattern in peer.patterns:
            theirs = [row for row in rows if _key(row) == (pattern, peer.folder, peer.method)]
            own = {row["seed"]: row for row in rows if _key(row) == (pattern, "prunus", peer.ours)}
            beside = [row.get("beside", own.get(row["seed"], {})) for row in theirs]
            if theirs:
                names = {"pattern": pattern, "peer": peer.folder, "method": peer.method, "ours": peer.ours}
                lines.append(names | _numbers("theirs", theirs) | _numbers("ours", beside))
    order = list(PATTERNS)
    return sorted(lines, key=lambda line: order.index(line["pattern"]))


def _key(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["pattern"], row["folder"], row["method"]


def _numbers(whose: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    digits = {"perplexity": 2, "error": 4, "zeros": 4, "seconds": 0}
    return {f"{key}, {whose}": _mean([row[key] for row in rows if key in row], digits[key]) for key in digits}


def _mean(values: Sequence[float], digits: int) -> str:
    """Mean and, of several, the standard deviation; "failed" of none."""
    if not values:
        return "failed"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def main() -> None:
    """Run what is asked and not yet in the file, a row at a time, and show the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    folders = list(dict.fromkeys(peer.folder for peer in PEERS))
    for name in folders:
        parser.add_argument(f"--{name}", type=Path, help="checkout of its code")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the rows")
    parser.add_argument("--samples", type=int, default=64, help=f"calibration windows of {WINDOW} tokens")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0], help="of the calibration windows")
    parser.add_argument("--patterns", nargs="*", default=list(PATTERNS), choices=list(PATTERNS))
    args = parser.parse_args()
    asked = {name: vars(args)[name.replace("-", "_")] for name in folders}
    given = {name: folder.resolve() for name, folder in asked.items() if folder is not None}
    found: dict[str, Any] = read_json(args.out) if args.out.exists() else {"peers": {}, "rows": []}
    found["setting"] = {"samples": args.samples, "torch": torch.__version__, "threads": torch.get_num_threads()}
    found["peers"] |= {name: commit_of(folder) for name, folder in given.items()}
    for seed in args.seeds:
        wanted = missing(found["rows"], seed, args.patterns, given)
        inputs = read(seed, args.samples) if wanted else None
        for row in wanted:
            assert inputs is not None
            found["rows"].append(row | run(inputs, row, given))
            write_json(args.out, found)
            sys.stdout.write(f"{found['rows'][-1]}\n")
            sys.stdout.flush()
    print_table(table(found["rows"]), title="the embedded model, test text")


if __name__ == "__main__":
    main()
