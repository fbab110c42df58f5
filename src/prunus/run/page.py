"""report.html of a folder: the answer first, then how it came about; and several folders beside one another.

result.json ─▶ a language model, a classifier, a soup        table.json ─▶ a grid        sweep.json ─▶ a sweep
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from prunus import __version__
from prunus.jobs import SOUP, pictures_of, spread
from prunus.machine import counted, read_json
from prunus.measure import HEADLINES, headline
from prunus.report import Card, Page, Part, by_block, format_value, plot_losses, plot_speeds, read_metrics, write_page
from prunus.run.show import SOUP_COLUMNS, classifier_rows, grid_rows, language_rows, retrainings, soup_rows, speed_rows

__all__ = ["compare_runs", "write_report"]

_MOST_CARDS = 8
_HAS = {"result.json": "model", "table.json": "seeds", "sweep.json": "points"}  # by which they are known
_POINT = 0.01  # of accuracy
_MEASURED = "Measured decoding; zeros that lie anywhere make no program faster, and files are what was saved."

Result = Mapping[str, Any]
Row = dict[str, Any]


def write_report(folder: Path, path: Path | None = None) -> Path:
    """Write the page of a finished run, grid or sweep, report.html in its folder if not said otherwise; returns where.

    Raises FileNotFoundError for a folder in which nothing is finished, ValueError for what no run of Prunus left there.
    """
    name, draw = _kind(folder)
    path = path or folder / "report.html"
    write_page(draw(folder, _read(folder / name)), path)
    return path


def compare_runs(folders: Sequence[Path], path: Path) -> None:
    """Write one page that sets finished runs beside one another: their last stages, what they cost, their recipes.

    Raises FileNotFoundError for a folder without a finished run; ValueError for grids and sweeps, whose pages compare,
    and for what no run of Prunus left.
    """
    for folder in folders:
        if _kind(folder)[0] != "result.json":
            raise ValueError(f"{folder} is no single run: its own report.html compares what it holds")
    found = {str(folder): _read(folder / "result.json") for folder in folders}
    rows = [{"folder": name, **_last(result)} for name, result in found.items()]
    stages = [{"folder": name, **row} for name, result in found.items() for row in _stages(result)]
    parts = [
        Part(title, rows=alike) for title, found in (("Runs", rows), ("Stages", stages)) for alike in _alike(found)
    ]
    if points := _paced(found):
        plot_speeds(points, path.with_suffix(".png"), device=next(iter(found.values()))["device"])
        parts.insert(0, Part("Quality, speed and size", _MEASURED, pictures=[path.with_suffix(".png")]))
    write_page(Page(counted(len(folders), "run"), "", [], [*parts, *map(_recipe, folders), _versions()]), path)


def _paced(found: Mapping[str, Result]) -> list[Row]:
    """Points of the runs whose speed was measured, and of the dense model of the first of them."""
    points: list[Row] = []
    for name, result in found.items():
        if "speed" not in result or "perplexity" not in result:
            continue
        perplexity, size = result["perplexity"], result.get("size", {})
        text = next(iter(perplexity["dense"]))
        if not points and "dense" in result["speed"]:
            dense = {"model": "dense", "kind": "dense", "perplexity": perplexity["dense"][text]}
            points.append(dense | _pace(result["speed"]["dense"], {}))
        kind = "smaller" if "shrink" in result else "zeros"
        last = {"model": name, "kind": kind, "perplexity": perplexity[_ended(perplexity)][text]}
        points.append(last | _pace(result["speed"]["now"], size))
    return points


def _pace(speed: Mapping[str, Any], size: Mapping[str, Any]) -> Row:
    """Tokens a second one after another, and bytes: of the saved weights, or in memory where nothing was saved."""
    return {"speed": speed["decode"], "bytes": size.get("weight_bytes", speed["weights"])}


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of the same columns: runs of one task, which a table compares."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row), []).append(row)
    return list(found.values())


def _kind(folder: Path) -> tuple[str, Callable[[Path, Any], Page]]:
    """The file that says what a folder holds, and what makes its page."""
    kinds: dict[str, Callable[[Path, Any], Page]] = {"result.json": _run, "table.json": _grid, "sweep.json": _sweep}
    for name, draw in kinds.items():
        if (folder / name).exists():
            return name, draw
    if not folder.exists():
        raise FileNotFoundError(f"there is no folder {str(folder)!r} (seen from {Path.cwd()}); give that of a run")
    raise FileNotFoundError(f"{folder} holds nothing finished: there is none of {', '.join(kinds)}")


def _read(path: Path) -> Any:
    """What a run, grid or sweep left in one of those files."""
    found, has = read_json(path), _HAS[path.name]
    rows: list[Any] = found if path.name == "table.json" and isinstance(found, list) else [found]
    if not all(isinstance(row, dict) and has in row for row in rows):
        raise ValueError(f"{path} is not what a run of Prunus leaves; give the folder of one")
    return found


def _run(folder: Path, result: Result) -> Page:
    return (_language if "perplexity" in result else _soup if "rows" in result else _classifier)(folder, result)


def _stages(result: Result) -> list[Row]:
    if "rows" in result:
        return soup_rows(result)
    return language_rows(result) if "perplexity" in result else classifier_rows(result)


def _last(result: Result) -> Row:
    """What a run ended with, and what it cost."""
    if "perplexity" in result:
        ended = next(row for row in language_rows(result) if row["stage"] == _ended(result["perplexity"]))
        return {**ended, "seconds": result["seconds"], "device": result["device"]}
    name, share = headline(result)
    ended = {name: f"{100 * share:.2f} %", "zeros": f"{100 * result['sparsity']:.2f} %"}
    return {"model": result["model"], **ended, "epochs": result["epochs"], "seconds": result["seconds"]}


def _ended(stages: Mapping[str, Any]) -> str:
    """The stage that a run ended with: the last, or the soup, behind which others stand that it is compared with."""
    return SOUP if SOUP in stages else list(stages)[-1]


def _language(folder: Path, result: Result) -> Page:
    perplexity: Mapping[str, Mapping[str, float]] = result["perplexity"]
    ended, pruning = _ended(perplexity), result["pruning"]
    before = [stage for stage in ("dense", "pruned") if stage in perplexity and stage != ended]
    cards = [
        Card(
            f"perplexity, {text}",
            format_value(value),
            ", ".join(f"{stage} {format_value(perplexity[stage][text])}" for stage in before),
        )
        for text, value in perplexity[ended].items()
    ]
    cards.append(Card("zeros", f"{100 * pruning['sparsity']:.1f} %", f"of {pruning['pruned_parameters']:,} weights"))
    trained = retrainings(result)
    for name, found in trained.items():
        cards.append(Card("trained", f"{100 * found['share']:.3g} %", f"{found['trainable']:,} parameters: {name}"))
    cards.append(_cost(folder, result))
    rows = [{"what": name, **_trained(found)} for name, found in trained.items()]
    parts = [
        Part("Quality", rows=language_rows(result), pictures=_present(folder, "report.png")),
        Part("Retraining", rows=rows, pictures=_losses(folder)),
        _zeros(pruning["by_layer"]),
        Part("Output error by block", rows=_errors(pruning.get("blocks", []))),
        Part("Measured speed, tokens a second", rows=speed_rows(result["speed"]) if "speed" in result else []),
        Part("Zero-shot", rows=[{"task": task, **found} for task, found in result.get("zero_shot", {}).items()]),
    ]
    return _page(folder, result, cards, parts)


def _trained(found: Mapping[str, Any]) -> Row:
    return {
        "parameters": found["trainable"],
        "share, %": 100 * found["share"],
        "tokens": found["tokens"],
        "tokens a second": found["tokens_per_second"],
        "seconds": found["seconds"],
        **({"GPU memory, GB": found["peak_memory"] / 1e9} if found["peak_memory"] else {}),
    }


def _classifier(folder: Path, result: Result) -> Page:
    stages: Mapping[str, Mapping[str, float]] = result["stages"]
    (name, share), of = headline(result), "texts" if "texts" in result else "images"
    cards = [Card(f"{name}, {result['measured_on']} {of}", f"{100 * share:.2f} %", _dense(stages))]
    cards += _sizes(result)
    cards.append(
        Card("training", counted(result["epochs"], "epoch", ".4g"), f"{result['images_per_second']:,.0f} {of}/s")
    )
    cards.append(_cost(folder, result))
    layers: Mapping[str, float] = result.get("by_layer", {})
    corrupted: Mapping[str, Mapping[str, float]] = result.get("corrupted", {}).get("by_name", {})
    parts = [
        Part("Stages", rows=classifier_rows(result), pictures=_present(folder, "report.png")),
        Part("Retraining", rows=result["phases"], pictures=_losses(folder)),
        Part("Zeros by layer", rows=[{"layer": name, "zeros, %": 100 * share} for name, share in layers.items()]),
        Part("Corrupted images", rows=[{"corruption": name, **row} for name, row in corrupted.items()]),
    ]
    return _page(folder, result, cards, parts)


def _soup(folder: Path, result: Result) -> Page:
    cards = [
        Card(f"accuracy, {result['measured_on']} images", f"{100 * result['accuracy']:.2f} %", _dense(result["stages"]))
    ]
    cards += _sizes(result)
    cards.append(_cost(folder, result))
    parts = [
        Part("Soup", SOUP_COLUMNS, rows=soup_rows(result)),
        Part("Phases, and what lies between members", pictures=sorted(folder.glob("*.png"))),
    ]
    return _page(folder, result, cards, parts)


def _grid(folder: Path, rows: Sequence[Result]) -> Page:
    if not rows:
        raise FileNotFoundError(f"{folder} holds nothing finished: its table has no row; run its grid again")
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    said = "mean ± deviation over those of a cell" if len(seeds) > 1 else ""
    cards = [*_best(rows), Card("cells", str(len(rows)), ""), Card("seeds", str(len(seeds)), said)]
    table = [{**row, "n": len(found["seeds"])} for row, found in zip(grid_rows(rows), rows, strict=True)]
    parts = [Part("Cells", rows=table, pictures=pictures_of(folder)), _member(folder), _versions()]
    return Page(folder.name, str(folder), cards, parts)


def _best(rows: Sequence[Result]) -> list[Card]:
    """The best cell under each label of the first axis, if these are few; of one axis the best of all."""
    axes = [key for key, value in rows[0].items() if isinstance(value, str)]
    by = next(key for key, value in rows[0].items() if isinstance(value, Mapping) and "mean" in value)
    known = [row for row in rows if not math.isnan(row[by]["mean"])]  # which min and max would take, if first
    under: dict[str, list[Result]] = {}
    for row in known or rows:
        under.setdefault(row[axes[0]] if len(axes) > 1 else "", []).append(row)
    share = by in HEADLINES  # else a text's perplexity
    choose = max if share else min
    best = {label: choose(cells, key=lambda row: row[by]["mean"]) for label, cells in under.items()}
    if len(best) > _MOST_CARDS:
        return []
    of = f"{by}, %" if share else f"perplexity, {by}"
    return [
        Card(
            f"best {of}",
            spread(row[by]),
            ", ".join(filter(None, [label, *(row[axis] for axis in axes[bool(label) :])])),
        )
        for label, row in best.items()
    ]


def _member(folder: Path) -> Part:
    """What the first member was asked for; all of them are in members.jsonl."""
    path = folder / "members.jsonl"
    rows = read_metrics(path) if path.exists() else []
    text = yaml.safe_dump(rows[0]["recipe"], sort_keys=False) if rows else ""
    return Part(f"Recipe of one of the members, all of which are in {path}", code=text, folded=True)


def _sweep(folder: Path, result: Result) -> Page:
    from prunus.vision import rows_of

    part = Part("Rates", rows=rows_of(result), pictures=_present(folder, "sweep.png"))
    return _page(folder, result, [*_farthest(result), Card("points", str(len(result["points"])), "")], [part])


def _farthest(result: Result) -> list[Card]:
    """How far each kind goes before it loses more than a point of accuracy."""
    dense, found = result["dense"]["accuracy"], dict[str, Any]()
    for point in sorted(result["points"], key=lambda point: point["rate"]):
        kept = point["accuracy"] >= dense - _POINT
        found[point["kind"]] = point if kept else found.get(point["kind"])
    return [
        Card(f"{kind.replace('_', ' ')}, less than a point lost", "no rate")
        if point is None
        else Card(
            f"{kind.replace('_', ' ')}, less than a point lost",
            f"{100 * point['rate']:g} %",
            f"accuracy {100 * point['accuracy']:.2f} %, dense {100 * dense:.2f} %",
        )
        for kind, point in found.items()
    ]


def _page(folder: Path, result: Result, cards: Sequence[Card], parts: Sequence[Part]) -> Page:
    device = ", then ".join([str(result["device"]), *result.get("resumed_on", [])])
    ends = [_recipe(folder), _versions()]
    return Page(str(result["model"]), f"{folder}, on {device}", cards, [*parts, *ends])


def _dense(stages: Mapping[str, Mapping[str, float]]) -> str:
    shown = [stage for stage in ("dense", "pruned") if stage in stages]
    return ", ".join(f"{stage} {100 * headline(stages[stage])[1]:.2f} %" for stage in shown)


def _sizes(result: Result) -> list[Card]:
    left = f"{result['nonzero']:,} weights are left" if "nonzero" in result else ""
    cards = [Card("zeros", f"{100 * result['sparsity']:.2f} %", left)]
    if "speedup" in result:
        cards.append(
            Card("fewer multiplications", f"{result['speedup']:.2f} ×", "in theory, where zeros are scattered")
        )
    return cards


def _cost(folder: Path, result: Result) -> Card:
    files = [*folder.glob("model*.safetensors"), *folder.glob("model/model*.safetensors")]
    size = f"{sum(path.stat().st_size for path in files) / 1e6:,.1f} MB of weights" if files else ""
    return Card("time", f"{result['seconds']:,.0f} s", size)


def _zeros(layers: Mapping[str, float]) -> Part:
    shares = {kind: {str(block): 100 * share for block, share in row.items()} for kind, row in by_block(layers).items()}
    if layers and max(layers.values()) - min(layers.values()) < 5e-4:
        return Part(
            "Zeros by layer", f"{100 * next(iter(layers.values())):.1f} % in every one of {len(layers)} layers."
        )
    return Part("Zeros by layer, %", "A row a kind of layer, a column a block.", heat=shares)


def _errors(blocks: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Relative errors of blocks' outputs, where they were measured."""
    keys = ("error_before", "error_after")
    return [
        {"block": block["name"], **{key.replace("_", " "): block[key] for key in keys}, "seconds": block["seconds"]}
        for block in blocks
        if block.get("error_after") is not None
    ]


def _losses(folder: Path) -> list[Path]:
    """The picture of the losses that a run wrote down."""
    path = folder / "metrics.jsonl"
    rows = [row for row in (read_metrics(path) if path.exists() else []) if row.get("losses")]
    if not rows:
        return []
    named = {row.get("name") or f"{row['stage']} {place}": row for place, row in enumerate(rows, 1)}
    losses, watched = ({name: row.get(key, []) for name, row in named.items()} for key in ("losses", "watched"))
    every = {name: row.get("every", 1) for name, row in named.items()}
    plot_losses(losses, folder / "loss.png", watched=watched, every=every)
    return [folder / "loss.png"]


def _present(folder: Path, *names: str) -> list[Path]:
    return [folder / name for name in names if (folder / name).exists()]


def _recipe(folder: Path) -> Part:
    path = folder / "recipe.yaml"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return Part(f"Recipe: prunus run {path}", code=text, folded=True)


def _versions() -> Part:
    said = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    return Part("Versions", f"Page made by Prunus {__version__}, {said}.", folded=True)
