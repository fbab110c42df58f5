"""Images per second of training: the textbook loop, ours, ours captured as a CUDA graph, and several members at once.

    python benchmarks/training.py --model resnet18 --batch-size 512 --steps 200 --together 1 2 4
    python benchmarks/training.py --model resnet8 --batch-size 32 --steps 5 --device cpu       # scales down

Random 32x32 images, so only speed is measured: augmentation (crop, flip) on the device, SGD with momentum and weight
decay, bf16 and channels-last on a GPU. The textbook loop is written out below. All in one process; the first 10 steps
are not timed; the members of "together" are threads with a CUDA stream each, captured.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import nn

from prunus.blocks.compiled import compile_blocks_
from prunus.data.images import Augment, ImageBatches, Images
from prunus.data.models import build_model
from prunus.masks import Masks
from prunus.train import During
from prunus.train.train import classification_loss, train


def make(arguments: argparse.Namespace, seed: int) -> tuple[nn.Module, ImageBatches, torch.optim.Optimizer]:
    """A member: network, batches on the device, optimizer."""
    device = torch.device(arguments.device)
    torch.manual_seed(seed)
    model = build_model(arguments.model, classes=10).to(device)
    cuda = device.type == "cuda"
    channels_last = cuda and not arguments.channels_first
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    if arguments.compile:
        compile_blocks_(model)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (arguments.images, 3, 32, 32), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(10, (arguments.images,), generator=generator).to(device)
    batches = ImageBatches(
        Images(pixels, labels, 10),
        batch_size=arguments.batch_size,
        seed=seed,
        augment=Augment(crop=4, flip=True),
        channels_last=channels_last,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=cuda)
    return model, batches, optimizer


def textbook(
    model: nn.Module,
    batches: ImageBatches,
    optimizer: torch.optim.Optimizer,
    steps: int,
    cuda: bool,
    barrier: threading.Barrier,
) -> None:
    """The loop that everybody writes."""
    model.train()
    for step in range(steps):
        if step == 10:
            if cuda:
                torch.cuda.current_stream().synchronize()
            barrier.wait()
        x, y = batches(step)
        optimizer.zero_grad()
        with torch.autocast("cuda" if cuda else "cpu", dtype=torch.bfloat16, enabled=cuda):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


def ours(
    model: nn.Module,
    batches: ImageBatches,
    optimizer: torch.optim.Optimizer,
    steps: int,
    cuda: bool,
    barrier: threading.Barrier,
    **options: object,
) -> None:
    """The same steps by `train`."""
    options = {"precision": "bf16" if cuda else "fp32", "report_every": 10**9, **options}
    during = [Start(barrier, cuda)]
    train(model, batches, optimizer, lambda _: 1.0, steps=steps, loss=classification_loss(), during=during, **options)  # type: ignore[arg-type]


class Start(During):
    """After 10 steps, waits for the device and for the other members: from there on it is timed."""

    def __init__(self, barrier: threading.Barrier, cuda: bool) -> None:
        super().__init__()
        self.barrier, self.cuda = barrier, cuda

    def after_step(self, step: int) -> None:
        """Wait, once."""
        if step == 9:
            if self.cuda:
                torch.cuda.current_stream().synchronize()
            self.barrier.wait()


def masks_of(model: nn.Module) -> Masks:
    """Random masks of nine tenths of the convolutions."""
    weights = {name: p for name, p in model.named_parameters() if p.dim() == 4}
    return Masks({name: torch.rand_like(p) > 0.9 for name, p in weights.items()})


def rate_of(arguments: argparse.Namespace, run: Callable[..., None], count: int, cuda: bool) -> float:
    """Images per second of `count` members at once, a thread and a stream each, after 10 steps that are not counted."""
    members = [make(arguments, seed) for seed in range(count)]
    started: list[float] = []
    barrier = threading.Barrier(count, action=lambda: started.append(time.perf_counter()))

    def work(member: tuple[nn.Module, ImageBatches, torch.optim.Optimizer]) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if cuda else nullcontext()
        with stream:
            run(*member, 10 + arguments.steps, cuda, barrier)
            if cuda:
                torch.cuda.current_stream().synchronize()

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(work, member) for member in members]:
            future.result()
    return count * arguments.steps * arguments.batch_size / (time.perf_counter() - started[0])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--together", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--channels-first", action="store_true")
    parser.add_argument("--compile", action="store_true", help="blocks compiled by torch.compile, in every run")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    cuda = torch.device(arguments.device).type == "cuda"
    torch.backends.cudnn.benchmark = True
    runs: dict[str, Callable[..., None]] = {"textbook": textbook, "ours": ours}
    if arguments.compile:  # once, before threads share the programs
        rate_of(arguments, ours, 1, cuda)
    captured = partial(ours, capture=True) if cuda else ours
    if cuda:
        runs["ours, captured"] = captured
        runs["ours, captured, masked"] = lambda *member: captured(*member, masks=masks_of(member[0]))
    found = {name: rate_of(arguments, run, 1, cuda) for name, run in runs.items()}
    found |= {f"{count} at once": rate_of(arguments, captured, count, cuda) for count in arguments.together}
    device = torch.cuda.get_device_name() if cuda else "cpu"
    sys.stdout.write(f"{arguments.model}, batch {arguments.batch_size}, {device}, torch {torch.__version__}\n")
    for name, value in found.items():
        sys.stdout.write(f"  {name:<24}{value:>12,.0f} images/s   {value / found['textbook']:.2f} x textbook\n")
    if arguments.out is not None:
        settings = {"model": arguments.model, "batch_size": arguments.batch_size, "device": device}
        settings["compiled"] = arguments.compile
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**settings, "torch": torch.__version__, "images_per_second": found}) + "\n")


if __name__ == "__main__":
    main()
