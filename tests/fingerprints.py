"""Digests of what the package computes: masks, weights, metrics of small jobs, which every rebuilding must leave alone.

    tests/fingerprints.json    {numerical platform: {job: {what: digest}}}

Bits depend on the CPU and on torch, so digests stand under the name of a platform: torch's version, the instruction set
it uses, and a digest of products, exponentials and convolutions of fixed numbers.

    python -m tests.fingerprints record          # the jobs of the test, for this platform
    python -m tests.fingerprints whole NAME      # the demos and recipes of minutes, one or all: shows, or with
    python -m tests.fingerprints record-whole    # this, writes them too

Everything that names the package stands in the first part of the file.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunus.adapt import adapt
from prunus.language.single import compress
from prunus.layers import find_layers
from prunus.masks import Masks
from prunus.measure import perplexity
from prunus.patterns import NM, Unstructured
from prunus.recipe import ClassifierRecipe, LanguageRecipe, parse
from prunus.run import digits
from prunus.run.compare import compare
from prunus.run.demo import MASK_LORA, RECIPE
from prunus.run.grid import Grid
from prunus.score import wanda
from prunus.solve import sparsegpt
from prunus.stream import Fit, Work, stream
from prunus.train import linear_warmup_decay, train
from prunus.vision.sweeps import sweep, sweep_of
from prunus.vision.train import train_run

FILE = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[1]
METHODS: dict[str, dict[str, Any]] = {  # with what the defaults would not show in so few steps
    "gmp": {},
    "dpf": {"refresh": 3},
    "gsm": {},
    "lc": {},
    "dnw": {},
    "str": {"init": -3.0},
    "cs": {"penalty": 1e-3},
    "dst": {"penalty": 1e-2},
    "rigl": {"delta": 4},
    "set": {"delta": 6},
}
SCHEDULES = ("ft", "lrw", "slr", "clr", "llr", "allr")

Digests = dict[str, str]


# What names the package: recipes go in as mappings, numbers come out, and the folder holds the model.


def run_language(raw: dict[str, Any]) -> Any:
    """Perplexities by stage of a language model's run."""
    return compress(parse(raw, LanguageRecipe, "fingerprint"))["perplexity"]


def run_classifier(raw: dict[str, Any]) -> Any:
    """Accuracy and loss by stage of a classifier's run."""
    return measured(train_run(parse(raw, ClassifierRecipe, "fingerprint"))["stages"])


def run_soup(raw: dict[str, Any]) -> Any:
    """Accuracy of every row of a soup's table."""
    return {row["name"]: row["accuracy"] for row in train_run(parse(raw, ClassifierRecipe, "fingerprint"))["rows"]}


def run_sweep(run: Path) -> Any:
    """Accuracies by stage of every point of a sweep of three kinds."""
    points = sweep(sweep_of(run, rates=[0.5, 0.8], timed=1))["points"]
    return [[point["kind"], point["rate"], measured(point["stages"])] for point in points]


def run_grid(raw: dict[str, Any]) -> Any:
    """Accuracy by method of a grid of classifiers."""
    return {row["method"]: row["accuracy"] for row in compare(parse(raw, Grid, "fingerprint"))}


def demo_grid(out: Path) -> dict[str, Any]:
    """The grid of the demo of classifiers."""
    return digits.recipe(0.95, out)


def demo_language(out: Path) -> dict[str, Any]:
    """The recipe of the demo, up to its first retraining."""
    return {**RECIPE, "device": "cpu", "out": str(out)}


def run_stream(model: Any, criterion: str, **options: Any) -> Masks:
    """The masks of pruning a language model block by block, by Wanda at 60 % or by SparseGPT at 2:4."""
    if criterion == "wanda":
        return stream(model, wanda, Unstructured("row"), 0.6, **options).masks
    return stream(model, sparsegpt(), NM(2, 4), 0.5, **options).masks


def retrain_merged(model: Any, masks: Masks, batches: Callable[[int], Tensor], checkpoint: Path) -> None:
    """MaskLoRA, trained for six steps and merged, with a checkpoint every second."""
    adapted = adapt(model, ["mask_lora"], masks=masks, views=find_layers(model, exclude=["lm_head"]), rank=2, alpha=4)
    optimizer = torch.optim.AdamW(adapted.param_groups(1e-2, {}), weight_decay=0.0)
    options: dict[str, Any] = {"steps": 6, "checkpoint": checkpoint, "save_seconds": 0}
    train(model, batches, optimizer, linear_warmup_decay(6), **options)
    adapted.merge_()


