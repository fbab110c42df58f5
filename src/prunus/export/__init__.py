"""Saving: an ordinary Hugging Face folder that loads with nothing of ours installed, and our own files beside it."""

from prunus.export.folder import SavedModel, load_info, save_model, save_tensors
from prunus.export.shards import ShardWriter

__all__ = ["SavedModel", "ShardWriter", "load_info", "save_model", "save_tensors"]
