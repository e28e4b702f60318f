"""Layout of cached rows and of the slot tables that address them.

Rows are `[B, S, T, W]`, a ring of slots for each item of a batch, or `[1, S, T, W]` if all items share a ring. Slot
tables are int32: `[F]`, the same for all items, or `[B, F]`. The streams of a pool `[lanes, S, T, W]` therefore read
and write it as one ring `[1, lanes * S, T, W]`, with a table for each stream that numbers slots through all lanes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._runtime import check_tensor, require
from .quantize import row_scales, row_width


def check_ring(
    rows: Tensor, scales: Tensor | None, slots: Tensor, batch: int, dtype: torch.dtype, like: Tensor,
    rank: int, eight: int | None,
) -> None:  # fmt: skip
    """Raise ValueError unless rows (int8 if there are scales, else `dtype`) and slots fit `batch` items.

    Rows hold `rank` latents, the first `eight` of which have 8 bits and the others 4 if the rows are mixed.
    """
    check_tensor("rows", rows, (None,) * 4, dtype if scales is None else torch.int8, like=like)
    rings = rows.shape[0]
    require(rings == 1 or rings == batch, "rows hold {} rings, expected 1 or {}", rings, batch)
    check_tensor("slots", slots, (None,) if slots.dim() == 1 else (batch, None), torch.int32, like=rows)
    if eight is not None:
        require(scales is not None, "rows in 8 and 4 bits need scales")
        require(0 <= eight <= rank, "{} of {} latents have 8 bits", eight, rank)
        require((rank - eight) % 2 == 0, "{} latents in 4 bits do not fill bytes; use an even number", rank - eight)
    if scales is not None:
        least = row_width(rank, 0, eight)
        require(rows.shape[3] >= least, "rows are {} wide, expected at least {}", rows.shape[3], least)
        groups = row_scales(rank, rows.shape[3] - least, eight)
        check_tensor("scales", scales, (*rows.shape[:3], groups), torch.float16, like=rows)


def ring_index(kept: Tensor, slots: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Index into `[B or 1, S, ...]` that selects the slots of all items as `[B, F, ...]`."""
    items = torch.arange(batch, device=slots.device).clamp(max=kept.shape[0] - 1)
    return items.unsqueeze(1), slots.expand(batch, -1)


def ring_strides(rows: Tensor, scales: Tensor | None, slots: Tensor) -> tuple[int, ...]:
    """Strides for a kernel: item, slot and token of rows, then of scales, then the item of slots; 0 where shared."""
    strides = [(0 if x.shape[0] == 1 else x.stride(0), *x.stride()[1:3]) for x in (rows, scales) if x is not None]
    if scales is None:
        strides.append((0, 0, 0))
    return (*strides[0], *strides[1], 0 if slots.dim() == 1 else slots.stride(0))


def row_align(rows: Tensor) -> int:
    """The power of two, at most 16, at multiples of which the rows of a ring begin, in scalars from the first one.

    Kernels take it as a constant, because Triton knows of a stride only whether 16 divides it.
    """
    return math.gcd(16, *rows.stride()[:3])
