"""Images per second of m members of one network: alone one after another, in threads, and stacked into one by vmap.

    python benchmarks/stacked.py --models resnet18 resnet20 --members 3 5 10 --steps 60 --out stacked.jsonl
    python benchmarks/stacked.py --models resnet8 --members 3 --batch-size 32 --steps 10 --device cpu     # scales down

Batches, optimizer and precision are those of `benchmarks/training.py`; images of all members together; the first 10
steps are not timed. On a GPU the first two ways are captured as CUDA graphs, and stacked both is and is not. A way that
runs out of memory, or that cannot be captured, says so in place of a number.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from training import Start, make, ours, rate_of

from prunus.train.stacked import Stacked, member_batches, together
from prunus.train.train import classification_loss, train


def stacked_rate(arguments: argparse.Namespace, count: int, cuda: bool, *, capture: bool) -> float:
    """Images per second of `count` members as one vectorised network."""
    members = [make(arguments, seed) for seed in range(count)]
    stacked = Stacked([member[0] for member in members])
    groups = [{"params": list(member[0].parameters())} for member in members]
    optimizer = torch.optim.SGD(groups, lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=cuda)
    started: list[float] = []
    barrier = threading.Barrier(1, action=lambda: started.append(time.perf_counter()))
    with torch.cuda.stream(torch.cuda.Stream()) if cuda else nullcontext():
        train(
            stacked,
            member_batches([member[1] for member in members]),
            optimizer,
            lambda _: 1.0,
            steps=10 + arguments.steps,
            loss=together(classification_loss()),  # type: ignore[arg-type]
            during=[Start(barrier, cuda)],
            precision="bf16" if cuda else "fp32",
            report_every=10**9,
            capture=capture,
        )
        if cuda:
            torch.cuda.current_stream().synchronize()
    return count * arguments.steps * arguments.batch_size / (time.perf_counter() - started[0])


def tried(measure: Callable[[], float]) -> float | str:
    """The rate, or why there is none."""
    try:
        return measure()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:80]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def ways(arguments: argparse.Namespace, count: int, cuda: bool) -> dict[str, Callable[[], float]]:
    """Name -> what measures it."""

    def captured(*member: object, **options: object) -> None:
        ours(*member, capture=cuda, **options)  # type: ignore[arg-type]

    found: dict[str, Callable[[], float]] = {
        "one after another": lambda: rate_of(arguments, captured, 1, cuda),
        "in threads": lambda: rate_of(arguments, captured, count, cuda),
        "stacked": lambda: stacked_rate(arguments, count, cuda, capture=False),
    }
    if cuda:
        found["stacked, captured"] = lambda: stacked_rate(arguments, count, cuda, capture=True)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet18", "resnet20"])
    parser.add_argument("--members", type=int, nargs="+", default=[3, 5, 10])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--channels-first", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.set_defaults(compile=False)  # `make` asks; vmap goes through no compiled block
    arguments = parser.parse_args()
    cuda = torch.device(arguments.device).type == "cuda"
    torch.backends.cudnn.benchmark = True
    device = torch.cuda.get_device_name() if cuda else f"cpu, {torch.get_num_threads()} threads"
    for model in arguments.models:
        arguments.model = model
        for count in arguments.members:
            sys.stdout.write(f"{arguments.model}, {count} members, batch {arguments.batch_size}, {device}\n")
            found = {name: tried(measure) for name, measure in ways(arguments, count, cuda).items()}
            base = found["one after another"]
            for name, value in found.items():
                if isinstance(value, str) or isinstance(base, str):
                    sys.stdout.write(f"  {name:<20}{value}\n")
                else:
                    sys.stdout.write(f"  {name:<20}{value:>12,.0f} images/s   {value / base:.2f} x\n")
            sys.stdout.flush()
            if arguments.out is not None:
                settings = {"model": arguments.model, "members": count, "batch_size": arguments.batch_size}
                line = {**settings, "device": device, "torch": torch.__version__, "images_per_second": found}
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
