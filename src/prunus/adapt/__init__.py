"""Which parameters are trained: subsets, low-rank adapters whose effective weights keep every zero, their merge.

`adapt` chooses and puts in place, `effective` computes, `adapters` are the modules that use it, `sites` says where an
adapter sits and merges it back.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
