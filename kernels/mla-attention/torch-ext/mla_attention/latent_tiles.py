"""The tiles of `latent_attention`: large ones that compile without spilled registers, by what they were compiled for.

They were chosen from ahead-of-time compilations at 32 shared channels, not from timings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._runtime import Plan, power_of_two, tile_family

MAX_RANK = 512


class _Tiles(NamedTuple):
    """`widest` is the widest block of the rank; `peeled` as the kernel has it."""

    widest: int
    block_m: int
    block_k: int
    peeled: bool
    warps: int
    stages: int


_TILES = {
    (80, False): [
        (192, _Tiles(64, 128, 32, False, 8, 3)),
        (256, _Tiles(128, 64, 32, False, 8, 3)),
        (512, _Tiles(128, 32, 32, False, 8, 2)),
    ],
    (80, True): [
        (128, _Tiles(128, 128, 32, False, 8, 3)),
        (192, _Tiles(64, 128, 16, False, 8, 3)),
        (256, _Tiles(128, 64, 16, False, 8, 3)),
        (512, _Tiles(128, 32, 32, False, 8, 2)),
    ],
    (90, False): [
        (96, _Tiles(64, 128, 128, True, 8, 3)),
        (128, _Tiles(128, 128, 64, True, 8, 3)),
        (192, _Tiles(64, 128, 64, True, 8, 3)),
        (256, _Tiles(128, 128, 64, True, 8, 3)),
        (512, _Tiles(128, 64, 16, False, 8, 2)),
    ],
    (90, True): [
        (96, _Tiles(64, 128, 128, True, 8, 3)),
        (256, _Tiles(64, 128, 64, True, 8, 3)),
        (512, _Tiles(128, 16, 16, False, 8, 2)),
    ],
    (100, False): [
        (64, _Tiles(64, 128, 128, False, 8, 3)),
        (192, _Tiles(128, 128, 64, False, 8, 3)),
        (256, _Tiles(128, 128, 64, False, 8, 2)),
        (512, _Tiles(512, 64, 16, False, 8, 2)),
    ],
    (100, True): [
        (64, _Tiles(64, 128, 128, False, 8, 3)),
        (256, _Tiles(128, 128, 64, False, 8, 3)),
        (512, _Tiles(128, 16, 16, False, 8, 2)),
    ],
}
"""Tiles in 16 bits by family, whether rows are int8, and the largest rank that they are for.

Latents of int8 pass through registers, so such tiles are smaller. Those of family 80 fit 99 kB of shared memory."""


def latent_plan(
    rank: int, shared: int, rows: int, dtype: torch.dtype, quantised: bool, far: bool, capability: int
) -> Plan:
    """Tiles by rank, dtype, compute capability and `rows`, the queries times the heads of an item.

    `far` says that offsets in the ring need 64 bits.
    """
    if dtype == torch.float32:
        tiles = _Tiles(64, min(32 if rank <= 256 else 16, max(16, power_of_two(rows))), 16, True, 4, 1)
    elif rows <= 32:
        block_m = max(16, power_of_two(rows))
        tiles = _Tiles(128, block_m, 16, False, 8, 2) if rank > 256 else _Tiles(128, block_m, 32, False, 4, 2)
    else:
        tiles = next(tiles for limit, tiles in _TILES[tile_family(capability), quantised] if rank <= limit)
        if shared > 32:
            # Their rotations, in float32, take the room of a stage.
            tiles = tiles._replace(block_k=min(64, tiles.block_k), stages=2)
    wide, count, rest = _blocks(rank, tiles.widest)
    constants = {
        "RANK": rank,
        "WIDE": wide,
        "COUNT": count,
        "REST": rest,
        "BLOCKS": count + (rest > 0),
        "SHARED": shared,
        "PE": max(16, power_of_two(shared)) if shared else 0,
        "BLOCK_M": tiles.block_m,
        "BLOCK_K": tiles.block_k,
        "PEELED": tiles.peeled,
        "QUANTISED": quantised,
        "FAR": far,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    return Plan(constants, tiles.warps, tiles.stages)


def _blocks(rank: int, widest: int) -> tuple[int, int, int]:
    """Powers of two that cover the rank: `wide`, how many of it, and a smaller one or 0; 192 = 1 x 128 + 64."""
    wide = max(16, min(widest, power_of_two(rank + 1) // 2))
    count, left = divmod(rank, wide)
    rest = max(16, power_of_two(left)) if left else 0
    if rest != wide:
        return wide, count, rest
    # Two blocks alike are one where it may be so wide: their sums take less room than those of two.
    return (2 * wide, 1, 0) if count == 1 and 2 * wide <= widest else (wide, count + 1, 0)
