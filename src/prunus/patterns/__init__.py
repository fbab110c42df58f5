"""Where zeros may lie in a matrix (out, in), and the exact mask for a score under each pattern.

    Unstructured("layer")   any `kept` entries of the matrix
    Unstructured("row")     the same number in every output row (the first rows take the remainder)
    NM(n, m)                at most n nonzeros in m consecutive weights along the input dimension: 2:4 keeps 2 of 4.
                            Others count the zeros; for 2:4 that is the same, for 1:4 it is not.
    Block(rows, columns)    whole tiles of rows x columns weights, by the mean score of each
    Rows()                  whole output rows (neurons, filters), by the mean score of each

A new pattern is one frozen dataclass with these methods. How the largest scores are found is in `selection.py`, how
many entries each layer keeps in `allocations.py`.
"""

from __future__ import annotations

import re
from typing import Literal

from prunus.patterns.entries import NM, Unstructured
from prunus.patterns.protocol import Pattern, check_sparsity
from prunus.patterns.scaled import mask_scaled, scaled
from prunus.patterns.selection import (
    check_scores,
    goes_to_kernels,
    keep_largest,
    keep_largest_of_all,
    kept_of,
    select_global_share,
)
from prunus.patterns.tiles import Block, Rows

__all__ = [
    "NM",
    "Block",
    "Pattern",
    "Rows",
    "Unstructured",
    "check_scores",
    "check_sparsity",
    "goes_to_kernels",
    "keep_largest",
    "keep_largest_of_all",
    "kept_of",
    "mask_scaled",
    "parse",
    "scaled",
    "select_global_share",
]


def parse(text: str, per: Literal["row", "layer"] = "row") -> Pattern:
    """The pattern that a recipe names: "unstructured" (compared per row or per layer), "N:M", "block RxC" or "filters".

    Raises ValueError for anything else.

    >>> parse("2:4")
    NM(n=2, m=4)
    """
    if text == "unstructured":
        return Unstructured(per)
    if text == "filters":
        return Rows()
    if tile := re.fullmatch(r"block (\d+)x(\d+)", text):
        return Block(int(tile[1]), int(tile[2]))
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None:
        raise ValueError(
            f"Pattern {text!r} is not N:M (2:4 keeps 2 of 4 consecutive weights), not 'unstructured', not 'block RxC' "
            "(block 4x4 prunes tiles of 4 rows and 4 columns) and not 'filters'"
        )
    n, m = int(match[1]), int(match[2])
    if not 0 < n < m:
        raise ValueError(f"Pattern {text!r} must keep N of M weights with 0 < N < M, as 2:4 does")
    return NM(n, m)
