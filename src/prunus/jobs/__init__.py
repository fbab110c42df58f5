"""What runs of every task share: their folder, what they will do, jobs with their store and pool, averages on disk."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
