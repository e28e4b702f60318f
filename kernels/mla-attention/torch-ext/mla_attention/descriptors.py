"""Descriptors by which the tensor memory accelerator copies tiles of a tensor (CUDA C++ Programming Guide, "TMA").

They describe rows of all heads, of which a tile takes the channels of one. Shape letters: B batch, N tokens, H heads,
C channels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except Exception:  # Triton is missing, broken or older than descriptors
    TensorDescriptor = None

ALIGNMENT = 16
"""Bytes that must divide an address and the distance from row to row."""


def describable(x: Tensor) -> bool:
    """Whether `describe` takes `x` `[B, N, H, C]`, whose channels are contiguous: rows of all heads at one distance."""
    batch, _, heads, channels = x.shape
    item, row, head, _ = x.stride()
    aligned = x.data_ptr() % ALIGNMENT == 0 and row * x.element_size() % ALIGNMENT == 0
    regular = batch == 1 or item % max(1, row) == 0
    inside = head >= 0 and (heads - 1) * head + channels <= row
    return TensorDescriptor is not None and x.numel() > 0 and aligned and regular and inside


def describe(x: Tensor, rows: int, channels: int | None = None) -> Any:
    """A descriptor of `x` `[B, N, H, C]` by tiles of `rows` tokens and `channels` of a head, all C by default.

    Token n of item b is row `b * x.stride(0) // x.stride(1) + n`, channel c of head h column `h * x.stride(2) + c`;
    what lies behind the last row reads as 0. `describable` tells whether there is one.
    """
    batch, tokens, heads, width = x.shape
    item, row, head, _ = x.stride()
    shape = [(batch - 1) * (item // row) + tokens if batch > 1 else tokens, (heads - 1) * head + width]
    return TensorDescriptor(x, shape, [row, 1], [rows, channels or width])
