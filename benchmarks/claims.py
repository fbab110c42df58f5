"""What every benchmark of a claim about speed shares: the row it returns, how it is timed, what the device could do.

A script of this folder that follows the protocol has a function `measure` and ends with `main`:

    def measure(args: argparse.Namespace) -> Iterator[Row]: ...      # args: device, scale, repeats, seed
    if __name__ == "__main__":
        main(__doc__, measure)

Rows are written as they come, so that a script that is stopped leaves those it had. Ours and the textbook algorithm run
in that one function, in one process. `sized` scales the sizes down, so that the same script runs on a CPU; `cost` times
and takes the extra memory; `floor_ms` is what bytes and operations alone take. `all.py` finds the scripts by their
`measure` and runs each in a process of its own.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from prunus.machine import write_json

__all__ = ["Cost", "Row", "cost", "floor_ms", "main", "parse", "setting", "sized", "table"]

_FLUSH = 1 << 28  # bytes written between two timed runs, so that none finds its input in the cache


@dataclass(frozen=True)
class Row:
    """One line of the results: what was done at which shape, how long ours and the textbook algorithm took.

    name, shape: "2:4 mask", "28672 x 7168 bfloat16".
    against: what the reference is, in a few words.
    ours_ms, reference_ms: medians; None for a reference that cannot run (say why in `note`).
    floor_ms: what moving the bytes and doing the operations takes at the device's own rates; None if there is none.
    extra_bytes, reference_extra_bytes: peak memory above what was allocated before; None where it is not measured.
    target: the ratio reference / ours that is aimed at; None if none is. "At most 1.15 times as long" is 1 / 1.15.
    note: anything else, in one sentence: tokens per second, errors, why a number is missing.
    """

    name: str
    shape: str
    against: str
    ours_ms: float
    reference_ms: float | None = None
    floor_ms: float | None = None
    extra_bytes: int | None = None
    reference_extra_bytes: int | None = None
    target: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """reference / ours: how many times faster ours is."""
        return None if self.reference_ms is None else self.reference_ms / self.ours_ms


@dataclass(frozen=True)
class Cost:
    """Median milliseconds of a call, and peak bytes above what was allocated before it (None on a CPU)."""

    ms: float
    extra_bytes: int | None


def parse(doc: str | None, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments that all scripts take: --device, --scale, --repeats, --seed, --json."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--scale", type=float, help="factor on the sizes; by default 1 on a GPU, 1/28 on a CPU")
    parser.add_argument("--repeats", type=int, help="timed runs; the median counts. By default 20 on a GPU, 3 on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the rows, and what they were measured on")
    args = parser.parse_args(argv)
    on_gpu = torch.device(args.device).type == "cuda"
    args.scale = args.scale or (1.0 if on_gpu else 1 / 28)
    args.repeats = args.repeats or (20 if on_gpu else 3)
    return args


def main(doc: str | None, measure: Callable[[argparse.Namespace], Iterable[Row]]) -> None:
    """Measure, print the table row by row, and write `--json` after each."""
    args = parse(doc)
    found = {"setting": setting(args), "complete": False, "rows": []}
    rows: list[Row] = []

    def keep(found: dict[str, object]) -> None:
        if args.json is not None:
            write_json(args.json, found)

    where = f"{device_name(args.device)}, torch {torch.__version__}, scale {args.scale:g}"
    sys.stdout.write(f"{where}, host {found['setting']['host']}\n{table([])}")
    sys.stdout.flush()
    for row in measure(args):
        rows.append(row)
        sys.stdout.write(table([row], head=False))
        sys.stdout.flush()
        keep({**found, "rows": [asdict(row) for row in rows]})
    keep({**found, "complete": True, "rows": [asdict(row) for row in rows]})


def setting(args: argparse.Namespace) -> dict[str, str | float]:
    """What the numbers depend on: device, scale, versions, commit, date, and what the host was busy with before."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "device": device_name(args.device),
        "scale": args.scale,
        "torch": torch.__version__,
        "triton": triton,
        "commit": done.stdout.strip() or "unknown",
        "date": datetime.date.today().isoformat(),
        "host": f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before it began",
    }


def sized(number: int, args: argparse.Namespace, multiple: int = 64) -> int:
    """A size at full scale, scaled and rounded to a multiple (at least one)."""
    return max(1, round(number * args.scale / multiple)) * multiple


def cost(run: Callable[[], object], args: argparse.Namespace, *, repeats: int | None = None) -> Cost:
    """What one call costs after a warm-up; the result is dropped before the next call.

    repeats: instead of `args.repeats`, for a reference that takes seconds.
    """
    if torch.device(args.device).type != "cuda":
        return Cost(statistics.median(_seconds(run) for _ in range(repeats or args.repeats)) * 1e3, None)
    run()  # compiles, and makes handles
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    return Cost(statistics.median(_event_ms(run) for _ in range(repeats or args.repeats)), extra)


def floor_ms(args: argparse.Namespace, *, moved: int = 0, operations: int = 0) -> float:
    """The larger of the times for `moved` bytes (read plus written) and for `operations` of bf16 matrix products.

    The rates are those of a device copy and a large product, measured once in this process.
    """
    device = torch.device(args.device)
    by_bytes = moved / _bytes_per_ms(device) if moved else 0.0
    return max(by_bytes, operations / _operations_per_ms(device) if operations else 0.0)


def device_name(device: str) -> str:
    """The GPU's name, or "CPU"."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"


def table(rows: Sequence[Row], *, head: bool = True) -> str:
    """The rows as a Markdown table, or without its first two lines."""
    names = "work, shape, ours, textbook, ratio, target, floor, x floor, extra, textbook extra, note"
    columns = names.split(", ")
    lines = [*([columns, ["---"] * len(columns)] if head else []), *(_cells(row) for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cells(row: Row) -> list[str]:
    note = "; ".join(part for part in (f"against {row.against}" if row.against else "", row.note) if part)
    return [
        row.name,
        row.shape,
        _ms(row.ours_ms),
        _ms(row.reference_ms),
        "" if row.ratio is None or math.isnan(row.ratio) else f"{row.ratio:.3g}",
        "" if row.target is None else f"{row.target:.3g}",
        _ms(row.floor_ms),
        "" if not row.floor_ms or math.isnan(row.ours_ms) else f"{row.ours_ms / row.floor_ms:.3g}",
        _gigabytes(row.extra_bytes),
        _gigabytes(row.reference_extra_bytes),
        note,
    ]


def _ms(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.3g} ms"


def _gigabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e9:.2f} GB"


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def _event_ms(run: Callable[[], object]) -> float:
    torch.empty(_FLUSH, dtype=torch.int8, device="cuda").zero_()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop)


@cache
def _bytes_per_ms(device: torch.device) -> float:
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.randint(127, (size,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_ms(lambda: target.copy_(source), device)


@cache
def _operations_per_ms(device: torch.device) -> float:
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best_ms(lambda: left @ right, device)


def _best_ms(run: Callable[[], object], device: torch.device) -> float:
    run()
    if device.type == "cuda":
        return min(_event_ms(run) for _ in range(10))
    return min(_seconds(run) for _ in range(5)) * 1e3
