"""How much each weight matters, what calibration learnt to say it, and how many weights each layer keeps."""

from prunus.score import allocations, scores
from prunus.score.allocations import erk, global_, lamp, owl, uniform, uniform_plus
from prunus.score.counts import (
    Allocation,
    Count,
    Scored,
    Scores,
    allocation,
    allocation_of,
    check_comparable,
    compared,
    counts_under,
    needed,
    round_to_total,
)
from prunus.score.criterion import Compare, Criterion, Needs, Score, Solve, criterion, criterion_of, required, scaling
from prunus.score.observe import observe
from prunus.score.scores import magnitude, norms_of, random, ria, wanda, warn_unseen

__all__ = [
    "Allocation",
    "Compare",
    "Count",
    "Criterion",
    "Needs",
    "Score",
    "Scored",
    "Scores",
    "Solve",
    "allocation",
    "allocation_of",
    "allocations",
    "check_comparable",
    "compared",
    "counts_under",
    "criterion",
    "criterion_of",
    "erk",
    "global_",
    "lamp",
    "magnitude",
    "needed",
    "norms_of",
    "observe",
    "owl",
    "random",
    "required",
    "ria",
    "round_to_total",
    "scaling",
    "scores",
    "uniform",
    "uniform_plus",
    "wanda",
    "warn_unseen",
]
