"""Results on the terminal: the tables each command ends with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from prunus.jobs import Outline, kind_of, size_in_words, spread
from prunus.machine import counted
from prunus.measure import HEADLINES, headline
from prunus.recipe import rows as rows_of_names
from prunus.report import print_table
from prunus.run.inspect import KEEPING, Inspection, Row

__all__ = [
    "SOUP_COLUMNS",
    "classifier_rows",
    "grid_rows",
    "language_rows",
    "retrainings",
    "show_evaluation",
    "show_grid",
    "show_inspection",
    "show_names",
    "show_outline",
    "show_result",
    "show_run",
    "show_soup",
    "show_speed",
    "show_sweep",
    "soup_rows",
    "speed_rows",
]


def show_result(result: Mapping[str, Any], out: Path) -> None:
    """The table of one compression: a row a stage, a column a text, and where everything was written."""
    print_table(language_rows(result), title=str(result["model"]))
    _show_head(result)
    _show_tasks(result.get("zero_shot", {}))
    show_speed(result.get("speed", {}))
    for name, found in retrainings(result).items():
        speed = f"{found['tokens_per_second']:,.0f} tokens/s"
        _note(f"{name}: {found['trainable']:,} parameters trained ({100 * found['share']:.3f} %), {speed}")
    _note(f"{result['seconds']:.0f} s on {result['device']}. Picture: {out / 'report.png'}")
    if "saved" in result:
        size = result.get("size", {"weight_bytes": 1, "dense_bytes": 1})
        share = size["weight_bytes"] / size["dense_bytes"]
        much = "as large as before" if share >= 1 else f"of {share:.1%} of the bytes before"
        _note(f"Model: {result['saved']}, in files {much} (its README.md says why)")


def language_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a stage, a column a text."""
    perplexity: Mapping[str, Mapping[str, float]] = result["perplexity"]
    zeros = f"{100 * result['pruning']['sparsity']:.1f} %"
    return [
        {
            "stage": stage,
            **{f"perplexity, {text}": value for text, value in found.items()},
            "zeros": "0 %" if stage in ("dense", "shrunk") else zeros,
        }
        for stage, found in perplexity.items()
    ]


def show_outline(plan: Outline, out: Path) -> None:
    """The tables of a dry run."""
    if plan.layers:
        print_table(plan.layers, title="layers that are pruned")
    print_table([{"what": what, "plan": how} for what, how in plan.rows.items()], title="plan")
    files = {f"{out}/{name}": size_in_words(size) for name, size in plan.files.items()}
    print_table([{"file": name, "about": size} for name, size in files.items()], title="files")
    _note("Nothing was computed or written. Memory and sizes are estimates.")


