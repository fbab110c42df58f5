"""Run every benchmark that follows the protocol of `claims.py`, and write docs/results/speed.md and speed.json.

    python benchmarks/all.py                         # all, on the GPU
    python benchmarks/all.py --only nm_mask hessian
    python benchmarks/all.py --device cpu --scale 0.02   # prints only: the results page has numbers of a GPU

Each script runs in a process of its own. One that fails is named on the page, and the others go on. With `--only`, what
the page had of the other scripts stays, if device and versions are the same.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from claims import Row, device_name, table

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
PAGE = """# Speed

Ours against the textbook algorithm, in one process, medians; made with `python benchmarks/all.py`. {device}, torch
{torch}, triton {triton}, commit `{commit}`, {date}. *Ratio* is textbook time over ours, *target* what we aim at.
*Floor* is the time that moving the bytes and doing the operations takes at the rates of a device copy and a large bf16
product, *x floor* ours over it. *Extra* is peak memory above what was allocated before. The numbers are in
[`speed.json`](speed.json).
"""


def scripts() -> list[Path]:
    """The scripts of this folder that have a function `measure`."""
    return [path for path in sorted(HERE.glob("*.py")) if _measures(path)]


def run(path: Path, options: list[str]) -> list[dict[str, Any]] | str:
    """The rows that a script measured, or what it said last before it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        done = subprocess.run(
            [sys.executable, str(path), "--json", str(out), *options], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.stderr.write(done.stderr)
            return done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        return json.loads(out.read_text(encoding="utf-8"))


def page(results: dict[str, Any]) -> str:
    """The results page: one section for each script."""
    parts = [PAGE.format(**results["setting"])]
    for name, found in results["scripts"].items():
        first = (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or name).partition(
            "\n"
        )
        parts.append(f"\n## {first[0].rstrip('.')}\n\n`benchmarks/{name}.py`\n\n")
        parts.append(f"Failed: {found}\n" if isinstance(found, str) else table([Row(**row) for row in found]))
    return "".join(parts)


def setting(device: str) -> dict[str, str]:
    """What the numbers depend on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
    ).stdout.strip()
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    date = datetime.date.today().isoformat()
    names = {"device": device_name(device), "torch": torch.__version__, "triton": triton}
    return {**names, "commit": commit or "unknown", "date": date}


def main() -> None:
    """Run, print, and on a GPU write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[path.stem for path in scripts()], metavar="SCRIPT")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := set(args.only) - {path.stem for path in scripts()}:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in scripts())}")
    options = ["--device", args.device] + ([] if args.scale is None else ["--scale", str(args.scale)])
    found: dict[str, Any] = {}
    for path in scripts():
        if path.stem in args.only:
            sys.stdout.write(f"\n{path.stem}\n")
            sys.stdout.flush()
            found[path.stem] = run(path, options)
    if torch.device(args.device).type == "cuda" and args.scale in (None, 1.0):
        write(args.out, {"setting": setting(args.device), "scripts": found})
    if failed := [name for name, rows in found.items() if isinstance(rows, str)]:
        sys.exit(f"failed: {', '.join(failed)}")


def write(folder: Path, results: dict[str, Any]) -> None:
    """speed.json and speed.md, with what an earlier run on the same device and versions measured besides."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "speed.json"
    same = ("device", "torch", "triton")
    if known.exists():
        old = json.loads(known.read_text(encoding="utf-8"))
        if all(old["setting"][key] == results["setting"][key] for key in same):
            there = {path.stem for path in scripts()}
            kept = {name: rows for name, rows in old["scripts"].items() if name in there}
            results = {**results, "scripts": dict(sorted({**kept, **results["scripts"]}.items()))}
    known.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (folder / "speed.md").write_text(page(results), encoding="utf-8")


def _measures(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in tree.body)


if __name__ == "__main__":
    main()
