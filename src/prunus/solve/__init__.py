"""Criteria that choose inside a layer, and may move the weights that stay: SparseGPT, Frank-Wolfe with swaps.

A new one is a function that returns a `Criterion`, in a file of its own, and one entry in `__all__`: everything there
can be named in recipes.
"""

from prunus.solve.frank_wolfe import frank_wolfe
from prunus.solve.sweep import sparsegpt

__all__ = ["frank_wolfe", "sparsegpt"]
