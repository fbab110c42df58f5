"""Language models: what a recipe asks of one, in stages; its single run, and the jobs of grids and soups."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
