"""What models of 70 and 400 billion parameters cost on N GPUs, by stage, from rates that smaller ones were measured at.

    python scripts/next_size.py docs/results/next-size.json    # the tables of docs/results/next-size.md

The file holds runs: a stage, a shape, tokens, seconds. The first run of a stage gives its rate, operations a second;
the others are what the rate is checked by. Operations of a block with weights P, of t tokens in windows of n:

    forward pass   F = 2 P t + 2 n d t                                      (attention is causal)
    Wanda          2 F                                                      (dense to observe, pruned to go on)
    SparseGPT      2 F + t sum in^2  in 16 bits,  sum (2 in^3 / 3 + out in^2) in float32, at the rate of one layer
    a step         3 F of biases and norms, all recomputed; 2 P t more of MaskLoRA; 4 d words t for the head

sums over the inputs of a block (q, k and v share one), and over the layers on each. Bytes are counted, not measured.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WINDOW, RANK = 2048, 16
BETWEEN, WITHIN = 50e9, 450e9  # bytes a second and GPU: a network of 400 Gbit/s, NVLink; makers' figures
EIGHT = 8  # GPUs of a machine


@dataclass(frozen=True)
class Shape:
    """A model of equal blocks: (in, [out, ...]) of each input in a block."""

    name: str
    blocks: int
    width: int
    words: int
    inputs: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def weights(self) -> int:
        """Of the layers of a block."""
        return sum(in_ * sum(outs) for in_, outs in self.inputs)

    @property
    def bytes(self) -> float:
        """Of the whole model in 16 bits, embeddings and head apart."""
        return 2.0 * (self.blocks * self.weights + 2 * self.words * self.width)

    def forward(self, tokens: float) -> float:
        """Operations of a block."""
        return 2.0 * tokens * (self.weights + WINDOW * self.width)


def opt(width: int, blocks: int, words: int = 50272) -> Shape:
    """The family of 2022, four times as wide inside."""
    return Shape(f"{blocks} blocks of {width:,}", blocks, width, words, (
        (width, (width,) * 3), (width, (width,)), (width, (4 * width,)), (4 * width, (width,)),
    ))  # fmt: skip


def gated(name: str, blocks: int, width: int, inner: int) -> Shape:
    """A model of today: 8 heads of keys and values, gate and up."""
    return Shape(name, blocks, width, 128256, (
        (width, (width, 1024, 1024)), (width, (width,)), (width, (inner, inner)), (inner, (width,)),
    ))  # fmt: skip


NEXT = (gated("70 billion", 80, 8192, 28672), gated("405 billion", 126, 16384, 53248))


def work(stage: str, shape: Shape, tokens: float, slowness: float) -> float:
    """Operations in 16 bits; one of float32 counts `slowness` times."""
    forward = shape.forward(tokens)
    if stage == "wanda":
        return shape.blocks * 2 * forward
    if stage == "sparsegpt":
        gram = tokens * sum(in_**2 for in_, _ in shape.inputs)
        return shape.blocks * (2 * forward + gram + slowness * sum(map(solving, shape.inputs)))
    updates = 2 * shape.weights * tokens if stage == "masklora" else 0
    return shape.blocks * (3 * forward + updates) + 4 * shape.width * shape.words * tokens


def solving(group: tuple[int, tuple[int, ...]]) -> float:
    """SparseGPT's operations for the layers of one input, float32."""
    in_, outs = group
    return 2 * in_**3 / 3 + sum(outs) * in_**2


@dataclass(frozen=True)
class Rates:
    """Operations a second by stage, how many in 16 bits one in float32 takes the time of, bytes a second."""

    stages: dict[str, float]
    slowness: float
    bytes: dict[str, float]

    def seconds(self, stage: str, shape: Shape, tokens: float) -> float:
        """On one GPU."""
        if stage in self.bytes:
            return shape.bytes / self.bytes[stage]
        return work(stage, shape, tokens, self.slowness) / self.stages[stage]


def read(runs: list[dict[str, Any]]) -> tuple[Rates, Iterator[tuple[str, Shape, float, float, float]]]:
    """The rates, and for each run that checks one: stage, shape, tokens, seconds predicted and measured."""
    layer = next(run for run in runs if run["stage"] == "layer")
    wide = solving((layer["in"], (layer["out"],))) / layer["seconds"]
    dense = next(run for run in runs if run["stage"] == "wanda")
    rate = work("wanda", _shape(dense), dense["tokens"], 0) / dense["seconds"]
    first: dict[str, dict[str, Any]] = {}
    for run in runs:
        first.setdefault(run["stage"], run)
    carried = {s: _shape(run).bytes / run["seconds"] for s, run in first.items() if s in ("load", "save")}
    computed = (s for s in first if s not in ("layer", "load", "save"))
    stages = {s: work(s, _shape(first[s]), first[s]["tokens"], rate / wide) / first[s]["seconds"] for s in computed}
    rates = Rates(stages, rate / wide, carried)
    others = [run for run in runs if run is not first[run["stage"]]]
    return rates, (
        (r["stage"], _shape(r), r["tokens"], rates.seconds(r["stage"], _shape(r), r["tokens"]), r["seconds"])
        for r in others
    )


