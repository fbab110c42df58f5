"""How much each weight matters, what calibration learnt to say it, and how many weights each layer keeps."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
