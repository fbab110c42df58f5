"""Labelled images of one size, whole in memory or on the device, and the batches that are made of them there.

read_images -> Images -> ImageBatches(step) | plain_batches          a user's DataLoader -> LoaderBatches(step)
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
