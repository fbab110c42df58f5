"""The language demo: as many steps as fit, and the threads that are faster."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from prunus.recipe import LanguageRecipe, parse
from prunus.run import demo


@pytest.mark.parametrize(("left", "steps"), [(-5.0, 8), (20.0, 39), (1e3, 100)])
def test_the_steps_are_those_that_fit(left: float, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def retrain(_pruned: object, _change: object, name: str) -> tuple[None, dict[str, float]]:
        tried.append(name)
        return None, {"seconds": 0.5}

    monkeypatch.setattr(demo, "_retrain", retrain)
    recipe = parse(demo.RECIPE, LanguageRecipe, "demo")
    assert demo._steps(SimpleNamespace(recipe=recipe), left) == steps  # type: ignore[arg-type]
    assert len(tried) == 1


@pytest.mark.parametrize(("slow", "chosen"), [(2, 1), (1, 2)])
def test_one_thread_where_two_are_slower(slow: int, chosen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    now, threads = [0.0], [2]

    class Model(SimpleNamespace):
        def __call__(self, _: Any) -> None:
            now[0] += 2.0 if threads[0] == slow else 1.0

    monkeypatch.setattr(demo.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.__setitem__(0, count))
    demo._choose_threads(Model(device=torch.device("cpu")))
    assert threads == [chosen]
