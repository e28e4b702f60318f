"""Tensor descriptors for the Tensor Memory Accelerator (TMA; CUDA C++ Programming Guide, "TMA").

A descriptor covers rows of all heads; a tile takes the channels of one head. Shape letters: B batch, N tokens, H heads,
C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except Exception:  # Triton is missing, broken, or too old to have descriptors
    TensorDescriptor = None

ALIGNMENT = 16
"""Alignment in bytes of the base address and of the row stride."""


def describable(x: Tensor) -> bool:
    """Whether `describe` accepts `x` `[B, N, H, C]` with contiguous channels: rows are aligned and equally spaced."""
    batch, _, heads, channels = x.shape
    item, row, head, _ = x.stride()
    aligned = x.data_ptr() % ALIGNMENT == 0 and row * x.element_size() % ALIGNMENT == 0
    regular = batch == 1 or item % max(1, row) == 0
    inside = head >= 0 and (heads - 1) * head + channels <= row
    return TensorDescriptor is not None and x.numel() > 0 and aligned and regular and inside


def describe(x: Tensor, rows: int, channels: int | None = None) -> Any:
    """A descriptor of `x` `[B, N, H, C]` with tiles of `rows` tokens and `channels` of a head (default: all C).

    Token n of item b is row `b * x.stride(0) // x.stride(1) + n`; channel c of head h is column `h * x.stride(2) + c`.
    Reads past the last row return 0. Call it only if `describable(x)`.
    """
    batch, tokens, heads, width = x.shape
    item, row, head, _ = x.stride()
    shape = [(batch - 1) * (item // row) + tokens if batch > 1 else tokens, (heads - 1) * head + width]
    return TensorDescriptor(x, shape, [row, 1], [rows, channels or width])
