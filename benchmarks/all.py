"""Run every benchmark that follows the protocol of `claims.py`, and write docs/results/speed.md and speed.json.

    python benchmarks/all.py                         # all, on the GPU
    python benchmarks/all.py --only nm_mask hessian
    python benchmarks/all.py --device cpu --scale 0.02   # prints only: the results page has numbers of a GPU
    python benchmarks/all.py --from FOLDER           # the page from files NAME.json that scripts wrote with --json

Each script runs in a process of its own. One that fails is named on the page, and the others go on. With `--only`, what
the page had of the other scripts stays, if device and versions are the same.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from claims import Row, table

from prunus.machine import read_json, write_json

HERE = Path(__file__).parent
RESULTS = HERE.parent / "docs" / "results"
SAME = ("device", "torch", "triton")  # of all numbers of a page
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


def run(path: Path, options: list[str]) -> dict[str, Any] | str:
    """What a script wrote (setting, complete, rows), or what it said last before it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        done = subprocess.run(
            [sys.executable, str(path), "--json", str(out), *options], stderr=subprocess.PIPE, text=True
        )
        if done.returncode:
            sys.stderr.write(done.stderr)
            return done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        return read_json(out)


def page(results: dict[str, Any]) -> str:
    """The results page: one section for each script."""
    parts = [PAGE.format(**results["setting"])]
    for name, found in results["scripts"].items():
        first = (ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text(encoding="utf-8"))) or name).partition(
            "\n"
        )
        host = f"; host: {results['hosts'][name]}" if name in results.get("hosts", {}) else ""
        parts.append(f"\n## {first[0].rstrip('.')}\n\n`benchmarks/{name}.py`{host}\n\n")
        parts.append(f"Failed: {found}\n" if isinstance(found, str) else table([Row(**row) for row in found]))
        parts.append("\nStopped before its last row.\n" if name in results.get("stopped", []) else "")
    missing = [path.stem for path in scripts() if path.stem not in results["scripts"]]
    if missing:
        parts.append(f"\n## Not measured on this device yet\n\n{', '.join(f'`{name}`' for name in missing)}\n")
    return "".join(parts)


def read(folder: Path, commit: str | None) -> dict[str, dict[str, Any]]:
    """Script -> what it wrote to `folder`/NAME.json, at full size; `commit` stands in where a file has none.

    Raises: ValueError for a file that has no setting, is of a smaller size, or of another device or version.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in (folder / f"{script.stem}.json" for script in scripts()):
        if not path.exists():
            continue
        wrote = read_json(path)
        if not isinstance(wrote, Mapping) or "setting" not in wrote:
            raise ValueError(f"{path} does not say what its rows were measured on; run the script again")
        first = next(iter(found.values()), wrote)["setting"]
        for key, here in wrote["setting"].items():
            if (key == "scale" and here != 1) or (key in SAME and here != first[key]):
                raise ValueError(f"{path} has {key} {here}, the page {1 if key == 'scale' else first[key]}")
        if wrote["setting"]["commit"] == "unknown" and commit:
            wrote["setting"]["commit"] = commit
        found[path.stem] = wrote
    if not found:
        raise ValueError(f"{folder} has no NAME.json of a benchmark: write them with --json")
    return found


def joined(found: Mapping[str, dict[str, Any] | str]) -> dict[str, Any]:
    """The results of several scripts, with the setting of all: their commits, and the last date."""
    settings = {name: wrote["setting"] for name, wrote in found.items() if not isinstance(wrote, str)}
    commits = dict.fromkeys(each["commit"] for each in settings.values())
    rows = {name: wrote if isinstance(wrote, str) else wrote["rows"] for name, wrote in found.items()}
    stopped = [name for name, wrote in found.items() if not isinstance(wrote, str) and not wrote["complete"]]
    hosts = {name: each["host"] for name, each in settings.items() if "host" in each}
    common = {key: next(iter(settings.values()))[key] for key in SAME}
    last = {"commit": ", ".join(commits), "date": max(each["date"] for each in settings.values())}
    return {"setting": {**common, **last}, "scripts": rows, "stopped": stopped, "hosts": hosts}


def main() -> None:
    """Run, print, and on a GPU write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[path.stem for path in scripts()], metavar="SCRIPT")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--from", type=Path, dest="folder", help="run nothing; make the page from these files")
    parser.add_argument("--commit", help="with --from: the commit of files that were written outside a repository")
    args = parser.parse_args()
    if args.folder is not None:
        write(args.out, joined(read(args.folder, args.commit)))
        return
    if unknown := set(args.only) - {path.stem for path in scripts()}:
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(p.stem for p in scripts())}")
    options = ["--device", args.device] + ([] if args.scale is None else ["--scale", str(args.scale)])
    found: dict[str, Any] = {}
    for path in scripts():
        if path.stem in args.only:
            sys.stdout.write(f"\n{path.stem}\n")
            sys.stdout.flush()
            found[path.stem] = run(path, options)
    measured = any(not isinstance(wrote, str) for wrote in found.values())
    if measured and torch.device(args.device).type == "cuda" and args.scale in (None, 1.0):
        write(args.out, joined(found))
    if failed := [name for name, rows in found.items() if isinstance(rows, str)]:
        sys.exit(f"failed: {', '.join(failed)}")


def write(folder: Path, results: dict[str, Any]) -> None:
    """speed.json and speed.md, with what an earlier run on the same device and versions measured besides."""
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "speed.json"
    if known.exists():
        old = read_json(known)
        if all(old["setting"][key] == results["setting"][key] for key in SAME):
            there = {path.stem for path in scripts()}
            kept = {name: rows for name, rows in old["scripts"].items() if name in there}
            stopped = [name for name in old.get("stopped", []) if name in kept and name not in results["scripts"]]
            commits = dict.fromkeys(", ".join(each["setting"]["commit"] for each in (old, results)).split(", "))
            results = {
                "setting": {**results["setting"], "commit": ", ".join(commits)},
                "scripts": dict(sorted({**kept, **results["scripts"]}.items())),
                "stopped": stopped + results.get("stopped", []),
                "hosts": {**old.get("hosts", {}), **results.get("hosts", {})},
            }
    write_json(known, results)
    (folder / "speed.md").write_text(page(results), encoding="utf-8")


def _measures(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == "measure" for node in tree.body)


if __name__ == "__main__":
    main()
