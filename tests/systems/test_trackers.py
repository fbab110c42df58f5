"""What a run measures reaches the trackers that were asked for: TensorBoard as it is, any other by what it is told."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.logging import get_logger
from accelerate.state import AcceleratorState, PartialState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prunus.language.single import compress
from prunus.recipe import LanguageRecipe, parse
from prunus.report import named_log, read_metrics, tracked
from prunus.report.trackers import _state
from prunus.train import Watch, linear, train
from tests.systems import test_compress


def test_tensorboard_shows_what_a_run_measured(tiny_folder: Path, text_file: Path, tmp_path: Path) -> None:
    raw = test_compress.raw(tiny_folder, text_file, tmp_path, log_with=["tensorboard"], save=False)
    raw["retrain"] |= {"steps": 12, "evaluate_every": 6}
    result = compress(parse(raw, LanguageRecipe, "test"))
    found = EventAccumulator(str(tmp_path / "logs")).Reload()
    curve = {name: [(each.step, each.value) for each in found.Scalars(name)] for name in found.Tags()["scalars"]}
    losses = next(row["losses"] for row in read_metrics(tmp_path / "metrics.jsonl") if row["stage"] == "retrain")
    assert curve["retrain/loss"] == [(step, pytest.approx(loss)) for step, loss in enumerate(losses, 1)]
    assert [step for step, _ in curve["retrain/lr"]] == list(range(1, 13))
    assert curve["retrain/watched"] == [(step, pytest.approx(value)) for step, value in result["retraining"]["watched"]]
    assert curve["merged/perplexity/text"][0][1] == pytest.approx(result["perplexity"]["merged"]["text"])
    assert curve["sparsity"][0][1] == pytest.approx(0.5)
    assert all(value > 0 for _, value in curve["retrain/tokens_per_second"])
    assert list((tmp_path / "logs").rglob("hparams.yml"))


def test_train_logs_every_step_whenever_it_is_read() -> None:
    rows: list[tuple[dict[str, float], int]] = []
    layer = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    trace = train(
        layer,
        lambda step: torch.ones(3, 2),
        optimizer,
        linear(5),
        steps=5,
        loss=lambda model, x: model(x).square().mean(),
        report_every=2,
        log=lambda values, step: rows.append((values, step)),
    )
    steps = [(values["loss"], values["lr"], step) for values, step in rows if "loss" in values]
    assert steps == [(loss, lr, step) for step, (loss, lr) in enumerate(zip(trace.losses, trace.lrs, strict=True), 1)]
    assert [step for values, step in rows if "tokens_per_second" in values] == [2, 4, 5]


def test_a_run_that_ends_early_logs_its_last_steps() -> None:
    seen: list[int] = []
    layer = torch.nn.Linear(2, 1)
    train(
        layer,
        lambda step: torch.ones(3, 2),
        torch.optim.SGD(layer.parameters(), lr=0.5),
        linear(9),
        steps=9,
        loss=lambda model, x: model(x).square().mean(),
        watch=Watch(lambda: 1.0, every=2, patience=1),
        report_every=3,
        log=lambda values, step: seen.append(step) if "loss" in values else None,
    )
    assert seen == [1, 2, 3, 4]


def test_trackers_start_with_the_first_number_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    class Tracker:
        def __init__(self, **how: Any) -> None:
            heard.append(how)

        def start(self) -> None:
            get_logger(__name__).debug("as wandb's does")  # RuntimeError without accelerate's state
            heard.append("start")

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            heard.append(values)

        def log(self, values: dict[str, float], step: int | None) -> None:
            heard.append((values, step))

        def finish(self) -> None:
            heard.append("finish")

    monkeypatch.setattr("accelerate.tracking.LOGGER_TYPE_TO_CLASS", {"wandb": Tracker})
    AcceleratorState._reset_state(reset_partial_state=True)
    with tracked(["wandb"], tmp_path, {"prune": {"sparsity": 0.5, "include": []}}) as log:
        assert heard == []
        named_log(log, "retrain")({"loss": 2.5}, 3)
    run = {"run_name": "prunus", "name": str(tmp_path)}
    said = {"prune.sparsity": 0.5, "prune.include": "[]"}
    assert heard == [run, "start", said, ({"retrain/loss": 2.5}, 3), "finish"]
    assert not PartialState._shared_state  # its device is the training's to choose
    with tracked([], tmp_path, {}) as log:
        log({"loss": 1.0}, None)


def test_a_thread_that_logs_leaves_another_what_it_logs_by() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    first, second = _state(), _state()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    get_logger(__name__).debug("as wandb's does")
    second.__exit__(None, None, None)
    assert not PartialState._shared_state


def test_what_is_missing_or_unknown_is_refused_before_any_work(
    tiny_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    raw = test_compress.raw(tiny_folder, text_file, tmp_path, log_with="wandb")
    with pytest.raises(ImportError, match=r"log_with: \[wandb\].*prunus\[wandb\]"):
        compress(parse(raw, LanguageRecipe, "test"))
    assert not (tmp_path / "logs").exists()
    with pytest.raises(ValueError, match="there is no tracker 'tensorbord'; there are tensorboard, wandb, mlflow"):
        parse({**raw, "log_with": ["tensorbord"]}, LanguageRecipe, "test")
