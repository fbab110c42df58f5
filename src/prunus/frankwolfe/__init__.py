"""Training that stays in feasible sets (`SFW`), its sets, and the proximal and penalised baselines.

Zimmer, Spiegel, Pokutta: Compression-aware Training of Neural Networks using Frank-Wolfe (2022).
"""

from prunus.frankwolfe import sets
from prunus.frankwolfe.constrained import KeptGradients, constrained_groups
from prunus.frankwolfe.proximal import GroupLasso, NuclearNorm, NuclearSteps, ProximalSGD
from prunus.frankwolfe.sets import Initial, group_k_support, k_sparse, k_support, lp, nuclear, spectral_k_support
from prunus.frankwolfe.sets.protocol import count_of
from prunus.frankwolfe.sfw import SFW

__all__ = [
    "SFW",
    "GroupLasso",
    "Initial",
    "KeptGradients",
    "NuclearNorm",
    "NuclearSteps",
    "ProximalSGD",
    "constrained_groups",
    "count_of",
    "group_k_support",
    "k_sparse",
    "k_support",
    "lp",
    "nuclear",
    "sets",
    "spectral_k_support",
]
