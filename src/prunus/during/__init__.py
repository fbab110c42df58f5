"""Methods that prune while training, one file each, behind the hooks of `prunus.train.During`.

A new method is one file with one class, and one line in `__init__.pyi`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
