"""Reports: what a run leaves behind can be read again, and nothing is drawn where nobody looks."""

import io
import logging
import math
import os
import time

import pytest
import torch
from matplotlib.image import imread
from rich.console import Console

from prunus.report import (
    append_metrics,
    format_value,
    markdown_table,
    plot_accuracy,
    plot_compression,
    plot_grid,
    plot_run,
    plot_speeds,
    print_table,
    progress,
    read_metrics,
    terminal,
)
from prunus.report.curves import _limits
from prunus.report.plots import _share, by_block
from tests.processes import start

pytestmark = pytest.mark.pictures

ROWS = [{"layer": "model.layers.0.mlp[3]", "zeros": 12345, "share": 0.5}, {"layer": "head", "zeros": None}]


def printed(*arguments, width=80, **options):
    console = Console(file=io.StringIO(), width=width)
    print_table(*arguments, console=console, **options)
    return console.file.getvalue()


def test_table_shows_every_value_unchanged_by_markup():
    text = printed(ROWS, title="Layers")
    assert "Layers" in text
    assert "model.layers.0.mlp[3]" in text  # not taken for markup
    assert "12,345" in text
    assert "0.5000" in text
    assert "zeros" not in printed(ROWS, ["layer"])


def test_a_narrow_table_folds_and_loses_nothing():
    text = printed([{"layer": "a" * 30 + "z" * 30, "x": 1}], width=40)
    assert text.count("a") == 31  # with the header
    assert text.count("z") == 30


def test_names_too_long_for_a_terminal_keep_what_tells_them_apart():
    names = [f"model.decoder.layers.{block}.self_attn.{kind}_proj.weight" for block in (0, 11) for kind in "qk"]
    console = Console(file=io.StringIO(), width=36, force_terminal=True, no_color=True)
    print_table([{"weight": name, "zeros": 0.5} for name in names], console=console)
    shown = [line.split()[1] for line in console.file.getvalue().splitlines() if "proj" in line]
    assert len(set(shown)) == 4
    assert shown[0] == "….0.self_…q_proj.weight"
    assert max(map(len, console.file.getvalue().splitlines()[2:])) <= 36


def test_tables_refuse_what_is_not_there():
    with pytest.raises(ValueError, match="at least one row"):
        print_table([])
    with pytest.raises(ValueError, match="no row has column 'loss'; there are layer, zeros, share"):
        markdown_table(ROWS, ["loss"])


def test_markdown_table_is_markdown():
    lines = markdown_table([{"a|b": "x|y", "n": 2.0}]).splitlines()
    assert lines[0] == "| a\\|b | n |"
    assert lines[1] == "| --- | ---: |"
    assert lines[2] == "| x\\|y | 2.000 |"


@pytest.mark.parametrize(
    ("value", "text"),
    [(12.3456, "12.35"), (0.0, "0"), (123456.0, "1.23e+05"), (0.00012, "1.20e-04"), (1234.5, "1234"), (True, "True")],
)
def test_values_have_four_digits(value, text):
    assert format_value(value) == text


