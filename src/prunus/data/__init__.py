"""What networks learn from and are judged by: token windows of texts, image sets, and the classifiers of the papers."""

from prunus.data.images import (
    CORRUPTIONS,
    Augment,
    ImageBatches,
    Images,
    LoaderBatches,
    check_corruptions,
    corrupt,
    plain_batches,
    read_images,
)
from prunus.data.images.corruptions import Strengths
from prunus.data.models import build_model
from prunus.data.texts import (
    ASSETS,
    SPLITS,
    PackedTokens,
    calibration,
    read_texts,
    tokenize,
    tokenize_documents,
    windows,
)

__all__ = [
    "ASSETS",
    "CORRUPTIONS",
    "SPLITS",
    "Augment",
    "ImageBatches",
    "Images",
    "LoaderBatches",
    "PackedTokens",
    "Strengths",
    "build_model",
    "calibration",
    "check_corruptions",
    "corrupt",
    "plain_batches",
    "read_images",
    "read_texts",
    "tokenize",
    "tokenize_documents",
    "windows",
]
