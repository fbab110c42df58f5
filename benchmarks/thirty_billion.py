"""30 billion parameters on one GPU: load, prune, retrain, merge, save; then SparseGPT block by block, resumable.

    python benchmarks/thirty_billion.py --folder /dev/shm/opt-30b              # OPT-30B's shape, bf16, one 80 GB GPU
    python benchmarks/thirty_billion.py --folder runs/tiny --scale 0.01        # tiny, on a CPU in seconds
    python benchmarks/thirty_billion.py --folder F --stages load,norms --json rows.json    # some stages, rows kept
    python benchmarks/thirty_billion.py --folder F --stages sparsegpt --drawn    # of weights that no disk holds

The weights are random, drawn on the device and written in eight shards side by side; real ones load the same way.
Stages: make (the checkpoint, kept if it is there), load, prune (Wanda, half of each row, 128 windows), norms
(biases and norms, 100 steps of 2 windows), masklora (the same, MaskLoRA of rank 16; both end with merging), save;
sparsegpt (again from the checkpoint, `--blocks` of them, each written to the work folder when it is done, so that a
repeated call goes on). Windows have 2,048 tokens; activations are recomputed in backward. Retraining or saving without
prune takes magnitude masks, which cost seconds, so that a long run may be cut into several calls. With fewer `--steps`
the row says how many, what one took after the first two, what these took more (programs are compiled), and what 100
would take: adapters, merging, that surplus, and 100 times the rate.

Every row is printed and, with `--json`, written when its stage ends, also that of a stage that failed; a later call
with the same file replaces rows of the same name and keeps the others.

The budget of an 80 GB card (85 GB in 10^9 bytes), on paper:

    weights 60.0 | windows between blocks 3.8 | or, when retraining: 2.8 kept for recomputing, 2 for one block,
    logits of a chunk 0.4, packed masks 3.7, adapters with Adam 1.6

and of the host: one shard's pages while loading, bool masks 29.6, what is being written. What would not fit, and is
therefore avoided: bool masks on the card (29.6), logits in full (4 x 0.8), a second copy of the model (60).
The folder must hold the checkpoint (60 GB); /dev/shm, on a host with 256 GB, spares the time of a disk. If it cannot
hold the saved model as well, the checkpoint is deleted before saving (`--keep` forbids that); `--work` puts SparseGPT's
finished blocks (64 GB in all) elsewhere. With `--drawn` SparseGPT reads no checkpoint: each weight is a stretch of
random numbers that are drawn once, on the device (a host of 128 GB holds the finished blocks, and not the checkpoint
besides). On the host, peaks count memory of the process, not pages of files.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import sys
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, OPTConfig, OPTForCausalLM

from prunus.adapt.adapt import adapt
from prunus.blocks.recompute import recomputed
from prunus.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, Stored
from prunus.data import PackedTokens
from prunus.layers import Layer, find_layers
from prunus.machine import hidden_folder
from prunus.machine.files import write_json
from prunus.masks import Masks
from prunus.patterns import Unstructured
from prunus.save import ShardWriter, save_tensors
from prunus.score import magnitude, wanda
from prunus.solve import sparsegpt
from prunus.stream.sources import Shards
from prunus.stream.stream import BlockReport, stream
from prunus.stream.work import Work
from prunus.train.lr import linear_warmup_decay
from prunus.train.train import train

STAGES = ("make", "load", "prune", "norms", "masklora", "save", "sparsegpt")


@dataclass(frozen=True)
class Stage:
    """One row of the table: wall time and the peaks while it ran; the GPU's is None without one."""

    name: str
    seconds: float
    gpu_bytes: int | None
    host_bytes: int
    note: str = ""


