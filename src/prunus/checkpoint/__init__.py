"""Weights on disk: which files count, every tensor they hold, and whether they are the model that they should be."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