def _shape(run: dict[str, Any]) -> Shape:
    return opt(run["width"], run["blocks"], run.get("words", 50272))


def costs(rates: Rates, shape: Shape, gpus: int) -> Iterator[tuple[str, float, float, float, float]]:
    """(stage, seconds, bytes on each GPU, bytes on each host, bytes that each GPU sends) on so many GPUs."""
    tokens, block = 128 * WINDOW, 2 * shape.weights
    masks, widest = shape.blocks * shape.weights, max(in_ for in_, _ in shape.inputs)
    grams = 4 * sum(in_**2 for in_, _ in shape.inputs)
    streamed = 3 * block + 2 * tokens / gpus * shape.width
    passing = rates.seconds("wanda", shape, tokens) / gpus
    sent = shape.blocks * (1.5 * block if gpus > 1 else 0)  # weights and bool masks, from those that solved
    yield "Wanda", max(passing, shape.bytes / rates.bytes["load"]), streamed, masks, sent
    largest = max(max(map(solving, shape.inputs)), sum(map(solving, shape.inputs)) / gpus)
    alone = rates.seconds("sparsegpt", shape, tokens)
    solve = shape.blocks * rates.slowness * sum(map(solving, shape.inputs)) / rates.stages["sparsegpt"]
    shared = (alone - solve) / gpus + solve * largest / sum(map(solving, shape.inputs))
    sent += shape.blocks * 2 * grams * (gpus > 1)
    yield "SparseGPT", shared + sent / _link(gpus), streamed + grams + 12 * widest**2, masks, sent
    values = shape.blocks * RANK * sum(in_ * len(outs) + sum(outs) for in_, outs in shape.inputs)
    for name, stage, trained in (("biases and norms", "norms", 0), ("MaskLoRA", "masklora", values)):
        step = 2 * WINDOW  # tokens on a GPU
        each, count = rates.seconds(stage, shape, step), 10e6 / (step * gpus)
        traffic = 0.0 if gpus == 1 else 2 * shape.bytes * (gpus - 1) / gpus
        held = shape.bytes / gpus + (0 if gpus == 1 else 2 * block) + (masks / 8 if trained else 0) + 16 * trained
        held += 2 * step * shape.width * shape.blocks
        yield (
            f"{name}, 10 M tokens",
            count * max(each, traffic / _link(gpus)),
            held,
            masks + shape.bytes,
            count * traffic,
        )
    yield "save", rates.seconds("save", shape, 0), 2 * block, masks, 0


def _link(gpus: int) -> float:
    return WITHIN if gpus <= EIGHT else BETWEEN


def tables(path: Path) -> str:
    """Everything that the page has of numbers."""
    rates, checks = read(json.loads(path.read_text(encoding="utf-8"))["runs"])
    lines = ["| stage | run | tokens | predicted | measured | ratio |", "|---|---|---|---|---|---|"]
    for stage, shape, tokens, predicted, measured in checks:
        seconds = f"{_spelt(predicted)} | {_spelt(measured)} | {predicted / measured:.2f}"
        lines.append(f"| {stage} | {shape.name} | {tokens:,} | {seconds} |")
    for shape in NEXT:
        lines += ["", f"**{shape.name} parameters**, {shape.bytes / 1e9:,.0f} GB", ""]
        lines += ["| stage | GPUs | time | each GPU | host | sent by each GPU |", "|---|---|---|---|---|---|"]
        for gpus in (1, 8, 64):
            for stage, seconds, gpu, host, sent in costs(rates, shape, gpus):
                sizes = " | ".join(f"{each / 1e9:,.0f} GB" if each >= 5e8 else "" for each in (gpu, host, sent))
                lines.append(f"| {stage} | {gpus} | {_spelt(seconds)} | {sizes} |")
    return "\n".join(lines) + "\n"


def _spelt(seconds: float) -> str:
    """Two digits, in the unit that suits them."""
    for size, unit in ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= 2 * size or unit == "ms":
            value = seconds / size
            digits = max(0, 1 - math.floor(math.log10(value)))
            return f"{value:.{digits}f} {unit}"
    raise AssertionError(seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON of the runs")
    sys.stdout.write(tables(parser.parse_args().file))
