"""Time of a training step by stochastic Frank-Wolfe against SGD, eager and captured: K-support and spectral K-support.

    python benchmarks/frank_wolfe.py                                                        # ResNet-18, on the GPU
    python benchmarks/frank_wolfe.py --model resnet8 --batch-size 16 --steps 5 --device cpu   # scales down

What we aim at on a GPU: at most 1.3 times SGD's step for K-support, 2 times for spectral K-support. All in one process,
random 32x32 images, bf16 and channels-last on a GPU, SGD fused. Whole steps of `prunus.train`, in rounds in which every
optimizer runs once, so that a machine that slows down slows all; medians over rounds. `--operations` counts what the
optimizer's step alone launches, as torch dispatches it (views apart; a foreach call is one), which needs no GPU.
`--nuclear` adds the nuclear-norm baselines that decompose every layer in every step, eager and a few steps only:
proximal steps by full singular value decompositions, as published, and by Gram matrices, and the penalty by these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunus.data.images import Augment, ImageBatches, Images
from prunus.data.models import build_model
from prunus.frankwolfe.constrained import constrained_groups
from prunus.frankwolfe.proximal import NuclearNorm, NuclearSteps, ProximalSGD
from prunus.frankwolfe.sets import Ball, Initial, k_support, spectral_k_support
from prunus.frankwolfe.sfw import SFW
from prunus.layers import find_layers
from prunus.train import During
from prunus.train.train import classification_loss, train

WARM = 12  # steps before the clock: cuDNN chooses, state is made, the step is recorded
TARGETS = {"K-support": 1.3, "spectral K-support": 2.0}
VIEWS = "view _unsafe_view permute transpose t unsqueeze squeeze expand split split_with_sizes unbind select slice"


def balls(k: float) -> dict[str, Ball | None]:
    """Name -> set; None is SGD."""
    return {"SGD": None, "K-support": k_support(k), "spectral K-support": spectral_k_support(k)}


def network(arguments: argparse.Namespace) -> nn.Module:
    """A network with fresh weights, the same each time."""
    torch.manual_seed(0)
    model = build_model(arguments.model, classes=10).to(arguments.device)
    return model.to(memory_format=torch.channels_last) if cuda(arguments) else model


def optimizer_of(model: nn.Module, ball: Ball | None, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """SGD, or Frank-Wolfe in the ball."""
    if ball is None:
        return torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=cuda(arguments))
    made = SFW(
        constrained_groups(model, ball, Initial(10.0)), 1e-3, rescale="fast_gradient", capturable=cuda(arguments)
    )
    made.start_()
    return made


class Clock(During):
    """Starts when the steps that warm up are done."""

    def __init__(self, on_gpu: bool, warm: int) -> None:
        super().__init__()
        self.on_gpu, self.warm, self.started = on_gpu, warm, 0.0

    def after_step(self, step: int) -> None:
        """Look at the clock, once."""
        if step == self.warm - 1:
            self.started = now(self.on_gpu)


def now(on_gpu: bool) -> float:
    """Seconds, when the GPU has done what it was given."""
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def cuda(arguments: argparse.Namespace) -> bool:
    """Whether it runs on a GPU."""
    return torch.device(arguments.device).type == "cuda"


def baselines(model: nn.Module) -> dict[str, tuple[torch.optim.Optimizer, list[During]]]:
    """Name -> optimizer, and what takes part, of nuclear baselines that decompose in every step."""
    views = find_layers(model, exclude=["linear"])
    chosen = {view.parameter for view in views}
    parts = [[p for name, p in model.named_parameters() if (name in chosen) == inside] for inside in (True, False)]
    groups = [{"params": parts[0]}, {"params": parts[1], "strength": 0.0}]
    plain = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return {
        "nuclear steps, SVD": (ProximalSGD(groups, 1e-3, proximal="nuclear", strength=1e-3), []),
        "nuclear steps, Gram": (plain, [NuclearSteps(1e-3, views)]),
        "nuclear penalty, Gram": (plain, [NuclearNorm(1e-3, views)]),
    }


def seconds(arguments: argparse.Namespace, name: str, capture: bool, steps: int, warm: int = WARM) -> float:
    """Seconds of a step, the mean over the timed ones of one run."""
    on_gpu, model = cuda(arguments), network(arguments)
    generator, count = torch.Generator().manual_seed(0), 4 * arguments.batch_size
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8).to(arguments.device)
    labels = torch.randint(10, (count,), generator=generator).to(arguments.device)
    batches = ImageBatches(
        Images(pixels, labels, 10),
        batch_size=arguments.batch_size,
        seed=0,
        augment=Augment(crop=4, flip=True),
        channels_last=on_gpu,
    )
    clock, known = Clock(on_gpu, warm), balls(arguments.k)
    optimizer, taking = (optimizer_of(model, known[name], arguments), []) if name in known else baselines(model)[name]
    train(
        model,
        batches,
        optimizer,
        lambda _: 1.0,
        steps=warm + steps,
        loss=classification_loss(),
        during=[*taking, clock],
        precision="bf16" if on_gpu else "fp32",
        capture=capture,
        report_every=10**9,
    )
    return (now(on_gpu) - clock.started) / steps


class Operations(TorchDispatchMode):
    """Counts what is dispatched, but views."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in VIEWS.split():
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def operations(arguments: argparse.Namespace, ball: Ball | None) -> Counter[str]:
    """What the optimizer's third step dispatches."""
    model = network(arguments)
    optimizer = optimizer_of(model, ball, arguments)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for _ in range(2):
        optimizer.step()
    with Operations() as counted:
        optimizer.step()
    return counted.count


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50, help="timed steps in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--k", type=float, default=0.3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--nuclear", action="store_true", help="also time nuclear steps and penalties")
    parser.add_argument("--operations", action="store_true", help="count operations and time nothing")
    parser.add_argument("--out", type=Path, help="append the numbers to this file, a JSON line")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    device = torch.cuda.get_device_name() if cuda(arguments) else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(f"{arguments.model}, batch {arguments.batch_size}, {device}, torch {torch.__version__}\n")
    found: dict[str, Any] = {}
    if arguments.operations:
        for name, ball in balls(arguments.k).items():
            counted = operations(arguments, ball)
            found[name] = sum(counted.values())
            most = ", ".join(f"{count} {each}" for each, count in counted.most_common(6))
            sys.stdout.write(f"  {name:<20}{found[name]:>6} operations a step: {most}\n")
    else:
        for capture in (False, True) if cuda(arguments) else (False,):
            way = "captured" if capture else "eager"
            rounds = [
                {name: seconds(arguments, name, capture, arguments.steps) for name in balls(arguments.k)}
                for _ in range(arguments.rounds)
            ]
            medians = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
            found[way] = medians
            for name, value in medians.items():
                aim = f" (aim: at most {TARGETS[name]:g})" if name in TARGETS else ""
                ratio = value / medians["SGD"]
                sys.stdout.write(f"  {way:<9}{name:<22}{1000 * value:>9.2f} ms a step   {ratio:.2f} x SGD{aim}\n")
        for name in baselines(network(arguments)) if arguments.nuclear else ():
            value = seconds(arguments, name, False, 3, warm=2)
            found.setdefault("decomposing", {})[name] = value
            ratio = value / found["eager"]["SGD"]
            sys.stdout.write(f"  {'eager':<9}{name:<22}{1000 * value:>9.2f} ms a step   {ratio:.2f} x SGD\n")
    if arguments.out is not None:
        setting = {"model": arguments.model, "batch_size": arguments.batch_size, "device": device, "k": arguments.k}
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**setting, "torch": torch.__version__, **found}) + "\n")


if __name__ == "__main__":
    main()
