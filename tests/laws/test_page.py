"""Pages for the browser: what a result says stands on them, escaped, and nothing comes from elsewhere."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from prunus.jobs import Layout, Show, perplexity_row, perplexity_tables
from prunus.machine import write_json
from prunus.report import Card, Page, Part, by_block, plot_losses, write_page
from prunus.run import page as module
from prunus.run.page import compare_runs, write_report
from prunus.run.task import _reported

LANGUAGE = {
    "model": "tiny <b>",
    "device": "CPU, 2 threads",
    "resumed_on": ["CPU, 1 threads"],
    "perplexity": {"dense": {"held-out": 30.5}, "pruned": {"held-out": 98.25}, "merged": {"held-out": 41.75}},
    "pruning": {"sparsity": 0.6, "pruned_parameters": 1000, "by_layer": {}, "blocks": []},
    "retraining": {
        "train": ["norms"],
        "trainable": 20,
        "share": 0.0035,
        "tokens": 2048,
        "tokens_per_second": 512.0,
        "seconds": 4.0,
        "peak_memory": 0,
    },
    "seconds": 12.0,
}
CLASSIFIER = {
    "model": "resnet8",
    "device": "CPU, 2 threads",
    "accuracy": 0.9125,
    "measured_on": "test",
    "stages": {
        "dense": {"top1": 0.95, "loss": 0.2, "calibration_error": 0.03},
        "retrained": {"top1": 0.9125, "loss": 0.3, "calibration_error": 0.04},
    },
    "phases": [],
    "sparsity": 0.9,
    "epochs": 4.0,
    "images_per_second": 100.0,
    "seconds": 3.0,
}


def folder_of(path: Path, result: dict) -> Path:
    path.mkdir()
    (path / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (path / "recipe.yaml").write_text("model: tiny\n", encoding="utf-8")
    return path


def text_of(page: Path) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.read_text(encoding="utf-8").split("</style>")[1]).split())


def test_the_answer_stands_first(tmp_path):
    folder = folder_of(tmp_path / "run", LANGUAGE)
    (folder / "metrics.jsonl").write_text(json.dumps({"stage": "retrain", "losses": [3.0, 2.5]}) + "\n", "utf-8")
    page = write_report(folder)
    said = text_of(page)
    assert "perplexity, held-out 41.75 dense 30.50, pruned 98.25" in said
    assert "zeros 60.0 % of 1,000 weights trained 0.35 % 20 parameters: norms" in said
    assert "on CPU, 2 threads, then CPU, 1 threads" in said
    assert "model: tiny" in said  # the recipe
    assert page.read_text(encoding="utf-8").count("data:image/png;base64,") == 1  # the losses


def test_nothing_comes_from_elsewhere_and_text_is_escaped(tmp_path):
    page = write_report(folder_of(tmp_path / "run", LANGUAGE)).read_text(encoding="utf-8")
    assert "tiny &lt;b&gt;" in page
    assert "<b>tiny" not in page
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|@import|url\(", page)


def test_zeros_of_layers_are_shaded_only_where_they_differ(tmp_path):
    layers = {f"layers.{block}.mlp.{kind}.weight": 0.5 + 0.1 * block for block in range(3) for kind in ("up", "down")}
    pruning = {**LANGUAGE["pruning"], "by_layer": layers}
    page = write_report(folder_of(tmp_path / "run", {**LANGUAGE, "pruning": pruning})).read_text(encoding="utf-8")
    assert re.findall(r"rgba\(var\(--mark\), ([\d.]+)\)\" title=\"([\d.]+)", page) == [
        (shade, value) for _ in "ab" for shade, value in (("0.000", "50.0"), ("0.375", "60.0"), ("0.750", "70.0"))
    ]
    same = {**LANGUAGE["pruning"], "by_layer": dict.fromkeys(layers, 0.5)}
    page = write_report(folder_of(tmp_path / "same", {**LANGUAGE, "pruning": same}))
    assert "50.0 % in every one of 6 layers." in text_of(page)


def test_experts_of_a_block_are_one_number():
    layers = {"layers.1.experts.0.up.weight": 0.25, "layers.1.experts.1.up.weight": 0.75, "lm_head.weight": 0.5}
    assert by_block(layers) == {"up": {1: 0.5}, "lm_head": {2: 0.5}}


def test_runs_stand_beside_one_another(tmp_path):
    folders = [folder_of(tmp_path / "a", LANGUAGE), folder_of(tmp_path / "b", CLASSIFIER)]
    compare_runs(folders, tmp_path / "both.html")
    said = text_of(tmp_path / "both.html")
    assert "2 runs" in said
    assert said.index("41.75") < said.index("91.25 %") < said.index("30.50")
    with pytest.raises(FileNotFoundError, match="holds nothing finished"):
        compare_runs([*folders, tmp_path], tmp_path / "three.html")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        compare_runs([*folders, tmp_path / "nowhere"], tmp_path / "three.html")
    (tmp_path / "table.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ValueError, match="is no single run"):
        compare_runs([*folders, tmp_path], tmp_path / "three.html")


def test_runs_whose_speed_was_measured_stand_in_one_plane(tmp_path, monkeypatch):
    """The dense model once, each run with its last perplexity and the bytes of what it saved."""
    drawn: list[list[dict]] = []
    draw = module.plot_speeds
    monkeypatch.setattr(
        module, "plot_speeds", lambda rows, *args, **how: drawn.append(rows) or draw(rows, *args, **how)
    )
    speed = {"prefill": 9.0, "decode": 100.0, "spread": 0.1, "weights": 4e6, "peak": None}
    measured = {"speed": {"dense": speed, "now": {**speed, "decode": 150.0}}, "size": {"weight_bytes": 3e6}}
    folders = [
        folder_of(tmp_path / "a", {**LANGUAGE, **measured}),
        folder_of(tmp_path / "b", {**LANGUAGE, **measured, "shrink": {}}),
        folder_of(tmp_path / "c", LANGUAGE),
    ]
    compare_runs(folders, tmp_path / "all.html")
    rows = [[row[key] for key in ("kind", "perplexity", "speed", "bytes")] for row in drawn[0]]
    assert rows == [["dense", 30.5, 100.0, 4e6], ["zeros", 41.75, 150.0, 3e6], ["smaller", 41.75, 150.0, 3e6]]
    assert (tmp_path / "all.html").read_text(encoding="utf-8").count("data:image/png;base64,") == 1


def test_a_soup_is_the_answer_and_not_what_it_is_compared_with(tmp_path):
    beside = {"soup": {"held-out": 41.75}, "soup, greedy": {"held-out": 42.5}, "as long as all": {"held-out": 40.0}}
    soup = {**LANGUAGE, "perplexity": {**LANGUAGE["perplexity"], **beside}}
    folders = [folder_of(tmp_path / "soup", soup), folder_of(tmp_path / "run", CLASSIFIER)]
    assert "perplexity, held-out 41.75 dense 30.50, pruned 98.25" in text_of(write_report(folders[0]))
    compare_runs(folders, tmp_path / "both.html")
    said = text_of(tmp_path / "both.html")
    assert said.index("41.75") < min(said.index("42.50"), said.index("40.00"))


def test_a_grid_says_how_many_seeds_a_cell_has(tmp_path):
    cell = {"method": "ALLR", "seeds": [0, 1], "tuned": {}, "accuracy": {"mean": 94.125, "std": 0.25}}
    (tmp_path / "table.json").write_text(json.dumps([cell]), encoding="utf-8")
    assert "method accuracy n ALLR 94.12 ± 0.25 2" in text_of(write_report(tmp_path))


def test_the_best_cells_of_a_grid_stand_first(tmp_path):
    values = {
        ("50 %", "magnitude"): 30.0,
        ("50 %", "Wanda"): 25.0,
        ("60 %", "magnitude"): 60.0,
        ("60 %", "Wanda"): 70.0,
    }
    cells = [
        {"sparsity": a, "method": b, "seeds": [0], "tuned": {}, "held-out": {"mean": value, "std": None}}
        for (a, b), value in values.items()
    ]
    (tmp_path / "table.json").write_text(json.dumps(cells), encoding="utf-8")
    (tmp_path / "members.jsonl").write_text(json.dumps({"recipe": {"model": "tiny"}}) + "\n", encoding="utf-8")
    said = text_of(write_report(tmp_path))
    best = "best perplexity, held-out"
    assert f"{best} 25.00 50 %, Wanda {best} 60.00 60 %, magnitude cells 4" in said
    assert "model: tiny" in said


def test_a_sweep_says_how_far_each_kind_goes(tmp_path):
    def point(kind, rate, accuracy):
        counted = {"parameters": 10, "nonzero": 5, "sparse_flops": 1, "latency": {}}
        return {"kind": kind, "rate": rate, "accuracy": accuracy, "stages": {"pruned": {"top1": accuracy}}, **counted}

    found = [("zeros", 0.9, 0.5), ("zeros", 0.6, 0.895), ("zeros", 0.3, 0.9), ("filters", 0.3, 0.8)]
    dense = point("dense", 0, 0.9)
    dense["stages"] = {"dense": {"top1": 0.9}}
    sweep = {"model": "tiny", "device": "CPU", "dense": dense, "points": [point(*each) for each in found]}
    (tmp_path / "sweep.json").write_text(json.dumps(sweep), encoding="utf-8")
    lost = "less than a point lost"
    assert f"zeros, {lost} 60 % accuracy 89.50 %, dense 90.00 % filters, {lost} no rate" in text_of(
        write_report(tmp_path)
    )


def test_a_grid_without_a_row_has_no_page(tmp_path):
    (tmp_path / "table.json").write_text("[]", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="holds nothing finished"):
        write_report(tmp_path)


def test_a_size_is_that_of_the_network_wherever_its_folder_lies(tmp_path):
    (tmp_path / "work").mkdir()
    folder = folder_of(tmp_path / "work" / "run", CLASSIFIER)
    for name in ("model.safetensors", "dense/model.safetensors", "masks.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bytes(2_000_000))
    said = text_of(write_report(folder))
    assert "time 3 s 2.0 MB of weights" in said
    assert "weights are left" not in said  # nobody counted them


def test_a_finished_run_keeps_its_page_until_its_result_is_newer(tmp_path):
    folder = folder_of(tmp_path / "run", LANGUAGE)
    shown = _reported(SimpleNamespace(out=folder), lambda out: None)
    shown()
    (folder / "report.html").write_text("mine", encoding="utf-8")
    shown()
    assert (folder / "report.html").read_text(encoding="utf-8") == "mine"
    os.utime(folder / "report.html", (0, 0))
    shown()
    assert "perplexity" in text_of(folder / "report.html")


def test_empty_parts_are_left_out(tmp_path):
    page = Page("t", "", [Card("zeros", "60 %")], [Part("nothing"), Part("some", rows=[{"a": 1, "b": "x"}])])
    write_page(page, tmp_path / "page.html")
    assert text_of(tmp_path / "page.html").startswith("t zeros 60 % some a b 1 x")


def test_no_loss_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no loss"):
        plot_losses({"retrain": []}, tmp_path / "loss.png")


def test_tasks_have_a_table_with_their_mean_over_seeds(tmp_path):
    def result(acc, bleu):
        tasks = {"arc": {"acc": acc, "stderr": 0.1, "n": 9}, "wmt": {"bleu": bleu, "n": 9}}
        return {"perplexity": {"text": 8.0}, "zero_shot": tasks}

    rows = [{"criterion": "wanda"} | perplexity_row([result(0.25, 20.0), result(0.75, 22.0)])]
    layout = Layout({"criterion": ["wanda"]}, Show(), tmp_path)
    perplexity_tables(layout, rows)
    written = (tmp_path / "table.md").read_text("utf-8")
    assert "### Zero-shot, accuracies in %" in written
    assert "| wanda | 50.00 ± 35.36 | 21.00 ± 1.41 |" in written
    assert "dense" not in written
    write_json(tmp_path / "dense.json", {"text": 7.0, **result(0.8, 30.0)})
    perplexity_tables(layout, rows)
    assert "| dense | 80.00 | 30.00 |\n| wanda |" in (tmp_path / "table.md").read_text("utf-8")


def test_exact_matches_are_in_percent_and_every_task_has_its_column(tmp_path):
    tasks = [{"gsm8k": {"exact_match, strict-match": 0.4321}}, {"arc": {"acc_norm": 0.5}}]
    rows = [{"cell": str(i)} | perplexity_row([{"perplexity": {}, "zero_shot": each}]) for i, each in enumerate(tasks)]
    perplexity_tables(Layout({"cell": ["0", "1"]}, Show(), tmp_path), rows)
    written = (tmp_path / "table.md").read_text("utf-8")
    assert "| cell | gsm8k | arc |" in written
    assert "| 0 | 43.21 | - |\n| 1 | - | 50.00 |" in written


def test_a_seed_that_went_astray_is_said_and_is_the_best_nowhere(tmp_path):
    found = {"wanda": [float("nan"), 9.0], "magnitude": [8.0, 10.0]}
    rows = [
        {"criterion": name, "pattern": "50 %", "seeds": [0, 1], "tuned": {}}
        | perplexity_row([{"perplexity": {"text": value}} for value in values])
        for name, values in found.items()
    ]
    layout = Layout({"criterion": list(found), "pattern": ["50 %"]}, Show(), tmp_path)
    perplexity_tables(layout, rows)
    assert "| wanda | nan ± nan |" in (tmp_path / "table.md").read_text("utf-8")
    write_json(tmp_path / "table.json", [{**row, "criterion": "one"} for row in rows])
    assert "best perplexity, text 9.00 ± 1.41" in text_of(write_report(tmp_path))
    for path in tmp_path.glob("grid*.png"):
        path.unlink()
    perplexity_tables(layout, [{**rows[0], "criterion": name} for name in found])  # of which nothing can be drawn
    assert not list(tmp_path.glob("grid*.png"))
