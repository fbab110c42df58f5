"""The folder of finished blocks that lets a killed run go on: weights, masks and report of each, written atomically.

A block's file is complete or absent; its masks are bit-packed. `key` (a hash of everything that decides the result)
guards against mixing the blocks of two different jobs in one folder.
"""

from __future__ import annotations

import json
import logging
from collections import UserDict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import Tensor, nn

from prunus.machine import json_line, json_value, read_json, read_tensors, write_json, write_tensors
from prunus.masks import pack, read_packed

__all__ = ["BlockReport", "Work"]

log = logging.getLogger(__name__)

_FORMAT = 2  # of the files; blocks in another one are of another job


@dataclass(frozen=True)
class BlockReport:
    """What happened to one block: zeros by layer, and the relative output error when the block was fitted.

    fallback: layers that no token reached, which were scored as if all inputs were alike. routed: stack of experts ->
    the tokens that each of them saw.
    """

    name: str
    kept: Mapping[str, int]
    total: Mapping[str, int]
    seconds: float
    error_before: float | None = None
    error_after: float | None = None
    fallback: Sequence[str] = ()
    routed: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Share of zeros over the block's pruned weights."""
        return 1 - sum(self.kept.values()) / sum(self.total.values()) if self.total else 0.0


class Tries(UserDict[str, float]):
    """What was tried -> what it gave, in a file with a line for each: a kill loses none but a line half written."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        super().__init__()
        self.path, self.writes = path, writes
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            with suppress(ValueError):
                name, value = json_value(line)
                self.data[name] = float(value)

    def __setitem__(self, name: str, value: float) -> None:
        self.data[name] = value
        if self.writes:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f"\n{json_line([name, value])}\n")  # its own line even after one that was cut off


class Work:
    """Finished blocks of one job under `folder`; `key` names the job.

    writes: False for the processes that compute alongside the one that writes; they read what it finished.

    Raises ValueError when the folder holds blocks of another job.
    """

    def __init__(self, folder: Path, key: str, *, writes: bool = True) -> None:
        self.folder, self.key, self.writes = Path(folder), key, writes
        self._whole = set[str]()  # blocks whose files are as they were written

    def open(self) -> Work:
        """Self, after making the folder and checking that what it holds belongs to this job."""
        marker = self.folder / "job.json"
        if marker.exists():
            found = read_json(marker)["key"]
            if found != self._named():
                raise ValueError(
                    f"{self.folder} holds unfinished blocks of another job (key {found[:12]}, this one is "
                    f"{self.key[:12]}): delete the folder, or give the run another output folder"
                )
        elif self.writes:
            write_json(marker, {"key": self._named()})
        return self

    def has(self, name: str) -> bool:
        """Whether the block was finished; one whose file is damaged is not."""
        if name not in self._whole and self._path(name).exists():
            try:
                self._read(name)
            except ValueError as error:
                log.warning("block %s is made anew: %s", name, error)
                return False
            self._whole.add(name)
        return name in self._whole

    def tries(self) -> Tries:
        """What a search tried before its first block, to go on with."""
        return Tries(self.folder / "tries.jsonl", writes=self.writes)

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
        tensors, said = self._read(name)
        masks |= _masks(tensors, said, str(self._path(name)))
        block.load_state_dict(_weights(tensors))
        return BlockReport(**json.loads(said["report"]))

    def masks(self, name: str) -> dict[str, Tensor]:
        """Parameter name -> mask of a finished block."""
        return _masks(*self._read(name), str(self._path(name)))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Parameter and buffer name inside the block -> tensor of a finished block."""
        return _weights(self._read(name)[0])

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        return read_tensors(self._path(name))

    def _named(self) -> str:
        return f"{self.key}-{_FORMAT}"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _masks(tensors: Mapping[str, Tensor], said: Mapping[str, str], path: str) -> dict[str, Tensor]:
    shapes: dict[str, list[int]] = json.loads(said["masks"])
    return {key: read_packed(tensors[f"mask:{key}"], shape, path) for key, shape in shapes.items()}


def _weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found = {key.partition("weight:")[2]: tensor for key, tensor in tensors.items()}
    return {key: tensor for key, tensor in found.items() if key}
