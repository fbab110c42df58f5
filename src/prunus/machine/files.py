"""Files that are complete or absent: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

__all__ = ["atomic", "write_json", "write_tensors", "write_text"]


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Generator[Path]:
    """A path beside `path` to write to, moved there in one step at the end, or deleted after an error.

    Makes the folder if need be. Several threads and processes may write the same file: the last one's stays.

    >>> with atomic(Path("out/state.pt")) as partial:
    ...     torch.save(model.state_dict(), partial)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial{os.getpid()}-{threading.get_ident()}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8 in one atomic step.

    >>> write_text(Path("out/notes.txt"), "done")
    """
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON to `path` in one atomic step; what JSON does not know is written as text.

    >>> write_json(Path("out/result.json"), {"perplexity": 12.5})
    """
    write_text(path, json.dumps(value, indent=1, default=str) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors of any device and layout to a safetensors file in one atomic step.

    Tied weights share memory, which safetensors refuses: each is written by itself.

    >>> write_tensors(Path("out/model.safetensors"), model.state_dict())
    """
    plain, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        own = tensor.detach().cpu().contiguous()
        storage = own.untyped_storage().data_ptr()
        plain[name] = own.clone() if storage in seen else own
        seen.add(storage)
    with atomic(path) as partial:
        save_file(plain, partial, metadata=None if metadata is None else dict(metadata))
