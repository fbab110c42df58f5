"""What a second GPU brings: the same retraining and the same block-wise pruning, by one process and by several.

    accelerate launch --num_processes 2 benchmarks/two_gpus.py --modes alone,replicated,sharded     # all in one call
    torchrun --nproc-per-node 2 benchmarks/two_gpus.py --device cpu --scale 0.02 --steps 2 --modes alone,sharded  # tiny

Or one way a call, each with the time of starting Python:

    python benchmarks/two_gpus.py --layers 4 --json alone.json                # alone: the time that others divide
    accelerate launch --num_processes 2 benchmarks/two_gpus.py --layers 4 --alone alone.json             # replicated
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 benchmarks/two_gpus.py --layers 4      # sharded

Blocks of OPT-30B's shape with random weights (`--heads 32`: of OPT-6.7B's). Every way does the same work in all:
retraining on global batches of `--batch` windows (biases and norms, MaskLoRA, everything under masks), Wanda and
SparseGPT on `--samples` windows.
Within one call, "alone" means that each process does the whole by itself, all at once, and the main one's time counts.
`--capture` records retraining steps, with the averaging of gradients of replicas, which is worth most for small blocks:

    accelerate launch --num_processes 2 benchmarks/two_gpus.py --modes alone,replicated --heads 6 --layers 12 --capture

Every row is printed and, with `--json`, written when it is there; a work that fails (all processes alike) leaves a row
that says so, and the next ones go on. Rows have the speed-up over "alone" and the largest difference of any loss from
its, which rounding alone explains. Everything under masks holds 16 bytes a value and process, unless it is sharded:
four layers and the embeddings are 2.9 G values, 46 GB, and 69 GB with the gradients that replicas exchange.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import OPTConfig, OPTForCausalLM

from prunus.adapt.adapt import adapt
from prunus.blocks.recompute import recomputed
from prunus.data import PackedTokens
from prunus.layers import find_layers
from prunus.machine import ranks
from prunus.machine.files import write_json
from prunus.masks import Masks
from prunus.patterns import NM
from prunus.score import wanda
from prunus.solve import sparsegpt
from prunus.stream.stream import stream
from prunus.train.lr import linear_warmup_decay
from prunus.train.sharded import asked
from prunus.train.train import train

MODES = ("alone", "replicated", "sharded")
RETRAINED = {"biases, norms": ["biases", "norms"], "mask_lora": ["mask_lora"], "full under masks": ["full"]}


@dataclass(frozen=True)
class Row:
    """One measurement: seconds of the whole (without the first steps of a training), and this rank's peak memory."""

    name: str
    mode: str
    seconds: float
    rate: float  # tokens a second, over all processes
    peak_bytes: int
    losses: list[float]
    processes: int = 1
    error: str = ""


