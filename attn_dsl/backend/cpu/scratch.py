"""Buffers that are kept from tile to tile and from call to call.

A fresh tensor of a tile's size costs more in page faults than the arithmetic that fills it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

_local = threading.local()
KEEP = 1 << 24
"""Buffers of more bytes than this are not kept."""


def scratch(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized contiguous tensor; it stays valid until this thread asks for the same name again."""
    buffers: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    count = math.prod(shape)
    flat = buffers.get((name, dtype))
    if flat is None or flat.numel() < count:
        flat = torch.empty(count, dtype=dtype)
        if count * dtype.itemsize <= KEEP:
            buffers[name, dtype] = flat
    return flat[:count].view(shape)
