"""What networks learn from and are judged by: token windows of texts, image sets, and the classifiers of the papers."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
