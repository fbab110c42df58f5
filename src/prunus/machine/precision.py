"""In which precision matrix products are done while a model runs: one word for training, calibration and evaluation."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Precision", "autocast", "full_products", "no_autocast", "of_training", "product_dtype"]

Precision = Literal["fp32", "bf16", "fp16"]


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """Context in which products run in `precision`; with "fp32" every operation keeps its operands' own dtype.

    Raises ValueError for another word.

    >>> with autocast(torch.device("cpu"), "bf16"):
    ...     print((torch.ones(2, 2) @ torch.ones(2, 2)).dtype)
    torch.bfloat16
    """
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise ValueError(f"precision is fp32, bf16 or fp16; got {precision!r}")
    dtype = dtypes[precision]
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context without autocast on the device of `x`.

    >>> with torch.autocast("cpu"), no_autocast(torch.ones(1)):
    ...     torch.is_autocast_enabled("cpu")
    False
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def of_training(model: nn.Module, precision: Precision) -> Precision:
    """`precision`, or "fp32" (every operation in its operands' dtype) where all parameters are stored in it already.

    Products are the same. Autocast would take what enters and leaves every norm through float32, a tenth of a step's
    time, and norms reckon in float32 inside anyway. Call it before `adapt`, and not for "full", whose weights turn
    float32.

    >>> of_training(nn.Linear(2, 2).bfloat16(), "bf16")
    'fp32'
    """
    stored = {parameter.dtype for parameter in model.parameters()}
    return "fp32" if precision == "bf16" and stored == {torch.bfloat16} else precision


@contextmanager
def full_products() -> Generator[None]:
    """While active, products of float32 matrices on CUDA are float32 too, not TF32, whatever the process has set.

    >>> with full_products():
    ...     print(torch.backends.cuda.matmul.fp32_precision)
    ieee
    """
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def product_dtype(weight: Tensor) -> torch.dtype:
    """In which dtype products with a weight run: autocast's, or the weight's own.

    >>> product_dtype(torch.ones(1))
    torch.float32
    """
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
