"""`prunus demo vision`: the handwritten digits, a narrow ResNet, and ways back from 95 % zeros.

It is an ordinary small grid, so its folder holds what every grid's does: tables, pictures, and the dense training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prunus.recipe import merge, parse
from prunus.run.compare import compare
from prunus.run.grid import Grid
from prunus.run.show import show_grid

__all__ = ["demo", "recipe"]

EPOCHS, RETRAINED = 12, 4


def recipe(sparsity: float, out: Path) -> dict[str, Any]:
    """The grid: what is retrained, and what is pruned during training, is trained for the same epochs in all."""
    after: dict[str, Any] = {"prune.sparsity": sparsity}
    return {
        "base": {
            "images": "digits",
            "model": "resnet8",
            "train": {
                "epochs": EPOCHS,
                "batch_size": 64,
                "lr": 0.1,
                "warmup": 1,
                "augment": {"crop": 1},
            },
        },
        "axes": {
            "method": {
                "dense": {},
                "pruned": after,
                "FT": {**after, "retrain": {"schedule": "ft", "epochs": RETRAINED}},
                "LLR": {**after, "retrain": {"schedule": "llr", "epochs": RETRAINED}},
                "ALLR": {**after, "retrain": {"schedule": "allr", "epochs": RETRAINED}},
                "BIMP": {
                    **after,
                    "train.epochs": EPOCHS // 2,
                    "prune.phases": 2,
                    "retrain": {"schedule": "llr", "epochs": EPOCHS - EPOCHS // 2 + RETRAINED, "of": "total"},
                },
                "GMP": {**after, "train.epochs": EPOCHS + RETRAINED, "during": {"gmp": {}}},
            }
        },
        "seeds": [0, 1, 2],
        "show": {"columns": ["dense", "pruned", "recalibrated", "sparsity", "epochs", "seconds"]},
        "out": str(out),
    }


def demo(out: Path, sparsity: float = 0.95, device: str = "auto") -> list[dict[str, Any]]:
    """The rows of the demo's grid; a killed demo goes on. Raises ValueError for a sparsity outside [0, 1)."""
    grid = parse(merge(recipe(sparsity, out), {"base.device": device}), Grid, "demo")
    rows = compare(grid, together=2)  # a thread each: so small a network gains nothing from two
    show_grid(rows, out, title=f"handwritten digits, {100 * sparsity:g} % zeros; accuracy in %")
    return rows