class Meter:
    """Times stages and takes their peak memory: the GPU's allocator, and this process's own resident pages."""

    def __init__(self, device: torch.device, path: Path | None) -> None:
        self.device, self.path, self.rows = device, path, list[Stage]()
        found = json.loads(path.read_text()) if path is not None and path.exists() else []
        self.kept = [Stage(**row) for row in found]  # of earlier calls

    @contextmanager
    def stage(self, name: str) -> Generator[list[str]]:
        """Context of one stage; what is appended to the list is its note."""
        cuda, notes = self.device.type == "cuda", list[str]()
        if cuda:
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        with _resident() as host:
            started = time.perf_counter()
            try:
                yield notes
                if cuda:
                    torch.cuda.synchronize(self.device)
            except BaseException as error:
                notes.append(f"failed: {type(error).__name__}: {str(error)[:200]}")
                raise
            finally:
                seconds = time.perf_counter() - started
                gpu = torch.cuda.max_memory_allocated(self.device) if cuda else None
                self._write(Stage(name, seconds, gpu, host[0], "; ".join(notes)))

    def _write(self, row: Stage) -> None:
        self.rows.append(row)
        say(_line(row))
        self.kept = [each for each in self.kept if each.name != row.name]
        if self.path is not None:
            write_json(self.path, [asdict(each) for each in (*self.kept, *self.rows)])


def say(line: str) -> None:
    """Print a line at once: a killed run keeps what was said."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


@contextmanager
def _resident() -> Generator[list[int]]:
    """The most memory of this process meanwhile, looked at ten times a second; pages of files are the system's."""
    peak, stop = [_anonymous()], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            peak[0] = max(peak[0], _anonymous())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def _anonymous() -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        anonymous = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        return 1024 * anonymous + _pinned()
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _pinned() -> int:
    """Pinned memory, which the system counts among the pages of shared files."""
    if not torch.cuda.is_initialized() or not hasattr(torch.cuda, "host_memory_stats"):
        return 0
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0))


def shape(scale: float) -> OPTConfig:
    """OPT-30B, every size times `scale` but at least tiny."""

    def sized(number: int, multiple: int) -> int:
        return max(1, round(number * scale / multiple)) * multiple

    heads = sized(56, 1)
    width = heads * 128 if scale == 1 else heads * max(8, sized(128, 8))
    return OPTConfig(
        vocab_size=sized(50272, 16), hidden_size=width, ffn_dim=4 * width, num_hidden_layers=max(2, sized(48, 1)),
        num_attention_heads=heads, word_embed_proj_dim=width, max_position_embeddings=max(32, sized(2048, 8)),
        dtype="bfloat16", dropout=0.0,
    )  # fmt: skip


def build_empty(config: Any) -> OPTForCausalLM:
    """The model without weights."""
    with init_empty_weights(include_buffers=False):
        model = OPTForCausalLM(config).to(torch.bfloat16)  # pyright: ignore[reportArgumentType] - its stub
    model.tie_weights()
    return model.eval()


def make(folder: Path, config: OPTConfig, device: torch.device, seed: int, threads: int) -> None:
    """A checkpoint of random weights: each thread draws its tensors on the device and writes a shard of them."""
    shapes = {name: parameter.shape for name, parameter in build_empty(config).named_parameters()}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    folder.mkdir(parents=True, exist_ok=True)
    for unfinished in folder.glob("part-*"):  # of a killed call
        shutil.rmtree(unfinished)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{folder} has {free / 1e9:.0f} GB free, the checkpoint takes {size / 1e9:.0f}: another --folder")
    parts = _shared_out(shapes, threads)

    def write(number: int) -> None:
        generator = torch.Generator(device).manual_seed(seed + number)
        room = max(shapes[name].numel() for name in parts[number])
        host = torch.empty(room, dtype=torch.bfloat16, pin_memory=device.type == "cuda")
        with ShardWriter(folder / f"part-{number}", max_shard_bytes=1e15) as writer:
            for name in parts[number]:
                value = _drawn(name, shapes[name], config.init_std, device, generator)
                writer.write(name, host[: value.numel()].view(value.shape).copy_(value))

    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(write, range(len(parts))))
    _join(folder, parts, size)
    config.save_pretrained(folder)  # last: a checkpoint with a config is whole


def _shared_out(shapes: dict[str, torch.Size], threads: int) -> list[list[str]]:
    """The names in about equal parts, each in the model's order."""
    parts, loads = [list[str]() for _ in range(min(threads, len(shapes)))], [0] * threads
    for name, shape in shapes.items():
        least = min(range(len(parts)), key=lambda part: loads[part])
        parts[least].append(name)
        loads[least] += shape.numel()
    return parts


