"""Triton programs for what is bound by memory or launches, each beside the plain function it replaces.

`switch` says which of the two runs. A program is imported when its name is first used, because Triton is not
everywhere that torch is; the names are those of `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