# The jobs.


def measured(stages: Mapping[str, Any]) -> dict[str, Any]:
    """Accuracy and loss of each stage."""
    return {name: [stage["top1"], stage["loss"]] for name, stage in stages.items()}


def digest(value: Any) -> str:
    """A hash of exact bits: tensors by shape and bytes, all else as JSON, whose floats are exact."""
    made = hashlib.sha256()
    if isinstance(value, Mapping) and any(isinstance(each, Tensor) for each in value.values()):
        for name in sorted(value):
            tensor = value[name].detach().contiguous()
            made.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            made.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    else:
        made.update(json.dumps(value, sort_keys=True).encode())
    return made.hexdigest()[:16]


def digests(metrics: Any, folder: Path | None = None) -> Digests:
    """Of the metrics, and of the model and the masks that a run left in a folder."""
    found = {"metrics": digest(metrics)}
    if folder is not None:
        found |= {"weights": digest(load_file(folder / "model.safetensors"))}
    if folder is not None and (folder / "masks.safetensors").exists():
        found |= {"masks": digest(dict(Masks.load(folder / "masks.safetensors")))}
    return found


def classifier(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of eight steps on noisy 8 x 8 images of four classes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(160) % 4
    pixels = torch.randint(256, (4, 8, 8), generator=generator)[labels] // 2
    pixels += torch.randint(128, (160, 8, 8), generator=generator)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"pixels": pixels.to(torch.uint8), "labels": labels}, folder / "images.safetensors")
    training = {"epochs": 2, "batch_size": 32, "lr": 0.05, "warmup": 0, "augment": {"crop": 1}}
    fixed = {"images": str(folder / "images.safetensors"), "model": "resnet8", "train": training, "device": "cpu"}
    return {**fixed, "out": str(folder / "out"), **changes}


PRUNED: dict[str, Any] = {"prune": {"sparsity": 0.8, "phases": 2}}


def during(method: str, folder: Path) -> Digests:
    """A method that prunes while training."""
    asked = classifier(folder, prune={"sparsity": 0.8}, during={method: METHODS[method]})
    return digests(run_classifier(asked), folder / "out")


def phases(schedule: str, folder: Path) -> Digests:
    """Two phases of pruning and retraining."""
    asked = classifier(folder, **PRUNED, retrain={"schedule": schedule, "epochs": 1.5})
    asked["train"] |= {"schedule": {"multistep": [1]}}  # under which no two retraining schedules are the same
    return digests(run_classifier(asked), folder / "out")


def frank_wolfe(folder: Path) -> Digests:
    """SFW in balls of the k-support norm, pruned to 80 % afterwards."""
    asked = classifier(folder, prune={"sparsity": 0.8})
    asked["train"] |= {"optimizer": {"sfw": {"set": "k_support", "k": 0.3, "size": {"initial": 30}}}}
    return digests(run_classifier(asked), folder / "out")


def soup(folder: Path) -> Digests:
    """Two phases of two members beside IMP and the retraining that is twice as long."""
    section = {"members": 2, "baselines": ["imp", "longer", "reprune"], "also": ["greedy"], "line": 0, "plane": 0}
    asked = classifier(folder, **PRUNED, retrain={"schedule": "allr", "epochs": 1}, soup=section)
    asked["images"] = {"source": asked["images"], "measure_on": "both"}
    return digests(run_soup(asked), folder / "out")


def swept(folder: Path) -> Digests:
    """Zeros, filters and low rank at two rates of one dense training."""
    run_classifier(classifier(folder))
    return digests(run_sweep(folder / "out"))


def digits_demo(folder: Path) -> Digests:
    """The grid of the classifiers' demo on few images, for few epochs, with one seed."""
    raw = demo_grid(folder / "out")
    small = classifier(folder)
    raw["base"] |= {"images": small["images"], "train": {**small["train"], "epochs": 2}, "device": "cpu"}
    for cell in raw["axes"]["method"].values():
        for key, value in (("train.epochs", 1), ("retrain", {**cell.get("retrain", {}), "epochs": 1})):
            if key in cell:
                cell[key] = value
    raw["axes"]["method"]["BIMP"]["retrain"]["epochs"] = 2
    return digests(run_grid({**raw, "seeds": [0]}))