def _drawn(name: str, shape: torch.Size, std: float, device: torch.device, generator: torch.Generator) -> Tensor:
    value = torch.empty(shape, dtype=torch.bfloat16, device=device)
    if value.ndim > 1:
        return value.normal_(0, std, generator=generator)
    return value.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)


def _join(folder: Path, parts: list[list[str]], size: int) -> None:
    """The parts' files as the shards of one checkpoint, with its index."""
    where: dict[str, str] = {}
    for number, names in enumerate(parts):
        file = f"model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        os.replace(folder / f"part-{number}" / SINGLE_NAME, folder / file)
        (folder / f"part-{number}").rmdir()
        where |= dict.fromkeys(names, file)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": size}, "weight_map": where})


def load(folder: Path, device: torch.device) -> OPTForCausalLM:
    """The checkpoint's model, its weights read straight to the device."""
    place: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    return OPTForCausalLM.from_pretrained(folder, dtype="auto", **place).eval()


def masks_of_magnitude(model: OPTForCausalLM) -> Masks:
    """Half of each row pruned in place, by magnitude: for calls that retrain without the stage prune."""
    masks, pattern = dict[str, Tensor](), Unstructured("row")
    for view in find_layers(model):
        weight = model.get_parameter(view.parameter).detach()
        pruned, mask = magnitude.solve(Layer(view.name, weight), pattern, weight.numel() // 2)
        weight.copy_(pruned)
        masks[view.parameter] = mask.cpu()
    return Masks(masks)


class Pace:
    """Says how a training goes, and what a step takes after the first two."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device, self.marks = name, device, list[tuple[int, float]]()

    def __call__(self, done: int, loss: float) -> None:
        """After so many steps, whose losses were read, so the device has finished them."""
        self.marks.append((done, time.perf_counter()))
        say(f"{self.name}: {done} steps, loss {loss:.3f}, {self.seconds:.2f} s a step")

    @property
    def seconds(self) -> float:
        """Seconds a step, from the second one on; nan before there are three."""
        (first, started), (last, ended) = self.marks[0], self.marks[-1]
        return (ended - started) / (last - first) if last > first else float("nan")

    def surplus(self, started: float) -> float:
        """Seconds that the first steps took more than as many later ones: programs are compiled, states are made."""
        first, ended = self.marks[0]
        return ended - started - first * self.seconds


def retrain(
    name: str, model: OPTForCausalLM, masks: Masks, kinds: list[str], args: argparse.Namespace, notes: list[str]
) -> None:
    """Train the subsets on random tokens with recomputed activations, and merge, which keeps every zero."""
    started = time.perf_counter()
    views = [view for view in find_layers(model) if view.parameter in masks]
    adaptation = adapt(model, kinds, masks=masks, views=views, rank=16)
    packed = PackedTokens(_tokens(model.config, 64, args.seed + 1).flatten(), model.config.max_position_embeddings)
    fused: dict[str, Any] = {"fused": True} if model.device.type == "cuda" else {}
    optimizer = torch.optim.AdamW(adaptation.param_groups(1e-4), weight_decay=0.0, **fused)
    pace = Pace(name, model.device)
    ready = time.perf_counter()
    with recomputed(model):
        trace = train(
            model, lambda step: packed.at(step, batch=2, seed=args.seed), optimizer, linear_warmup_decay(args.steps),
            steps=args.steps, precision="bf16", clip=1.0, report_every=2, on_step=pace,
        )  # fmt: skip
    trained = time.perf_counter()
    model.eval()
    adaptation.merge_()
    each, others = pace.seconds, ready - started + time.perf_counter() - trained
    notes.append(f"{adaptation.trainable / 1e6:.1f} M values, {args.steps} steps, {each:.3f} s each")
    once = pace.surplus(ready)
    notes.append(f"{2 * packed.length / each:,.0f} tokens/s, {others:.1f} s for adapters and merging")
    notes.append(f"{once:.1f} s more in the first two steps, which compile")
    if args.steps != 100:
        notes.append(f"100 steps would take {others + once + 100 * each:.0f} s")
    notes.append(f"loss {trace.losses[0]:.3f} to {trace.losses[-1]:.3f}")


def prune(model: OPTForCausalLM, args: argparse.Namespace, notes: list[str]) -> Masks:
    """Wanda, half of each row, block by block."""
    tokens = _tokens(model.config, args.samples, args.seed)
    streamed = stream(
        model, wanda, Unstructured("row"), 0.5, tokens=tokens, device=model.device,
        batch_size=args.batch, precision="bf16", on_block=_Blocks(),
    )  # fmt: skip
    kept, total = (
        sum(sum(getattr(report, which).values()) for report in streamed.reports) for which in ("kept", "total")
    )
    notes.append(f"sparsity {1 - kept / total:.4f}, {tokens.numel():,} tokens")
    return streamed.masks


class _Blocks:
    """Says every eighth block."""

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, report: BlockReport) -> None:
        self.seen += 1
        if self.seen % 8 == 0:
            say(f"{report.name}: {report.seconds:.2f} s")


def save(model: OPTForCausalLM, masks: Masks, folder: Path, args: argparse.Namespace, notes: list[str]) -> None:
    """The pruned model as a folder, tensor by tensor from the device."""
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    small = args.folder / "config"
    small.mkdir(exist_ok=True)
    shutil.copyfile(args.folder / "model" / "config.json", small / "config.json")
    with hidden_folder(folder):  # what a killed call left is gone: it needs the room
        pass
    needed = size + masks_bytes(masks) + 5e9 * args.scale  # a shard twice while it is closed
    if shutil.disk_usage(args.folder).free < needed and not args.keep:
        shutil.rmtree(args.folder / "model")
        notes.append("checkpoint deleted to make room")
    masks.check(model)
    saved = save_tensors(_stored(model), None, folder, masks=masks, info={}, source=small)
    notes.append(f"{saved.weight_bytes / 1e9:.2f} GB of weights")


def masks_bytes(masks: Masks) -> int:
    """What they take, packed."""
    return sum(mask.numel() for mask in masks.values()) // 8


def _stored(model: OPTForCausalLM) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()


class _Enough(Exception):
    """The blocks that were asked for are done."""


def drawn(model: OPTForCausalLM, folder: Path, device: torch.device, seed: int) -> Checkpoint:
    """A checkpoint for the model that lies on the device: stretches of random numbers, ones and zeros of its norms."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    most = max(shape.numel() for shape in shapes.values())
    numbers = torch.empty(2 * most, dtype=torch.bfloat16, device=device)
    numbers.normal_(0, model.config.init_std, generator=torch.Generator(device).manual_seed(seed))

    def value(name: str, shape: torch.Size) -> Tensor:
        if len(shape) > 1:
            start = zlib.crc32(name.encode()) % most
            return numbers[start : start + shape.numel()].view(shape)
        return _drawn(name, shape, 0.0, device, torch.Generator(device))

    file = folder / SINGLE_NAME
    found = {n: Stored(file, torch.bfloat16, tuple(shape), 0, value(n, shape)) for n, shape in shapes.items()}
    return Checkpoint(folder, (), found)


def solve(args: argparse.Namespace, device: torch.device, notes: list[str]) -> None:
    """SparseGPT of the checkpoint's first `--blocks` blocks: read, solved and written one by one."""
    checkpoint = args.folder / "model"
    model = build_empty(shape(args.scale) if args.drawn else AutoConfig.from_pretrained(checkpoint))
    source = Shards.of(model, drawn(model, checkpoint, device, args.seed) if args.drawn else checkpoint)
    layers = model.model.decoder.layers
    work = Work(args.work or args.folder / "work", f"sparsegpt-{args.seed}-{args.scale}").open()
    done = sum(work.has(f"model.decoder.layers.{index}") for index in range(len(layers)))
    reports = list[BlockReport]()

    def enough(report: BlockReport) -> None:
        reports.append(report)
        if len(reports) == args.blocks:
            raise _Enough

    with suppress(_Enough):
        stream(
            model, sparsegpt(), Unstructured("layer"), 0.5, tokens=_tokens(model.config, args.samples, args.seed),
            source=source, work=work, device=device, batch_size=args.batch,
            precision="bf16", on_block=enough,
        )  # fmt: skip
    solved = [report.seconds for report in reports[done:]]
    notes.append(f"{len(solved)} blocks solved, {done} found finished")
    if solved:
        mean = sum(solved) / len(solved)
        notes.append(f"{mean:.2f} s a block, {48 * mean:.0f} s for 48" if args.scale == 1 else f"{mean:.2f} s a block")


def _tokens(config: Any, samples: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, config.vocab_size, (samples, config.max_position_embeddings), generator=generator)


def run(args: argparse.Namespace) -> list[Stage]:
    """All stages that were asked for, in order."""
    device = torch.device(args.device)
    if device == torch.device("cuda"):
        device = torch.device("cuda", torch.cuda.current_device())
    checkpoint, pruned = args.folder / "model", args.folder / "pruned"
    meter = Meter(device, args.json)
    wanted: Callable[[str], bool] = lambda name: name in args.stages  # noqa: E731
    args.folder.mkdir(parents=True, exist_ok=True)
    if wanted("make") and not (checkpoint / "config.json").exists():
        with meter.stage("make") as notes:
            make(checkpoint, shape(args.scale), device, args.seed, args.threads)
            notes.append(f"{sum(path.stat().st_size for path in checkpoint.glob('*.safetensors')) / 1e9:.2f} GB")
    if wanted("sparsegpt") and args.first:
        with meter.stage("sparsegpt") as notes:
            solve(args, device, notes)
    if wanted("load"):
        with meter.stage("load") as notes:
            model = load(checkpoint, device)
            notes.append(f"{sum(each.numel() for each in model.parameters()) / 1e9:.2f} G parameters")
        masks = None
        if wanted("prune"):
            with meter.stage("prune") as notes:
                masks = prune(model, args, notes)
        for name, kinds in (("norms", ["biases", "norms"]), ("masklora", ["mask_lora"])):
            if wanted(name):
                masks = masks or masks_of_magnitude(model)
                with meter.stage(name) as notes:
                    retrain(name, model, masks, kinds, args, notes)
        if wanted("save"):
            masks = masks or masks_of_magnitude(model)
            with meter.stage("save") as notes:
                save(model, masks, pruned, args, notes)
        del masks, model
        gc.collect()  # SparseGPT needs the room, also of what refers to itself in circles
    if wanted("sparsegpt") and not args.first:
        with meter.stage("sparsegpt") as notes:
            if args.drawn or (checkpoint / "config.json").exists():
                solve(args, device, notes)
            else:
                notes.append("no checkpoint: it was deleted; give --first or more disk")
    return meter.rows


def _line(row: Stage) -> str:
    gpu = "" if row.gpu_bytes is None else f"{row.gpu_bytes / 1e9:.2f} GB"
    return f"| {row.name} | {row.seconds:.1f} s | {gpu} | {row.host_bytes / 1e9:.2f} GB | {row.note} |"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command's arguments."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the checkpoint and the pruned model lie")
    parser.add_argument("--work", type=Path, help="SparseGPT's finished blocks; by default in the folder")
    parser.add_argument("--stages", default=",".join(STAGES), help="of " + ", ".join(STAGES))
    parser.add_argument(
        "--first", action="store_true", help="SparseGPT before the others, while the checkpoint is there"
    )
    parser.add_argument("--drawn", action="store_true", help="SparseGPT of weights drawn on the device, not read")
    parser.add_argument("--keep", action="store_true", help="never delete the checkpoint")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--scale", type=float, default=1.0 if cuda else 0.01, help="factor on every size of the model")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--batch", type=int, default=4, help="windows that go through a block at once")
    parser.add_argument("--steps", type=int, default=100, help="of each retraining")
    parser.add_argument("--blocks", type=int, help="how many SparseGPT solves; all by default")
    parser.add_argument("--threads", type=int, default=8, help="shards of the checkpoint, written side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to which the rows are written as well")
    args = parser.parse_args(argv)
    args.stages = tuple(args.stages.split(","))
    strange = [name for name in args.stages if name not in STAGES]
    if strange:
        parser.error(f"no stage {strange[0]!r}; they are {', '.join(STAGES)}")
    return args


if __name__ == "__main__":
    arguments = parse()
    say("| stage | time | GPU, peak | host, peak | |\n| --- | --- | --- | --- | --- |")
    times = {row.name: row.seconds for row in run(arguments)}
    core = sum(seconds for name, seconds in times.items() if name not in ("make", "sparsegpt"))
    say(f"| load to save | {core:.1f} s | | | scale {arguments.scale:g}, {arguments.steps} steps each |")
