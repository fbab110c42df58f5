"""A sample of what `scripts/malformed.py` tries: every wrong input is one line that names value, place and mend."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import malformed

CASES = malformed.cases(1)
SAMPLE = [case for case in CASES if case.kind in ("recipe", "flag", "file", "grid")][:60]
SAMPLE += [case for case in CASES if case.kind.startswith(("images", "weights"))][:24]


@pytest.mark.parametrize("part", range(3))
def test_malformed_inputs_are_refused_in_one_line_before_work(part: int) -> None:
    found = [malformed.outcome(case) for case in SAMPLE[part::3]]
    assert [(each.verdict, each.case.arguments, each.said) for each in found if each.verdict != "good"] == []


@pytest.mark.parametrize(
    ("status", "said", "verdict"),
    [
        (0, "", "accepted"),
        (2, "prunus: recipe.yaml: seed: give a number (got 'x')\n", "good"),
        (2, "prunus: recipe.yaml: give a number (got 'x')\n", "does not name 'seed'"),
        (2, "prunus: recipe.yaml: seed is wrong\n", "says no mend"),
        (2, "prunus: seed: give this\nand that\n", "more than a line"),
        ("TypeError", "TypeError: seed\n", "ended with TypeError"),
    ],
)
def test_what_is_no_good_line(status: object, said: str, verdict: str) -> None:
    case = malformed.Case("recipe", (), ("seed",))
    assert malformed._verdict(case, status, said, []) == verdict
    assert verdict != "good" or malformed._verdict(case, status, said, [Path("work")]) == "late: work was written"