@cache
def text() -> str:
    """Some 4,000 characters with structure to learn."""
    return "\n".join(f"The {i % 7}th plum tree of row {i % 11} bears {i * i % 13} plums." for i in range(90))


def language_demo(options: Mapping[str, Any], folder: Path) -> Digests:
    """The demo's pruning and one of its retrainings, with few texts and steps."""
    (folder / "text.txt").write_text(text()[:1200])
    raw = demo_language(folder / "out")
    raw["calibrate"] = {"samples": 4, "length": 32, "batch_size": 2}
    raw["retrain"] = {**raw["retrain"], "steps": 3, "batch_size": 2, "length": 32, **options}
    raw["evaluate"] = {"window": 32, "batch_size": 4, "data": {"text": str(folder / "text.txt")}}
    return digests(run_language(raw), folder / "out" / "model")


def tiny(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe for a random Llama of two blocks."""
    from tests.conftest import byte_tokenizer, tiny_llama

    (folder / "text.txt").write_text(text())
    tiny_llama().save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    data = str(folder / "text.txt")
    lengths = {"batch_size": 4, "length": 32}
    return {
        "model": str(folder / "dense"),
        "device": "cpu",
        "prune": {"criterion": "wanda", "sparsity": 0.6},
        "calibrate": {"data": data, "samples": 8, **lengths},
        "retrain": {"data": data, "train": ["norms", "mask_lora"], "steps": 6, "lr": 1e-2, "rank": 4, **lengths},
        "evaluate": {"data": {"text": data}, "window": 32, "batch_size": 16},
        "out": str(folder / "out"),
    } | changes


def language(folder: Path, **changes: Any) -> Digests:
    """A whole job on a tiny Llama; each change is a section of the recipe."""
    return digests(run_language(tiny(folder, **changes)), folder / "out" / "model")


class Killed(Exception):
    """What ends a job that is to be resumed."""


def killed(criterion: str, fit: Fit | None, folder: Path) -> Digests:
    """Streamed, reconstructed, retrained and merged: killed after the first block and in the fourth step, and resumed.

    Raises AssertionError unless an unbroken job gives the same bits.
    """
    whole, broken = (resumed(criterion, fit, folder / name, breaks) for name, breaks in (("a", False), ("b", True)))
    assert whole == broken, "a resumed job ended with other bits than the unbroken one"
    return whole


def resumed(criterion: str, fit: Fit | None, folder: Path, breaks: bool) -> Digests:
    """A job that dies in every stage, if it is to, and is begun again."""
    from tests.conftest import VOCABULARY, tiny_llama

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (8, 16), generator=generator)
    work = Work(folder / "blocks", "job").open()
    options: dict[str, Any] = {"tokens": tokens, "batch_size": 3, "fit": fit, "work": work}
    dies_at = {"block": breaks, "step": breaks}

    def on_block(_: Any) -> None:
        if dies_at.pop("block", False):
            raise Killed

    def batches(step: int) -> Tensor:
        if step == 3 and dies_at.pop("step", False):
            raise Killed
        return tokens[step % 4 :: 4]

    for _ in range(3):
        model = tiny_llama()
        try:
            masks = run_stream(model, criterion, on_block=on_block, **options)
            retrain_merged(model, masks, batches, folder / "retrain.pt")
        except Killed:
            continue
        found = perplexity(model, tokens.flatten(), window=16)
        return {"metrics": digest(found), "weights": digest(model.state_dict()), "masks": digest(dict(masks))}
    raise AssertionError("the job died more often than it was killed")


FIT = Fit(window="half", train=("mask_lora",), inputs="dense", steps=3, lr=1e-2, rank=2, alpha=4.0)
GPT = {"criterion": "sparsegpt", "pattern": "2:4"}
RECONSTRUCT = {"window": "block", "train": ["mask_lora"], "rank": 2, "alpha": 4.0, "steps": 4, "lr": 1e-2}

JOBS: dict[str, Callable[[Path], Digests]] = {
    "demo, biases and norms": partial(language_demo, {}),
    "demo, MaskLoRA": partial(language_demo, MASK_LORA),
    "demo, digits": digits_demo,
    **{f"during {name}": partial(during, name) for name in METHODS},
    **{f"phases {name}": partial(phases, name) for name in SCHEDULES},
    "SFW": frank_wolfe,
    "soup": soup,
    "sweep": swept,
    "language, Wanda": language,
    "language, RIA of the model": partial(language, prune={"criterion": "ria", "sparsity": 0.4, "scope": "model"}),
    "language, OWL": partial(
        language, prune={"criterion": "wanda", "sparsity": 0.5, "allocation": "owl"}, streaming=True, retrain=None
    ),
    "language, SparseGPT": partial(language, prune=GPT, reconstruct=RECONSTRUCT, streaming=True),
    "language, Frank-Wolfe": partial(language, prune={"criterion": "frank_wolfe", "sparsity": 0.5}, retrain=None),
    "language, soup": partial(language, soup={"members": 2}),
    "killed, Wanda": partial(killed, "wanda", None),
    "killed, SparseGPT": partial(killed, "sparsegpt", FIT),
}


def whole_recipe(path: Path, folder: Path) -> Digests:
    """A recipe of the repository as it stands."""
    import yaml

    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    return digests(run_language({**raw, "device": "cpu", "out": str(folder / "out")}), folder / "out" / "model")


def whole_demo(options: Mapping[str, Any], folder: Path) -> Digests:
    """The demo's pruning and one of its retrainings."""
    raw = demo_language(folder / "out")
    raw["retrain"] = {**raw["retrain"], **options}
    return digests(run_language(raw), folder / "out" / "model")


def whole_digits(folder: Path) -> Digests:
    """The demo of classifiers."""
    return digests(run_grid(demo_grid(folder / "out")))


WHOLE: dict[str, Callable[[Path], Digests]] = {
    "whole demo, biases and norms": partial(whole_demo, {}),
    "whole demo, MaskLoRA": partial(whole_demo, MASK_LORA),
    "whole demo, digits": whole_digits,
    "whole embedded": partial(whole_recipe, ROOT / "recipes" / "perp" / "embedded.yaml"),
    "whole embedded-24": partial(whole_recipe, ROOT / "recipes" / "perp" / "embedded-24.yaml"),
}


# Platforms and the file.


@contextmanager
def one_thread() -> Generator[None]:
    """One thread of torch, as the digests were made, and its random state as before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


@cache
def platform() -> str:
    """The name of what decides the bits: torch, the instruction set it uses, and what they make of fixed numbers."""
    with one_thread():
        x = torch.linspace(-3, 3, 64 * 96).view(64, 96)
        made = {"product": x @ x.T, "exp": x.exp(), "norm": x.norm(dim=1), "softmax": x.softmax(1)}
        made["conv"] = torch.conv2d(x.view(6, 1, 32, 32), x.view(-1)[:144].view(16, 1, 3, 3), padding=1)
    return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, {digest(made)}"


def known() -> dict[str, dict[str, Digests]]:
    """The stored digests of all platforms."""
    return json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}


def found(job: Callable[[Path], Digests]) -> Digests:
    """The digests of a job, run here in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder, one_thread():
        return job(Path(folder))


def record(jobs: Mapping[str, Callable[[Path], Digests]]) -> None:
    """Run the jobs and write their digests for this platform."""
    stored = known()
    stored[platform()] = stored.get(platform(), {}) | {name: found(job) for name, job in jobs.items()}
    FILE.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def show(jobs: Mapping[str, Callable[[Path], Digests]]) -> None:
    """Run the jobs and say which have the stored digests."""
    stored = known().get(platform(), {})
    for name, job in jobs.items():
        mine, expected = found(job), stored.get(name)
        verdict = "not recorded here" if expected is None else "same" if mine == expected else "OTHER"
        sys.stdout.write(f"{name}: {verdict} {mine}\n")


if __name__ == "__main__":
    verb, *names = sys.argv[1:] or ["record"]
    chosen = {name: job for name, job in {**JOBS, **WHOLE}.items() if name in names}
    if verb == "whole":
        show(chosen or WHOLE)
    elif verb == "record-whole":
        record(chosen or WHOLE)
    else:
        record(chosen or JOBS)
