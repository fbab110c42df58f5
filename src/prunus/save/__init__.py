"""Saving: an ordinary Hugging Face folder that loads with nothing of ours installed, and our own files beside it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
