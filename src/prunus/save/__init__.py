"""Saving: an ordinary Hugging Face folder that loads with nothing of ours installed, and our own files beside it."""

from prunus.save.average import average_folders
from prunus.save.folder import (
    FORMAT,
    INFO_NAME,
    MASKS_NAME,
    SIZE_NOTE,
    SavedModel,
    load_info,
    save_model,
    save_tensors,
)
from prunus.save.shards import ShardWriter

__all__ = [
    "FORMAT",
    "INFO_NAME",
    "MASKS_NAME",
    "SIZE_NOTE",
    "SavedModel",
    "ShardWriter",
    "average_folders",
    "load_info",
    "save_model",
    "save_tensors",
]
