"""A folder of weights: which files count, in transformers' own order, and every tensor that they hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunus.checkpoint.gguf import plain
from prunus.checkpoint.packed import PACKED_NAME, read_packed
from prunus.checkpoint.stored import PICKLES, Stored, read_header
from prunus.machine import read_json

__all__ = ["ADAPTER", "ADAPTER_TENSORS", "INDEX_NAME", "SINGLE_NAME", "Checkpoint", "read_checkpoint", "weight_files"]

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
ADAPTER, ADAPTER_TENSORS = "adapter_config.json", "adapter_model.safetensors"  # peft's and ours
_PLACES = (SINGLE_NAME, INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")
_PACKED = ("packed.safetensors", "packed.safetensors.index.json")
_WEIGHTS = (".safetensors", *PICKLES, ".gguf")


@dataclass(frozen=True)
class Checkpoint:
    """Weights on disk: a folder or file, its weight files, and name -> tensor in the order of the files."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Stored]

    @property
    def folder(self) -> Path:
        """Where config, tokenizer and masks lie."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def is_packed(self) -> bool:
        """Whether transformers cannot read it as it is."""
        return (self.path / PACKED_NAME).is_file()

    @property
    def bytes(self) -> int:
        """Of all weight files."""
        return sum(file.stat().st_size for file in self.files)

    def dtype(self, config: Any) -> torch.dtype:
        """What transformers loads it in: what the config says, else the first floating-point tensor's."""
        floating = (each.dtype for each in self.tensors.values() if each.dtype.is_floating_point)
        return getattr(config, "dtype", None) or next(floating, torch.float32)

    def config(self) -> dict[str, Any]:
        """What config.json says; empty without one. Raises ValueError for one that is no object."""
        path = self.folder / "config.json"
        found = read_json(path) if path.is_file() else {}
        if not isinstance(found, dict):
            raise ValueError(f"{path} is no object: it was damaged or edited: get it again")
        return found


def read_checkpoint(path: str | Path) -> Checkpoint:
    """What a folder or weight file holds; only headers are read, but a .gguf file is dequantised first.

    The tensors of a packed folder are those that were packed.

    Raises FileNotFoundError for a path or shard that is not there; ValueError for a folder without weights, and for
    files that are damaged, half downloaded or pointers.

    >>> read_checkpoint("out/model").tensors["lm_head.weight"].shape
    (4096, 64)
    """
    path = plain(Path(path))
    files = weight_files(path)
    if (path / PACKED_NAME).is_file():
        return Checkpoint(path, tuple(files), read_packed(path, files))
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file)[0].items():
            if name in tensors:
                raise ValueError(f"{name!r} is stored twice, in {tensors[name].file} and {file}; keep one of them")
            tensors[name] = stored
    if not tensors:
        raise ValueError(f"{path} holds no tensor: it is no checkpoint")
    return Checkpoint(path, tuple(files), tensors)


def weight_files(path: Path) -> list[Path]:
    """The weight files of a checkpoint: a file itself, or those of a folder that transformers would read.

    Raises as `read_checkpoint`.

    >>> weight_files(Path("out/model"))
    [PosixPath('out/model/model.safetensors')]
    """
    if path.is_file():
        if path.suffix not in _WEIGHTS[:-1]:
            raise ValueError(f"{path} is no .safetensors file; give a folder as transformers saves it")
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there; give a local model folder or a .safetensors file")
    for name in _PACKED if (path / PACKED_NAME).is_file() else _PLACES:
        if (path / name).is_file():
            return _indexed(path / name) if name.endswith(".json") else [path / name]
    found = sorted(each.name for each in path.iterdir() if each.suffix in _WEIGHTS)
    beside = f"; of what lies there ({', '.join(found[:3])}) name one file" if found else ""
    beside = f", such as {path / 'model'}" if (path / "model" / "config.json").is_file() else beside
    raise ValueError(f"{path} holds neither {SINGLE_NAME} nor {INDEX_NAME}: give a folder of transformers{beside}")


def _indexed(index: Path) -> list[Path]:
    """The shards that an index lists."""
    listed = read_json(index)
    shards = listed.get("weight_map") if isinstance(listed, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise ValueError(f"{index} is no index of shards: it has no weight_map of file names; download it again")
    files = [index.parent / name for name in dict.fromkeys(shards.values())]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise FileNotFoundError(f"{index.parent} lacks {', '.join(missing)}, named in {index.name}; download it again")
    return files
