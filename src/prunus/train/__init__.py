"""The one training loop and what belongs to it: schedules, hooks, averaged weights, captured steps, checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
