"""What networks learn from and are judged by: token windows of texts, image sets, and the classifiers of the papers."""

from prunus.data.chats import read_chats
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
from prunus.data.texts import ASSETS, ENDINGS, SPLITS, TextSource, read_texts
from prunus.data.tokens import (
    IGNORED,
    PackedTokens,
    Tokens,
    calibration,
    head_of,
    labels,
    mixed,
    read_tokens,
    tokenize,
    tokenize_documents,
    windows,
)

__all__ = [
    "ASSETS",
    "CORRUPTIONS",
    "ENDINGS",
    "IGNORED",
    "SPLITS",
    "Augment",
    "ImageBatches",
    "Images",
    "LoaderBatches",
    "PackedTokens",
    "Strengths",
    "TextSource",
    "Tokens",
    "build_model",
    "calibration",
    "check_corruptions",
    "corrupt",
    "head_of",
    "labels",
    "mixed",
    "plain_batches",
    "read_chats",
    "read_images",
    "read_texts",
    "read_tokens",
    "tokenize",
    "tokenize_documents",
    "windows",
]
