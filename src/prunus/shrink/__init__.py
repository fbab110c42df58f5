"""Networks that are really smaller: filters and neurons that go, layers as two thinner ones."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
