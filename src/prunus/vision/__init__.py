"""Classifiers of images and texts: what a recipe asks of one, as jobs; single runs, soups, grids and sweeps of them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
