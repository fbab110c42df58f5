"""Pruning and retraining in phases, and averages of members that share a mask.

`imp` is the loop over phases, `sms` the loop with several members a phase, `average` how they are mixed.
"""

from prunus.soup import averages
from prunus.soup.average import (
    Greedy,
    average,
    average_and_reprune,
    check_masks,
    check_weights,
    greedy,
    greedy_members,
    learn_weights,
    mean_tensor,
)
from prunus.soup.averages import Held
from prunus.soup.geometry import Line, Plane, distances, loss_line, loss_plane
from prunus.soup.imp import Distance, Phase, bimp_budget, distance, imp, phase_sparsities, split_steps
from prunus.soup.sms import Souped, sms, sms_, uniform

__all__ = [
    "Distance",
    "Greedy",
    "Held",
    "Line",
    "Phase",
    "Plane",
    "Souped",
    "average",
    "average_and_reprune",
    "averages",
    "bimp_budget",
    "check_masks",
    "check_weights",
    "distance",
    "distances",
    "greedy",
    "greedy_members",
    "imp",
    "learn_weights",
    "loss_line",
    "loss_plane",
    "mean_tensor",
    "phase_sparsities",
    "sms",
    "sms_",
    "split_steps",
    "uniform",
]
