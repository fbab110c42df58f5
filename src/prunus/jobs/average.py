"""`prunus average`: one checkpoint from several on disk, all of them or those that a greedy soup takes.

    checkpoints ─ uniform, weighted ─────────────────────────────▶ out
    checkpoints ─ each scored ─ best first ─ trials scored ──────▶ out     (greedy)

What a score is belongs to the caller: anything that reads a folder, such as an evaluation recipe on validation data.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from prunus.machine import hidden_folder
from prunus.recipe import Choice, averages
from prunus.save import Join, SavedModel, average_folders, load_info
from prunus.soup import Greedy, greedy_members

__all__ = ["average_checkpoints", "average_greedily", "choose_greedily", "joined_by"]

log = logging.getLogger(__name__)


def average_checkpoints(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
    *,
    how: Choice | None = None,
    base: str | Path | None = None,
) -> list[dict[str, Any]]:
    """The average of all checkpoints, written to `out`; returns a row for each member and one for the mean, to print.

    how: an average as recipes name it, in place of weights: ties, {"dare": {"density": 0.3}}, slerp. base: the model
    that the members were retrained from, which most of these need. Errors are those of `save.average_folders`.

    >>> print_table(average_checkpoints(["runs/a/model", "runs/b/model"], "runs/mean"))
    """
    _check_how(how, weights, base)
    if how is None:
        saved = average_folders(checkpoints, out, weights)
    else:
        noted = str(base) if averages.knows(how, "base") else None
        saved = average_folders(checkpoints, out, how=joined_by(how, len(checkpoints), noted), base=base)
    said = load_info(saved.folder)["average"]["members"]
    return _rows(saved, [{"weight": member["weight"]} for member in said])


def joined_by(how: Choice, members: int, noted: str | None = None) -> Join:
    """What joins so many members tensor by tensor, as the average of this name does; noted: of their base."""
    name, empty = how if isinstance(how, str) else json.dumps(how), dict[str, Tensor]()
    weights = averages.make(how, [empty] * members, base=empty)[1]
    return Join(name, lambda states, base: averages.make(how, states, base=base)[0], weights, noted)


def _check_how(how: Choice | None, weights: Sequence[float] | None, base: str | Path | None) -> None:
    if how is None:
        if base is not None:
            raise ValueError(
                "--base is for averages that go by task vectors, not for a mean: give --how, or leave it out"
            )
        return
    name = averages.name(how)
    if averages.knows(how, "held"):
        raise ValueError(f"--how {name} chooses by held-out data: give a recipe that scores, with --greedy")
    if weights is not None:
        raise ValueError(f"--weights are those of a mean, and {name} weighs members itself: leave out one")
    if averages.knows(how, "base") and base is None:
        raise ValueError(f"--how {name} goes by what the members were retrained from: give the pruned model, --base")


def average_greedily(
    checkpoints: Sequence[str | Path], out: str | Path, score: Callable[[Path], float]
) -> list[dict[str, Any]]:
    """The average of the checkpoints that a greedy soup takes, written to `out`; returns the rows to print.

    score: a checkpoint (a member's own path, or a hidden one) -> how good it is, higher is better, on validation data.
    It is called 2 * (number of checkpoints) - 1 times; each trial is a checkpoint on disk, which is gone afterwards.
    Raises as `average_checkpoints`, and what `score` raises.

    >>> average_greedily(["runs/a/model", "runs/b/model"], "runs/soup", lambda folder: -perplexity_of(folder))
    """
    members = [Path(path) for path in checkpoints]
    soup = choose_greedily(members, out, score)
    saved = average_folders([members[place] for place in soup.members], out)
    return _greedy_rows(saved, soup, members)


def choose_greedily(members: Sequence[Path], out: str | Path, score: Callable[[Path], float]) -> Greedy:
    """The members that a greedy soup takes; each trial is written beside `out`, and is gone afterwards."""
    with hidden_folder(out) as place:
        return greedy_members(len(members), lambda chosen: _score(chosen, members, score, place / "trial"))


def _score(chosen: Sequence[int], members: Sequence[Path], score: Callable[[Path], float], trial: Path) -> float:
    """How good a member, or the average of several, is."""
    if len(chosen) == 1:
        value = score(members[chosen[0]])
    else:
        average_folders([members[place] for place in chosen], trial)
        value = score(trial)
        shutil.rmtree(trial)
    log.info("members %s score %.6g", ", ".join(str(place + 1) for place in chosen), value)
    return value


def _greedy_rows(saved: SavedModel, soup: Greedy, members: Sequence[Path]) -> list[dict[str, Any]]:
    taken = _rows(saved, [{"weight": 1 / len(soup.members), "score": soup.singles[place]} for place in soup.members])
    left = [
        {"checkpoint": str(path), "zeros": None, "weight": 0.0, "score": soup.singles[place]}
        for place, path in enumerate(members)
        if place not in soup.members
    ]
    return [*taken[:-1], *left, {**taken[-1], "score": soup.score}]


def _rows(saved: SavedModel, extra: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    average = load_info(saved.folder)["average"]
    rows = [
        {"checkpoint": member["path"], "zeros": member["zeros"], **more}
        for member, more in zip(average["members"], extra, strict=True)
    ]
    return [*rows, {"checkpoint": str(saved.folder), "zeros": average["zeros"], "weight": None}]
