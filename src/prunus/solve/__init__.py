"""Criteria that choose inside a layer, and may move the weights that stay: SparseGPT, Frank-Wolfe with swaps.

A new one is a function that returns a `Criterion`, in a file of its own, and one line in `__init__.pyi`: everything
there can be named in recipes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
