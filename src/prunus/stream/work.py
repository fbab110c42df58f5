"""The folder of finished blocks that lets a killed run go on: weights, masks and report of each, written atomically.

A block's file is complete or absent; its masks are bit-packed. `key` (a hash of everything that decides the result)
guards against mixing the blocks of two different jobs in one folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor, nn

from prunus.machine import write_json, write_tensors
from prunus.masks import pack, read_packed

__all__ = ["BlockReport", "Work"]

_FORMAT = 2  # of the files; blocks in another one are of another job


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block: zeros by layer, and the relative output error when the block was fitted."""

    name: str
    kept: Mapping[str, int]
    total: Mapping[str, int]
    seconds: float
    error_before: float | None = None
    error_after: float | None = None
    fallback: Sequence[str] = ()

    @property
    def sparsity(self) -> float:
        """Share of zeros over the block's pruned weights."""
        return 1 - sum(self.kept.values()) / sum(self.total.values()) if self.total else 0.0


class Work:
    """Finished blocks of one job under `folder`; `key` names the job.

    writes: False for the processes that compute alongside the one that writes; they read what it finished.

    Raises ValueError when the folder holds blocks of another job.
    """

    def __init__(self, folder: Path, key: str, *, writes: bool = True) -> None:
        self.folder, self.key, self.writes = Path(folder), key, writes

    def open(self) -> Work:
        """Self, after making the folder and checking that what it holds belongs to this job."""
        marker = self.folder / "job.json"
        if marker.exists():
            found = json.loads(marker.read_text())["key"]
            if found != self._named():
                raise ValueError(
                    f"{self.folder} holds unfinished blocks of another job (key {found[:12]}, this one is "
                    f"{self.key[:12]}): delete the folder, or give the run another output folder"
                )
        elif self.writes:
            write_json(marker, {"key": self._named()})
        return self

    def has(self, name: str) -> bool:
        """Whether the block was finished."""
        return self._path(name).exists()

    def save(self, name: str, block: nn.Module, masks: Mapping[str, Tensor], report: BlockReport) -> None:
        """Write the block's parameters, masks and report in one atomic step."""
        if not self.writes:
            return
        tensors = {f"weight:{key}": value for key, value in block.state_dict().items()}
        tensors |= {f"mask:{key}": pack(mask.cpu().flatten()) for key, mask in masks.items()}
        shapes = {key: list(mask.shape) for key, mask in masks.items()}
        write_tensors(self._path(name), tensors, {"report": json.dumps(asdict(report)), "masks": json.dumps(shapes)})

    def restore_(self, name: str, block: nn.Module, masks: dict[str, Tensor]) -> BlockReport:
        """The report of a finished block, after its weights went into `block` and its masks into `masks`."""
        with safe_open(self._path(name), framework="pt") as file:
            report = BlockReport(**json.loads(file.metadata()["report"]))
        masks |= self.masks(name)
        block.load_state_dict(self.tensors(name))
        return report

    def masks(self, name: str) -> dict[str, Tensor]:
        """Parameter name -> mask of a finished block."""
        path = self._path(name)
        with safe_open(path, framework="pt") as file:
            shapes: dict[str, list[int]] = json.loads(file.metadata()["masks"])
            return {key: read_packed(file.get_tensor(f"mask:{key}"), shape, str(path)) for key, shape in shapes.items()}

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Parameter and buffer name inside the block -> tensor of a finished block."""
        with safe_open(self._path(name), framework="pt") as file:
            keys = [key for key in file.keys() if key.startswith("weight:")]  # noqa: SIM118
            return {key.removeprefix("weight:"): file.get_tensor(key) for key in keys}

    def _named(self) -> str:
        return f"{self.key}-{_FORMAT}"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"
