"""A model as a chain of blocks: found in the module tree, run one by one, recomputed or compiled where that pays."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