def retrainings(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What was trained -> its numbers."""
    found = result.get("retraining", {})
    return {", ".join(found["train"]): found} if "train" in found else dict(found)


def show_evaluation(model: str, numbers: Mapping[str, Any]) -> None:
    """The table of one evaluation, of a language model or of a classifier."""
    measured = next((numbers[name] for name in HEADLINES if name in numbers), None)
    if measured is not None:
        print_table([_measured(measured)], title=model)
        _show_corrupted(numbers.get("corrupted", {}))
        return
    print_table([{"data": name, "perplexity": value} for name, value in numbers["perplexity"].items()], title=model)
    _show_head(numbers)
    _show_tasks(numbers.get("zero_shot", {}))


def speed_rows(found: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a model: tokens a second, and times the first one's; memory and files."""
    first = next(iter(found.values()))
    return [
        {
            "model": name,
            **{phase: f"{row[phase]:,.4g}, {row[phase] / first[phase]:.2f}×" for phase in ("prefill", "decode")},
            "weights, MB": row["weights"] / 1e6,
            "memory, MB": row["peak"] / 1e6 if row["peak"] else None,
            **({"file, MB": row["file"] / 1e6} if "file" in row else {}),
            "spread, %": 100 * row["spread"],
        }
        for name, row in found.items()
    ]


def show_speed(found: Mapping[str, Mapping[str, Any]]) -> None:
    """The table of measured speeds."""
    if found:
        print_table(speed_rows(found), title="measured speed, tokens a second")


def _show_head(result: Mapping[str, Any]) -> None:
    if result.get("head"):
        _note(f"At the head of each window, as the tokenizer says: {result['head']}")


def _show_tasks(tasks: Mapping[str, Mapping[str, Any]]) -> None:
    if tasks:
        print_table([{"task": task, **found} for task, found in tasks.items()], title="zero-shot")


def show_inspection(path: Path, found: Inspection, *, every: bool = False) -> None:
    """The table of a saved model's weights, a row a kind or, if asked, a row for every one, and its totals below."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        name = row.name if every else kind_of(row.name)
        alike.setdefault((name, " x ".join(map(str, row.shape)), row.dtype, row.pattern), []).append(row)
    rows = [
        {
            "weight": name,
            **({} if every else {"count": len(group)}),
            "shape": shape,
            "dtype": dtype,
            "zeros": _range([row.sparsity for row in group]),
            "pattern": pattern,
        }
        for (name, shape, dtype, pattern), group in alike.items()
    ]
    print_table(rows, title=str(path))
    _note(
        f"{found.entries:,} values in {found.bytes / 1e6:,.1f} MB, {100 * found.sparsity:.2f} % zeros; "
        f"{len(found.pruned)} pruned weights with {100 * found.pruned_sparsity:.2f} % zeros"
    )
    losing = sorted({row.dtype for row in found if row.dtype not in KEEPING}) if path.suffix == ".gguf" else []
    if losing:
        _note(f"{', '.join(losing)} does not keep zeros as zeros: convert to F16, BF16, Q8_0, Q5_0 or Q4_0")


def show_names() -> None:
    """What recipes may name, a table a kind."""
    found: dict[str, list[dict[str, str]]] = {}
    for row in rows_of_names():
        found.setdefault(row.pop("kind"), []).append(row)
    for kind, rows in found.items():
        print_table(rows, title=kind)


def _range(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.2f}" for share in (min(shares), max(shares)))
    return f"{low} %" if low == high else f"{low} to {high} %"


def show_run(result: Mapping[str, Any], out: Path) -> None:
    """The table of one classifier run: a row a stage, and where everything was written."""
    of = "texts" if "texts" in result else "images"
    print_table(classifier_rows(result), title=f"{result['model']}, {result['measured_on']} {of}")
    _show_corrupted(result.get("corrupted", {}))
    speed = f"{result['images_per_second']:,.0f} {of}/s"
    _note(f"{counted(result['epochs'], 'epoch', '.4g')}, {result['seconds']:.0f} s on {result['device']}, {speed}.")
    if "left_of_start" in result:
        _note(f"Frank-Wolfe left {100 * result['left_of_start']:.3g} % of the initialisation: the product of 1 - step.")
    if "speedup" in result:
        smaller = "and the file is smaller" if "left_alone" in result else "in theory; the file is no smaller"
        _note(f"{result['speedup']:.2f} times fewer multiplications {smaller}.")
    _note(f"Network: {out / 'model.safetensors'}; numbers: {out / 'result.json'}; picture: {out / 'report.png'}")


def classifier_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row a stage."""
    zeros = f"{100 * result['sparsity']:.2f} %"
    return [
        {
            "stage": stage,
            **{key: value for key, value in _measured(found).items() if key not in ("its maximum", "worst class")},
            "zeros": "0 %" if stage == "dense" else zeros,
        }
        for stage, found in result["stages"].items()
    ]


def show_sweep(result: Mapping[str, Any], out: Path) -> None:
    """The table of a sweep: a row a point, below it what was left alone and where everything was written."""
    from prunus.vision import rows_of

    print_table(rows_of(result), title=f"{result['model']}, {result['measured_on']} images, accuracy in %")
    _note(
        f"Latency: {result['timed_images']} images, measured on {result['device']}. Zeros alone save no time there; "
        "their operations are counted in theory."
    )
    for kind in dict.fromkeys(point["kind"] for point in result["points"]):
        alone = [set[str](point["left_alone"]) for point in result["points"] if point["kind"] == kind]
        always, ever = sorted(set.intersection(*alone)), set.union(*alone)
        if ever:
            some = f"; {len(ever) - len(always)} more at some rates" if len(ever) > len(always) else ""
            _note(f"{kind}: {', '.join(always) or 'no layer'} left alone at every rate{some}. Reasons: sweep.json")
    _note(f"Numbers: {out / 'sweep.json'}; table: {out / 'table.md'}; picture: {out / 'sweep.png'}")


def show_soup(result: Mapping[str, Any], out: Path) -> None:
    """The table of one soup: a row for it and for each that it is compared with, and what all of them cost."""
    print_table(soup_rows(result), title=f"{result['model']}, {result['measured_on']} images")
    _note(SOUP_COLUMNS)
    _note(f"{result['seconds']:.0f} s on {result['device']}. Pictures: {out}/*.png; numbers: {out / 'result.json'}")
    _note(f"Network: {out / 'model.safetensors'}; its members are in {out / 'members'}, which may be deleted.")


SOUP_COLUMNS = (
    "epochs: of all training that a row takes, the dense one included. inference: operations, of the dense ones."
)


def soup_rows(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for a soup and for each that it is compared with."""
    return [
        {
            "run": row["row"],
            "accuracy": _percent(row["accuracy"]),
            "loss": row["loss"],
            "zeros": f"{100 * row['sparsity']:.1f} %",
            "epochs": row["epochs"],
            "inference": f"{100 * row['inference']:.1f} %",
            **_on_corrupted(row, result),
        }
        for row in result["rows"]
    ]


def _on_corrupted(row: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, str | None]:
    """The mean over corrupted sets, where they were measured."""
    if "corrupted" not in result:
        return {}
    return {"corrupted": f"{100 * row['corrupted']['top1']:.2f} %" if "corrupted" in row else None}


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _measured(found: Mapping[str, Any]) -> dict[str, Any]:
    """What counts most, and what stands beside it."""
    name, share = headline(found)
    return {name: _percent(share), **_companions(found)}


def _companions(found: Mapping[str, Any]) -> dict[str, Any]:
    """What stands beside an accuracy, a correlation, a cosine."""
    shares = {key: _percent(found[key]) for key in ("spearman", "pearson") if key in found}
    known = {"loss": "loss", "calibration_error": "calibration error", "maximum_calibration_error": "its maximum"}
    beside = {shown: found[key] for key, shown in known.items() if key in found}
    return shares | beside | ({"worst class": _percent(found["worst_class"])} if "worst_class" in found else {})


def _show_corrupted(found: Mapping[str, Any]) -> None:
    """A row a corruption and one a severity, each a mean over the sets it has, and the mean of all."""
    if not found:
        return
    rows = {**found["by_name"], **{f"severity {k}": row for k, row in found["by_severity"].items()}}
    shown = [
        {"corruption": name, "accuracy": _percent(row["top1"]), **_companions(row)}
        for name, row in {**rows, "mean": found["mean"]}.items()
    ]
    print_table(shown, title="corrupted images")


def show_grid(rows: Sequence[Mapping[str, Any]], out: Path, *, title: str = "") -> None:
    """The table of a grid: one row a cell."""
    if not rows:
        _note(f"Nothing is finished yet; the same command goes on. Folder: {out}")
        return
    print_table(grid_rows(rows), title=title or str(out))
    _note(f"Tables: {out / 'table.json'}, {out / 'table.md'}; pictures: {out}/grid*.png")


def grid_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a cell: its labels, means with their deviations, and what was chosen where something was tuned."""
    measured = [key for row in rows for key, value in row.items() if isinstance(value, Mapping) and "mean" in value]
    axes = [key for key, value in rows[0].items() if isinstance(value, str)]
    tuned = any(row["tuned"] for row in rows)
    return [
        {
            **{axis: row[axis] for axis in axes},
            **{name: spread(row[name]) if name in row else None for name in dict.fromkeys(measured)},
            **({"chosen": _tuned(row) or None} if tuned else {}),
        }
        for row in rows
    ]


def _tuned(row: Mapping[str, Any]) -> str:
    """The values as a recipe says them: 0.004, where a table's four digits would be 0.004000."""
    said = {key: f"{value:g}" if isinstance(value, float) else value for key, value in row["tuned"].items()}
    return ", ".join(f"{key}={value}" for key, value in said.items())


def _note(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=False)
