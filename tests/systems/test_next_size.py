"""The page of the next size is what its script makes of the measured runs."""

from __future__ import annotations

from pathlib import Path

import next_size as script
import pytest

ROOT = Path(__file__).parents[2]


def test_the_page_has_the_tables_of_its_runs() -> None:
    page = (ROOT / "docs" / "results" / "next-size.md").read_text(encoding="utf-8")
    for table in script.tables(ROOT / "docs" / "results" / "next-size.json").split("\n\n"):
        assert table.strip() in page


def test_parameters_and_operations_by_hand() -> None:
    small = script.opt(4, 2, words=10)  # a block: 3 x 4 x 4, 4 x 4, 16 x 4 and 4 x 16 weights
    assert small.weights == 48 + 16 + 64 + 64
    assert small.bytes == 2 * (2 * 192 + 2 * 40)
    assert small.forward(1) == 2 * (192 + 2048 * 4)
    assert script.solving((4, (4, 2))) == 2 * 64 / 3 + 6 * 16
    assert abs(script.NEXT[0].bytes / 2 / 70.6e9 - 1) < 0.01
    assert abs(script.NEXT[1].bytes / 2 / 405.9e9 - 1) < 0.01


def test_a_rate_meets_its_own_run() -> None:
    runs = [
        {"stage": "layer", "in": 8, "out": 8, "seconds": 1e-6},
        {"stage": "wanda", "width": 8, "blocks": 2, "tokens": 64, "seconds": 2.0},
        {"stage": "sparsegpt", "width": 8, "blocks": 2, "tokens": 64, "seconds": 4.0},
        {"stage": "wanda", "width": 8, "blocks": 6, "tokens": 64, "seconds": 9.0},
    ]
    rates, checks = script.read(runs)
    assert rates.seconds("sparsegpt", script.opt(8, 2), 64) == pytest.approx(4.0)
    (_, shape, _, predicted, measured) = next(checks)
    assert (shape.blocks, measured) == (6, 9.0)
    assert predicted == pytest.approx(6.0)
