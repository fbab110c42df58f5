"""Small jobs give the masks, weights and metrics that they gave before, bit for bit: see tests/fingerprints.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.fingerprints import JOBS, digest, known, one_thread, platform


@pytest.mark.parametrize("name", JOBS)
def test_a_job_gives_the_bits_it_gave(name: str, tmp_path: Path) -> None:
    stored = known().get(platform())
    if stored is None or name not in stored:
        pytest.skip(f"no bits of {name!r} for {platform()}; record them: python -m tests.fingerprints record")
    with one_thread():
        assert JOBS[name](tmp_path) == stored[name]


def test_a_digest_is_of_every_bit() -> None:
    value = {"a": torch.zeros(2, 3), "b": torch.ones(2, dtype=torch.bool)}
    changed = [
        {**value, "a": torch.zeros(3, 2)},
        {**value, "a": -torch.zeros(2, 3)},
        {**value, "a": torch.zeros(2, 3).half()},
        {**value, "b": torch.tensor([True, False])},
        {"c": value["a"], "b": value["b"]},
    ]
    assert len({digest(each) for each in [value, *changed]}) == 6
    assert digest(dict(reversed(value.items()))) == digest(value)
    assert digest({"loss": 0.1}) != digest({"loss": 0.1 + 2e-17})
