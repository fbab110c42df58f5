"""Pruning and retraining in phases, and averages of members that share a mask.

`imp` is the loop over phases, `sms` the loop with several members a phase, `average` how they are mixed.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
