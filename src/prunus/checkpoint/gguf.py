"""A .gguf file as a plain checkpoint: dequantised once into a folder of safetensors, and read like any other.

model.gguf ─ transformers ─▶ $PRUNUS_CACHE/models/HASH/   config, tokenizer, float32 weights
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from prunus.machine import atomic_folder, cache, import_extra, without_bars

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["plain"]

_ENDS = 1 << 20


def plain(path: Path) -> Path:
    """The folder of the causal language model in a GGUF file, in float32, with its tokenizer; other paths as they are.

    It is made once, by the file's size, time and ends, while memory holds the whole model; it may be deleted at any
    time. Raises ImportError without the package gguf; ValueError for a file that does not open or is no such model, and
    for tensors that are missing or still quantised; OSError where the folder cannot be written.

    >>> plain(Path("out/model"))
    PosixPath('out/model')
    """
    if path.suffix != ".gguf" or not path.is_file():
        return path
    import_extra("gguf", "gguf", f"model: {str(path)!r} needs the extra")
    said, found = blake2b(digest_size=16), path.stat()
    with path.open("rb") as opened:
        said.update(f"{path.name} {found.st_size} {found.st_mtime_ns} ".encode() + opened.read(_ENDS))
        opened.seek(max(0, found.st_size - _ENDS))  # the head of a tuned model, its words, is that of the other
        said.update(opened.read())
    folder = cache("models") / said.hexdigest()
    try:
        _make(folder, path)
    except OSError as error:
        raise OSError(f"{error}; PRUNUS_CACHE names another folder for what is made of GGUF files") from error
    return folder


def _make(folder: Path, file: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            model, tokenizer = _opened(file)
            with atomic_folder(folder) as partial, without_bars():
                model.save_pretrained(partial)
                tokenizer.save_pretrained(partial)


def _opened(file: Path) -> tuple[PreTrainedModel, Any]:
    """The model, plain, with nothing random in it, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    how = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32, "output_loading_info": True}
    try:
        with without_bars():
            model, loading = AutoModelForCausalLM.from_pretrained(**place, **how)  # type: ignore[misc]
            tokenizer = AutoTokenizer.from_pretrained(**place)
    except Exception as error:  # numpy's and the tokenizers library's own among them
        if isinstance(error, (ImportError, MemoryError)):
            raise
        why = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model: {str(file)!r} is no GGUF file of a causal language model that opens ({type(error).__name__}: "
            f"{why}); get it again, or give a folder of safetensors"
        ) from None
    packed = [name for name, each in model.named_parameters() if not each.is_floating_point()]
    if packed or loading["missing_keys"]:
        name = [*packed, *sorted(loading["missing_keys"])][0]
        raise ValueError(
            f"model: {str(file)!r}: {name!r} is {'still quantised' if packed else 'missing'}; give a folder of "
            "safetensors"
        )
    vars(model.config).pop("quantization_config", None)  # the folder is that of an ordinary model
    return model, tokenizer
