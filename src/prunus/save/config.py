"""config.json of a saved model: the source's own bytes, or the source's text with the few keys that had to change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from prunus.machine import write_text

__all__ = ["source_folder", "write_config"]

# What loading and training set on a config object without changing the model.
_RUNTIME = {
    "_attn_implementation",
    "_attn_implementation_internal",
    "_experts_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "output_attentions",
    "output_hidden_states",
    "quantization_config",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def source_folder(source: str | Path | None) -> Path | None:
    """The local folder behind a folder path or a Hugging Face name (its cached snapshot); None when there is none."""
    if source is None or Path(source).is_dir():
        return None if source is None else Path(source)
    if str(source).count("/") > 1 or Path(source).exists():
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(str(source), "config.json")
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def write_config(config: Any, path: Path, source: Path | None, *, dtype: torch.dtype | None) -> None:
    """Write `path` from the source folder's config.json if there is one, else leave what transformers wrote.

    config: the model's transformers config, or None for unchanged.
    dtype: of the saved weights. A source that declares another one gets this key changed, since loaders cast to it.

    Raises ValueError when neither the source nor the folder has a config.json.
    """
    origin = source / "config.json" if source is not None else None
    if origin is None or not origin.is_file():
        if not path.is_file():
            raise ValueError(f"{source} has no config.json and no model was given to write one from")
        return
    text = origin.read_text(encoding="utf-8")
    stored = json.loads(text)
    changes = {} if config is None else _changes(config, origin)
    key = "torch_dtype" if "torch_dtype" in stored else "dtype"
    if dtype is not None and key in stored and stored[key] != str(dtype).removeprefix("torch."):
        changes[key] = str(dtype).removeprefix("torch.")
    if changes:
        text = json.dumps({**stored, **changes}, indent=2, ensure_ascii=False) + "\n"
        write_text(path, text)
    else:
        path.unlink(missing_ok=True)
        path.write_bytes(origin.read_bytes())


def _changes(config: Any, origin: Path) -> dict[str, Any]:
    """Keys of `config` whose values differ from what the source's config.json gives."""
    now: dict[str, Any] = config.to_dict()
    then: dict[str, Any] = type(config).from_pretrained(str(origin.parent)).to_dict()
    return {key: value for key, value in now.items() if key not in _RUNTIME and then.get(key) != value}
