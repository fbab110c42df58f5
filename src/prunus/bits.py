"""Bool matrices packed by rows: 8 entries a byte, lowest bit first, every row starting in a byte of its own.

A mask beside a weight of 16 bits then costs a sixteenth of it, in memory and whenever it is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kept_rows", "pack", "unpack"]

_CHUNK = 1 << 24  # entries packed at once: 64 MiB of temporaries


def pack(mask: Tensor) -> Tensor:
    """(rows, columns) bool -> (rows, ceil(columns / 8)) uint8.

    >>> pack(torch.tensor([[True, False, True], [False, False, False]])).tolist()
    [[5], [0]]
    """
    rows, columns = mask.shape
    width = -(-columns // 8)
    packed = torch.empty(rows, width, dtype=torch.uint8, device=mask.device)
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=mask.device)
    step = max(1, _CHUNK // max(1, columns))
    for start in range(0, rows, step):
        part = torch.nn.functional.pad(mask[start : start + step].to(torch.uint8), (0, 8 * width - columns))
        packed[start : start + step] = (part.view(-1, width, 8) * weights).sum(
            -1, dtype=torch.uint8
        )  # (rows, bytes, 8)
    return packed


def unpack(packed: Tensor, columns: int) -> Tensor:
    """(rows, ceil(columns / 8)) uint8 -> (rows, columns) bool.

    >>> unpack(torch.tensor([[5]], dtype=torch.uint8), 3).tolist()
    [[True, False, True]]
    """
    rows, width = packed.shape
    bytes_ = _TABLE.to(packed.device).index_select(0, packed.flatten().int())  # 8 entries each
    return bytes_.view(torch.bool).view(rows, 8 * width)[:, :columns]


# Byte -> its 8 entries, as the 8 bytes of an integer: one look-up a byte is 40 times faster than shifts on a CPU.
_TABLE = ((torch.arange(256).unsqueeze(1) >> torch.arange(8)) & 1).to(torch.uint8).view(torch.int64).flatten()


def kept_rows(mask: Tensor, rows: slice, columns: int) -> Tensor:
    """The rows of a mask as bool, be it packed or bool already.

    >>> kept_rows(torch.ones(3, 4, dtype=torch.bool), slice(0, 2), 4).shape
    torch.Size([2, 4])
    """
    return unpack(mask[rows], columns) if mask.dtype == torch.uint8 else mask[rows]
