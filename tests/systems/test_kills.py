"""Real kills in the middle of long commands; `python -m tests.kills` tries any number of points."""

from pathlib import Path

import pytest

from tests.kills import differences, left, prepare, run


@pytest.mark.slow
@pytest.mark.parametrize(("name", "share"), [("watched", 0.5), ("classifier", 0.6), ("grid", 0.7)])
def test_a_command_killed_for_good_ends_with_the_same_bits(tmp_path: Path, name: str, share: float) -> None:
    prepare(tmp_path)
    seconds = run(name, tmp_path, "whole")
    run(name, tmp_path, "killed", (share * seconds,))
    assert differences(left(tmp_path / "whole"), left(tmp_path / "killed")) == []
