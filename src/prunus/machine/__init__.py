"""What a process runs on: files that are complete or absent, ranks, cores, and how a model runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
