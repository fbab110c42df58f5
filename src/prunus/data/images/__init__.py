"""Labelled images of one size, whole in memory or on the device, and the batches that are made of them there.

read_images -> Images -> ImageBatches(step) | plain_batches          a user's DataLoader -> LoaderBatches(step)
Images -> corrupt -> Images
"""

from prunus.data.images.batches import Augment, ImageBatches, LoaderBatches, plain_batches
from prunus.data.images.corruptions import CORRUPTIONS, check_corruptions, corrupt
from prunus.data.images.read import read_images
from prunus.data.images.sets import Images

__all__ = [
    "CORRUPTIONS",
    "Augment",
    "ImageBatches",
    "Images",
    "LoaderBatches",
    "check_corruptions",
    "corrupt",
    "plain_batches",
    "read_images",
]
