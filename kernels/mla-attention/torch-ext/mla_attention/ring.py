"""Where cached rows lie: a ring of slots for each item of a batch, or one for all, and the tables that name slots.

Rows are `[B, S, T, W]`, or `[1, S, T, W]` where all items share a ring. Tables of slots are int32 `[F]`, the same for
all items, or `[B, F]`. So the streams of a pool `[lanes, S, T, W]` read and write it as one ring
`[1, lanes * S, T, W]`, each by a table that counts slots through all lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._runtime import ceil_div, check_tensor, require
from .quantise import GROUP


def check_ring(
    rows: Tensor, scales: Tensor | None, slots: Tensor, batch: int, dtype: torch.dtype, like: Tensor
) -> None:
    """Raise ValueError unless rows (int8 with scales, else of `dtype`) and slots are those of `batch` items."""
    check_tensor("rows", rows, (None,) * 4, dtype if scales is None else torch.int8, like=like)
    rings = rows.shape[0]
    require(rings == 1 or rings == batch, "rows hold {} rings, expected 1 or {}", rings, batch)
    check_tensor("slots", slots, (None,) if slots.dim() == 1 else (batch, None), torch.int32, like=rows)
    if scales is not None:
        groups = ceil_div(rows.shape[3], GROUP)
        check_tensor("scales", scales, (*rows.shape[:3], groups), torch.float16, like=rows)


def ring_index(kept: Tensor, slots: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """The index of `[B or 1, S, ...]` that gives what the slots of all items hold, `[B, F, ...]`."""
    items = torch.arange(batch, device=slots.device).clamp(max=kept.shape[0] - 1)
    return items.unsqueeze(1), slots.expand(batch, -1)


def ring_strides(rows: Tensor, scales: Tensor | None, slots: Tensor) -> tuple[int, ...]:
    """What kernels take: item, slot and token of rows and of scales, then the item of slots; 0 for what is shared."""
    strides = [(0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:3]) for x in (rows, scales) if x is not None]
    if scales is None:
        strides.append((0, 0, 0))
    return (*strides[0], *strides[1], 0 if slots.dim() == 1 else slots.stride(0))
