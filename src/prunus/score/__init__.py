"""How much each weight matters, what calibration learnt to say it, and how many weights each layer keeps."""

from prunus.score import scores
from prunus.score.allocations import Allocation, counts_under, erk, global_, lamp, owl, uniform, uniform_plus
from prunus.score.observe import observe
from prunus.score.scores import Score, magnitude, norms_of, random_score, ria, wanda, warn_unseen

__all__ = [
    "Allocation",
    "Score",
    "counts_under",
    "erk",
    "global_",
    "lamp",
    "magnitude",
    "norms_of",
    "observe",
    "owl",
    "random_score",
    "ria",
    "scores",
    "uniform",
    "uniform_plus",
    "wanda",
    "warn_unseen",
]
