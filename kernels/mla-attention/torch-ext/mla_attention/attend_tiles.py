"""Tiles of `attend`.

They were chosen from ahead-of-time compilations as the largest without spilled registers, not from timings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._runtime import blocks, power_of_two, tile_family


class Tiles(NamedTuple):
    """BLOCK_Q, BLOCK_K, warps, stages, and options that only some devices have.

    With `described`, the TMA copies tiles by descriptors. With `ahead` (only if `described`), the logits of the next
    block are computed before the softmax of the current one. `max_registers` is that of `Plan`.
    """

    block_q: int
    block_k: int
    warps: int
    stages: int
    described: bool = False
    ahead: bool = False
    max_registers: int = 0


NARROW = 128
"""Most padded channels for which tiles are described: one block of keys and one of values."""

TILES = {
    80: [(160, Tiles(128, 32, 8, 3)), (256, Tiles(128, 32, 8, 2))],
    90: [(128, Tiles(128, 128, 8, 3)), (256, Tiles(128, 64, 8, 3))],
    100: [(128, Tiles(128, 128, 8, 2)), (256, Tiles(128, 64, 8, 3))],
}
"""Tiles for many queries in 16 bits, by family, each with the most padded channels it is used for."""


DESCRIBED: dict[int, Tiles] = {90: Tiles(128, 128, 8, 2, described=True, ahead=True)}
"""Tiles by family for many queries of heads with at most 128 channels (one block), if descriptors can be created.

The entry for 90 comes from counting, not timing. For a block of 128 queries and 128 keys, a multiprocessor needs about
1,000 clocks for each of the two products and about as many for the exponentials. With the other tiles, every
exponential waits for the first product, the second product waits for every exponential, and barriers keep both warp
groups in step: 3,000 clocks. With `ahead`, the first product of the next block is issued between the instructions of
the exponentials and runs while they are computed, without spilled registers. Tiles of 64 keys compile to code that
waits before the exponentials anyway.
"""


def tiles(
    channels: int, value_channels: int, queries: int, dtype: torch.dtype, capability: int, describable: bool
) -> Tiles:
    """Tiles for heads of this many channels; `describable` says that descriptors of them can be created."""
    (d1, d2), (v1, v2) = blocks(channels), blocks(value_channels)
    width, family = max(d1 + d2, v1 + v2), tile_family(capability)
    if dtype == torch.float32:
        return Tiles(min(32, max(16, power_of_two(queries))), 32 if width <= 128 else 16, 4, 1)
    if queries <= 32:
        return Tiles(max(16, power_of_two(queries)), 64 if width <= 160 else 32, 4, 2)
    whole = (d1, d2, v1, v2) == (channels, 0, value_channels, 0)
    if describable and whole and width <= NARROW and family in DESCRIBED:
        return DESCRIBED[family]
    return next(tiles for limit, tiles in TILES[family] if width <= limit)