def build(args: argparse.Namespace, device: torch.device) -> OPTForCausalLM:
    """A few blocks of OPT's shape, of random weights that are the same on every rank."""
    heads = max(1, round(args.heads * args.scale))
    width = heads * (128 if args.scale == 1 else 16)
    config = OPTConfig(
        vocab_size=50272 if args.scale == 1 else 512, hidden_size=width, ffn_dim=4 * width,
        num_hidden_layers=args.layers, num_attention_heads=heads, word_embed_proj_dim=width,
        max_position_embeddings=2048 if args.scale == 1 else 64, dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    with torch.device(device):
        return OPTForCausalLM(config).to(torch.bfloat16).eval()  # pyright: ignore[reportArgumentType] - its stub


def tokens(model: OPTForCausalLM, samples: int, seed: int) -> Tensor:
    """Random windows of the model's own length."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    return torch.randint(4, config.vocab_size, (samples, config.max_position_embeddings), generator=generator)


def retrained(name: str, mode: str, args: argparse.Namespace, device: torch.device) -> Row:
    """The time of `--steps` steps after a first one, or after five, of which the last two are replays."""
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
    # fused, for otherwise its steps take memory of all values' size; capturable, for otherwise none can be recorded
    fused: dict[str, Any] = {"fused": True, "capturable": True} if device.type == "cuda" else {}
    capture = args.capture and mode != "sharded"
    first = 5 if args.capture else 1
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-5), weight_decay=0.0, **fused)
    started = 0.0

    def begin(done: int, loss: float) -> None:
        nonlocal started
        if done == first:
            started = time.perf_counter()

    steps = args.steps + first
    with recomputed(model):
        trace = train(
            model, lambda step: packed.at(step, batch=args.batch, seed=args.seed), optimizer,
            linear_warmup_decay(steps), steps=steps, masks=held if kinds == ["full"] else None,
            precision="bf16", clip=1.0, report_every=first, on_step=begin, shared=mode != "alone", capture=capture,
        )  # fmt: skip
    seconds = time.perf_counter() - started
    rate = args.steps * args.batch * packed.length / seconds
    return Row(name, mode, seconds, rate, trace.peak_bytes, trace.losses, ranks.count())


def pruned(name: str, mode: str, args: argparse.Namespace, device: torch.device) -> Row:
    """The time of pruning all blocks."""
    model = build(args, device)
    windows = tokens(model, args.samples, args.seed + 1)
    criterion = sparsegpt() if name == "SparseGPT 2:4" else wanda
    _reset(device)
    started = time.perf_counter()
    streamed = stream(
        model, criterion, NM(2, 4), 0.5, tokens=windows, device=device,
        batch_size=args.calibrated, precision="bf16", shared=mode != "alone",
    )  # fmt: skip
    _wait(device)
    seconds = time.perf_counter() - started
    assert streamed.masks.sparsity == 0.5
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return Row(name, mode, seconds, windows.numel() / seconds, peak, [], ranks.count())


def _reset(device: torch.device) -> None:
    ranks.wait()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    ranks.wait()


HEAD = "| work | how | time | tokens/s | peak a GPU | speed-up | loss differs by |\n" + "| --- " * 7 + "|\n"


def line(row: Row, alone: list[Row]) -> str:
    """The row in Markdown, with the speed-up over one process where its row is among `alone`."""
    how = row.mode if row.mode == "alone" else f"{row.processes} {row.mode}"
    if row.error:
        return f"| {row.name} | {how} | failed: {row.error} | | | | |\n"
    one = next((each for each in alone if each.name == row.name and not each.error and row.mode != "alone"), None)
    gain = f"{one.seconds / row.seconds:.2f}" if one else ""
    gaps = [abs(a - b) for a, b in zip(row.losses, one.losses, strict=False)] if one else []
    return (
        f"| {row.name} | {how} | {row.seconds:.2f} s | {row.rate:,.0f} | {row.peak_bytes / 1e9:.1f} GB | {gain} | "
        f"{f'{max(gaps):.1e}' if gaps else ''} |\n"
    )


def switch(mode: str) -> None:
    """What a launch says by its environment, said for the next works."""
    os.environ["ACCELERATE_USE_FSDP"] = "true" if mode == "sharded" else "false"
    os.environ["FSDP_VERSION"] = "2"
    AcceleratorState._reset_state()


def attempt(name: str, mode: str, args: argparse.Namespace, device: torch.device) -> Row:
    """The row of one work, also if it failed."""
    try:
        return (retrained if name in RETRAINED else pruned)(name, mode, args, device)
    except Exception as error:
        if not ranks.all_failed():
            raise  # the others wait where this process will not come: the launcher ends them
        return Row(name, mode, float("nan"), 0.0, 0, [], ranks.count(), f"{type(error).__name__}: {str(error)[:200]}")
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def compare(modes: list[str], args: argparse.Namespace, device: torch.device) -> list[Row]:
    """All works in these ways; the main process prints and writes each row at once."""
    rows = list[Row]()
    alone = [] if args.alone is None else [Row(**row) for row in json.loads(args.alone.read_text())]
    _tell(HEAD)
    for mode in modes:
        switch(mode)
        pruning = () if mode == "sharded" else ("Wanda 2:4", "SparseGPT 2:4")  # it knows no sharding
        for name in (*RETRAINED, *pruning):
            if args.only in (None, name):
                rows.append(attempt(name, mode, args, device))
                _tell(line(rows[-1], [*alone, *(row for row in rows if row.mode == "alone")]))
                if args.json is not None and ranks.is_main():
                    write_json(args.json, [asdict(row) for row in rows])
    return rows


def _tell(text: str) -> None:
    if ranks.is_main():
        sys.stdout.write(text)
        sys.stdout.flush()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modes", help="of " + ", ".join(MODES) + "; by default what the launch says")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--scale", type=float, default=1.0 if cuda else 0.02)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=56, help="of attention, 128 values wide")
    parser.add_argument("--batch", type=int, default=4, help="windows of a step, over all processes")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--samples", type=int, default=64, help="calibration windows, over all processes")
    parser.add_argument("--calibrated", type=int, default=4, help="windows that go through a block at once")
    parser.add_argument("--capture", action="store_true", help="record the steps of a retraining")
    parser.add_argument("--only", help="works of this name alone")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--alone", type=Path, help="the JSON of one process, to compare with")
    args = parser.parse_args(argv)
    launched = "alone" if ranks.count() == 1 else "sharded" if asked() else "replicated"
    args.modes = (args.modes or launched).split(",")
    strange = [mode for mode in args.modes if mode not in MODES]
    if strange:
        parser.error(f"no way {strange[0]!r}; they are {', '.join(MODES)}")
    if ranks.count() == 1 and args.modes != ["alone"]:
        parser.error(f"{', '.join(args.modes)} need several processes: accelerate launch --num_processes 2 ...")
    return args


def main() -> None:
    """Measure everything."""
    args = parse()
    device = ranks.join(torch.device(args.device))
    compare(args.modes, args, device)
    ranks.wait()
    ranks.leave()


if __name__ == "__main__":
    main()
