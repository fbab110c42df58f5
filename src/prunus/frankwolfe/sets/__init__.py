"""Feasible sets for constrained training: norm, linear minimisation, diameter, starting point, projection.

`protocol` says what a set is made of, `ball` makes the sets of the papers, `radius` says how large they are. A new set
is a gauge (as in `lp`, `sparse`) or a way of seeing tensors (as in `group`, `spectral`), and one entry here.
"""

from prunus.frankwolfe.sets.ball import (
    Ball,
    group_k_support,
    k_sparse,
    k_support,
    lp,
    nuclear,
    spectral_k_sparse,
    spectral_k_support,
)
from prunus.frankwolfe.sets.group import Entries, Groups, Labels
from prunus.frankwolfe.sets.lp import Lp
from prunus.frankwolfe.sets.radius import Diameter, Initial, Radius, expected_norm
from prunus.frankwolfe.sets.sparse import KSparse, KSupport
from prunus.frankwolfe.sets.spectral import Spectrum

__all__ = [
    "Ball",
    "Diameter",
    "Entries",
    "Groups",
    "Initial",
    "KSparse",
    "KSupport",
    "Labels",
    "Lp",
    "Radius",
    "Spectrum",
    "expected_norm",
    "group_k_support",
    "k_sparse",
    "k_support",
    "lp",
    "nuclear",
    "spectral_k_sparse",
    "spectral_k_support",
]
