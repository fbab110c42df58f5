"""What the recipes of every task have."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import model_validator

from prunus.run.plain import Strict
from prunus.run.recipe.pruning import Prune
from prunus.run.recipe.retraining import Retrain
from prunus.run.recipe.soups import Soup
from prunus.run.recipe.values import Device

__all__ = ["Recipe", "Save"]


class Save(Strict):
    """How the model is written. packed: by its zeros, a bit a weight and the nonzeros; "zstd": compressed as well."""

    packed: bool | Literal["zstd"] = False


class Recipe(Strict):
    """What every task has; `parse` reads it as the recipe of a task, a classifier's if it has the key `images`.

    compile: the model's repeated blocks, by torch.compile. capture: training steps as a CUDA graph; "auto" on a GPU,
    where it can be done. save: whether the model is written.
    """

    model: str
    """Name, folder or file; 'embedded'; or a network such as resnet18."""
    device: Device = "auto"
    """auto, cpu, cuda or one GPU such as cuda:1."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of matrix products."""
    compile: bool = False
    """Compile the model's blocks."""
    capture: Literal["auto"] | bool = "auto"
    """Record training steps as a CUDA graph."""
    prune: Prune | None = None
    retrain: Retrain | None = None
    soup: Soup | None = None
    out: str = "runs/run"
    """Run folder."""
    save: bool | Save = True
    """Whether the model is written."""

    @property
    def packed(self) -> bool | Literal["zstd"]:
        """Whether the saved model is packed."""
        return isinstance(self.save, Save) and self.save.packed

    apart: ClassVar[int] = 1  # between the seeds of the members of a soup

    @property
    def drawn(self) -> int:
        """The seed that the members of a soup differ in."""
        return 0

    @model_validator(mode="after")
    def _check_shared(self) -> Recipe:
        if Path(self.out).is_file():
            raise ValueError(f"out: {self.out!r} is a file; give a folder")
        return self
