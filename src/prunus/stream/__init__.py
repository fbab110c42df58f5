"""Pruning block by block, from memory or from disk: observe, solve, fit, hand on, write, free.

`stream` is the loop; `work` the folder from which a killed run goes on.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