def test_metrics_come_back(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    append_metrics(path, {"loss": math.nan, "n": torch.tensor(3), "where": tmp_path, "list": (1, 2.5, None)})
    append_metrics(path, {"text": "a\nb"})
    first, second = read_metrics(path)
    assert math.isnan(first["loss"])
    assert (first["n"], first["where"], first["list"]) == (3, str(tmp_path), [1, 2.5, None])
    assert '"loss": "nan"' in path.read_text()
    assert second["text"] == "a\nb"
    path.write_text('{"a": 1}\n{"a"')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_metrics(path)


def test_a_full_disk_keeps_no_part_of_a_line(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, {"stage": "dense"})
    whole, write = path.read_bytes(), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[: len(data) // 2]))
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        append_metrics(path, {"stage": "pruned"})
    assert path.read_bytes() == whole


def test_lines_of_two_processes_are_not_mixed(tmp_path):
    path, here = tmp_path / "metrics.jsonl", tmp_path / "here"
    here.mkdir()
    others = [start(append_often, path, here, mark) for mark in "ab"]
    for other in others:
        other.join()
    assert sorted(row["mark"][0] for row in read_metrics(path)) == ["a"] * 4000 + ["b"] * 4000


def append_often(path, here, mark):
    (here / mark).touch()
    while len(list(here.iterdir())) < 2:  # both begin at once
        time.sleep(0.001)
    for _ in range(4000):
        append_metrics(path, {"mark": mark * 2000})


def test_progress_is_silent_without_a_terminal_but_logs(caplog):
    console = Console(file=io.StringIO(), force_terminal=False)
    with caplog.at_level(logging.INFO), progress("prune", 4, console=console) as advance:
        advance()
        advance.to(4)
    assert console.file.getvalue() == ""
    assert [record.message.split(":")[0] for record in caplog.records] == ["prune", "prune"]
    assert "done in" in caplog.records[-1].message


def test_progress_logs_now_and_then(caplog, monkeypatch):
    clock = iter([0.0, 0.0, 10.0, 40.0, 50.0, 51.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), progress("train", 8, console=Console(file=io.StringIO())) as advance:
        advance(1)  # after 10 s: too early
        advance(1)  # after 40 s: 2 of 8, so 120 s left
        advance(1)
    assert [r.message for r in caplog.records][1:-1] == ["train: 2 of 8, 120 s left"]


@pytest.mark.parametrize("total", [3, None])
def test_progress_draws_on_a_terminal(total):
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with progress("prune", total, console=console) as advance:
        advance(2)
        advance.to(3)
    assert "prune" in console.file.getvalue()
    assert ("3/3" in console.file.getvalue()) == bool(total)  # of an unknown number none is said


def test_one_bar_is_drawn_at_a_time(caplog):
    consoles = [Console(file=io.StringIO(), force_terminal=True, width=80) for _ in range(3)]
    grid, member = (progress(name, 2, console=each) for name, each in zip(("grid", "member"), consoles, strict=False))
    with caplog.at_level(logging.INFO), grid, member as advance:
        advance(1)
    with progress("next", 2, console=consoles[2]):
        pass
    shown = [console.file.getvalue() for console in consoles]
    assert ["grid" in shown[0], shown[1], "next" in shown[2]] == [True, "", True]
    assert "member: started" in [record.message for record in caplog.records]


def test_training_shows_its_loss_and_speed_on_a_line(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    clock = iter([100.0, 102.0])
    with progress("retrain", 400, tokens=2048, console=console) as advance:
        monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock, 102.0))
        advance.step(300, 4.25)  # a run that goes on: its speed is not that of the steps before
        advance.step(304, 4.125)
        monkeypatch.undo()
    shown = console.file.getvalue()
    assert "loss 4.125, 4,096 tokens/s" in shown
    assert "304/400" in shown


def test_losses_are_logged_where_there_is_no_terminal(caplog, monkeypatch):
    clock = iter([0.0, 0.0, 40.0, 41.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO), progress("train", 8, console=Console(file=io.StringIO())) as advance:
        advance.step(2, 3.5)
    assert "train: 2 of 8, 120 s left, loss 3.500" in [r.message for r in caplog.records]


def result(**perplexity):
    layers = {f"model.layers.{i}.mlp.{kind}.weight": 0.5 + i / 10 for i in range(3) for kind in ("up", "down")}
    return {"model": "tiny", "pruning": {"by_layer": layers}, "perplexity": perplexity}


@pytest.mark.parametrize(
    "perplexity",
    [
        {"dense": 10.0, "pruned": 12.0},
        {"dense": {"test": 10.0}, "pruned": {"test": 900.0}, "retrained biases": {"test": math.inf}},
        {"dense": {"a": 10.0, "b": 11.0}, "merged": {"a": 10.0}},
        {},
    ],
)
def test_compression_picture_is_drawn(tmp_path, perplexity):
    plot_compression(result(**perplexity), tmp_path / "new" / "report.png")
    picture = imread(tmp_path / "new" / "report.png")
    assert picture.shape[0] > 300
    assert picture.std() > 0.02  # not blank
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["report.png"]


def test_grid_picture_is_drawn(tmp_path):
    table = {"wanda": {"50 %": 20.0, "60 %": 40.0, "2:4": 30.0}, "magnitude": {"50 %": 25.0, "2:4": math.nan}}
    plot_grid(table, tmp_path / "grid.png", dense=15.0, title="grid")
    assert imread(tmp_path / "grid.png").std() > 0.02


def test_dollars_are_dollars(tmp_path):
    """Labels are values of recipes and paths of models, none of them a formula, let alone a broken one."""
    name = r"a$\frac{1$"
    plot_grid({name: {"50 %": 20.0, "2:4": 30.0}}, tmp_path / "grid.png", dense=15.0, title=name, xlabel=name)
    lines = {name: [(name, 94.0, 0.1), ("95 %", 92.0, None)]}
    plot_accuracy({name: lines, "b": lines}, tmp_path / "accuracy.png", xlabel=name, dense=95.0, title=name)
    point = {"model": name, "kind": name, "perplexity": 20.0, "speed": 90.0, "bytes": 1e6}
    plot_speeds([point, point | {"kind": "b"}], tmp_path / "speed.png", device=name)
    plot_run([2.0, 1.0], {name: 95.0}, tmp_path / "run.png", title=name)
    assert len(list(tmp_path.iterdir())) == 4


def test_accuracy_picture_is_drawn(tmp_path):
    lines = {name: [("90 %", 94.0, 0.1), ("95 %", 92.0, None)] for name in "ab"}
    panels = {"5 %": lines, "10 %": {**lines, "FT": [("90 %", 11.0, 0.3)]}}
    plot_accuracy(panels, tmp_path / "grid.png", xlabel="sparsity", dense=95.0, title="grid")
    assert imread(tmp_path / "grid.png").std() > 0.02
    plot_run([2.0, 1.0], {"dense": 95.0, "pruned": 10.0}, tmp_path / "run.png", rates=[0.1, 0.05], title="run")
    assert imread(tmp_path / "run.png").std() > 0.02


def test_outliers_do_not_squeeze_the_rest():
    assert _limits([94.0, 93.0, 11.0], 95.0) == (95.0, 80.0)
    assert _limits([94.0, 93.0, 81.0], None) == (94.0, None)
    assert _limits([94.0, 20.0, 11.0], 95.0) == (95.0, None)


def test_empty_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no points"):
        plot_accuracy({"": {}}, tmp_path / "a.png", xlabel="x")
    with pytest.raises(ValueError, match="neither a loss"):
        plot_run([], {}, tmp_path / "a.png", title="x")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_compression({}, tmp_path / "a.png")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_grid({"wanda": {"50 %": math.nan}}, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_places_and_shares():
    names = ("model.decoder.layers.12.fc1.weight", "model.layers.3.mlp.experts.gate_up_proj", "lm_head.weight")
    assert by_block(dict.fromkeys(names, 0.5)) == {"fc1": {12: 0.5}, "gate_up_proj": {3: 0.5}, "lm_head": {2: 0.5}}
    assert [_share(label) for label in ("50 %", "50%", "0.5", "50", "5 %")] == [0.5, 0.5, 0.5, 0.5, 0.05]
