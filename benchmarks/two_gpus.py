"""What a second GPU brings: the same retraining and the same block-wise pruning, by one process and by several.

    python benchmarks/two_gpus.py --layers 8                                 # alone: the time that others divide
    accelerate launch --num_processes 2 benchmarks/two_gpus.py --layers 8                              # replicated
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 benchmarks/two_gpus.py --layers 8    # sharded
    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --device cpu --scale 0.02 --steps 2               # tiny

Blocks of OPT-30B's shape with random weights. Each call does the same work in all: retraining on global batches of
`--batch` windows (biases and norms, MaskLoRA, everything under masks), Wanda and SparseGPT on `--samples` windows.
It prints a table of its own; given `--alone FILE` (a JSON of the call with one process) also the speed-up, and the
largest difference of any loss from that call's, which rounding alone explains.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from prunus import ranks
from prunus.adapt import adapt
from prunus.data import PackedTokens
from prunus.files import write_json
from prunus.layers import find_layers
from prunus.lr import linear_warmup_decay
from prunus.masks import Masks
from prunus.patterns import NM
from prunus.prepared import recomputed
from prunus.scores import wanda
from prunus.sharded import asked
from prunus.solvers import by_score, sparsegpt
from prunus.stream import stream
from prunus.train import train

RETRAINED = {"biases, norms": ["biases", "norms"], "mask_lora": ["mask_lora"], "full under masks": ["full"]}


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of the whole (without the first step of a training), and this rank's peak memory."""

    name: str
    seconds: float
    rate: float  # tokens a second, over all processes
    peak_bytes: int
    losses: list[float]


def build(args: argparse.Namespace, device: torch.device) -> OPTForCausalLM:
    """A few blocks of OPT-30B's shape, of random weights that are the same on every rank."""
    heads = max(1, round(56 * args.scale))
    width = heads * (128 if args.scale == 1 else 16)
    config = OPTConfig(
        vocab_size=50272 if args.scale == 1 else 512, hidden_size=width, ffn_dim=4 * width,
        num_hidden_layers=args.layers, num_attention_heads=heads, word_embed_proj_dim=width,
        max_position_embeddings=2048 if args.scale == 1 else 64, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    with torch.device(device):
        return OPTForCausalLM(config).to(torch.bfloat16).eval()


def tokens(model: OPTForCausalLM, samples: int, seed: int) -> Tensor:
    """Random windows of the model's own length."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    return torch.randint(4, config.vocab_size, (samples, config.max_position_embeddings), generator=generator)


def retrained(name: str, args: argparse.Namespace, device: torch.device) -> Row:
    """The time of `--steps` steps after a first one."""
    model = build(args, device)
    views = find_layers(model)
    pattern, masks = NM(2, 4), dict[str, Tensor]()
    for view in views:
        weight = model.get_parameter(view.parameter).detach()
        masks[view.parameter] = pattern.mask(weight.abs().float(), weight.numel() // 2, name=view.name)
    held = Masks(masks)
    held.apply_(model)
    kinds = RETRAINED[name]
    adaptation = adapt(model, kinds, masks=held, views=views, rank=16)
    packed = PackedTokens(tokens(model, 64, args.seed).flatten(), model.config.max_position_embeddings)
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-5), weight_decay=0.0)
    started = 0.0

    def begin(done: int, loss: float) -> None:
        nonlocal started
        if done == 1:
            started = time.perf_counter()

    with recomputed(model):
        trace = train(
            model, lambda step: packed.at(step, batch=args.batch, seed=args.seed), optimizer,
            linear_warmup_decay(args.steps + 1), steps=args.steps + 1, masks=held if kinds == ["full"] else None,
            precision="bf16", clip=1.0, report_every=1, on_step=begin,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    return Row(name, seconds, args.steps * args.batch * packed.length / seconds, trace.peak_bytes, trace.losses)


def pruned(name: str, args: argparse.Namespace, device: torch.device) -> Row:
    """The time of pruning all blocks."""
    model = build(args, device)
    windows = tokens(model, args.samples, args.seed + 1)
    solver = sparsegpt() if name == "SparseGPT 2:4" else by_score(wanda)
    _reset(device)
    started = time.perf_counter()
    streamed = stream(
        model, solver, NM(2, 4), 0.5, tokens=windows, gram=name == "SparseGPT 2:4", device=device,
        batch_size=args.calibrated, precision="bf16", shared=ranks.count() > 1,
    )  # fmt: skip
    _wait(device)
    seconds = time.perf_counter() - started
    assert streamed.masks.sparsity == 0.5
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Row(name, seconds, windows.numel() / seconds, peak, [])


def _reset(device: torch.device) -> None:
    ranks.wait()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.wait()


def table(rows: list[Row], alone: list[Row] | None) -> str:
    """The rows as a Markdown table, with the speed-up over one process where its rows are given."""
    how = "alone" if ranks.count() == 1 else f"{ranks.count()} {'sharded' if asked() else 'replicated'}"
    lines = ["| work | how | time | tokens/s | peak a GPU | speed-up | loss differs by |", "|" + " --- |" * 7]
    before = {row.name: row for row in alone or []}
    for row in rows:
        one = before.get(row.name)
        gain = f"{one.seconds / row.seconds:.2f}" if one else ""
        gaps = [abs(a - b) for a, b in zip(row.losses, one.losses, strict=False)] if one else []
        lines.append(
            f"| {row.name} | {how} | {row.seconds:.2f} s | {row.rate:,.0f} | {row.peak_bytes / 1e9:.1f} GB | {gain} | "
            f"{f'{max(gaps):.1e}' if gaps else ''} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure everything and, in the main process, print and write it."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--scale", type=float, default=1.0 if cuda else 0.02)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="windows of a step, over all processes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows, over all processes")
    parser.add_argument("--calibrated", type=int, default=4, help="windows that go through a block at once")
    parser.add_argument("--only", help="works of this name alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=Path, help="the JSON of one process, to compare with")
    args = parser.parse_args()
    device = ranks.join(torch.device(args.device))
    works = dict.fromkeys(RETRAINED, retrained) | dict.fromkeys(("Wanda 2:4", "SparseGPT 2:4"), pruned)
    if asked():  # pruning knows no sharding: it is the same with and without
        works = dict.fromkeys(RETRAINED, retrained)
    rows = [work(name, args, device) for name, work in works.items() if args.only in (None, name)]
    if ranks.is_main():
        alone = None if args.alone is None else [Row(**row) for row in json.loads(args.alone.read_text())]
        sys.stdout.write(table(rows, alone))
        if args.json is not None:
            write_json(args.json, [asdict(row) for row in rows])
    ranks.wait()
    ranks.leave()


if __name__ == "__main__":
    main()
