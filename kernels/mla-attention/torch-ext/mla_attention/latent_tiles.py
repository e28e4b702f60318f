"""Tiles of `latent_attention`: large ones for packed rows, small ones for rows of a ring.

They were chosen from ahead-of-time compilations as the largest without spilled registers, not from timings.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ._runtime import Plan, power_of_two, tile_family

MAX_RANK = 512
PACKED_FROM = 1024
"""Queries times heads per item from which rows are packed: about 90 queries with 12 heads."""


class Tiles(NamedTuple):
    """Tile sizes. `widest` limits blocks of the rank; `peeled` is the kernel's PEELED, `described` that of `Plan`."""

    widest: int
    block_m: int
    block_k: int
    peeled: bool
    warps: int
    stages: int
    max_registers: int = 0
    described: bool = False


TILES = {
    80: [
        (192, Tiles(64, 128, 32, False, 8, 3)),
        (256, Tiles(128, 64, 32, False, 8, 3)),
        (512, Tiles(128, 32, 32, False, 8, 2)),
    ],
    90: [
        (64, Tiles(32, 128, 64, True, 8, 3, 128)),
        (256, Tiles(128, 128, 64, True, 8, 3)),
        (512, Tiles(128, 64, 16, False, 8, 2)),
    ],
    100: [
        (64, Tiles(64, 128, 128, False, 8, 3)),
        (192, Tiles(128, 128, 64, False, 8, 3)),
        (256, Tiles(128, 128, 64, False, 8, 2)),
        (512, Tiles(512, 64, 16, False, 8, 2)),
    ],
}
"""Tiles for packed rows in 16 bits, by family, each with the largest rank it is used for. Those of family 80 fit 99 kB
of shared memory. With 128 registers per thread, two programs of family 90 fit a multiprocessor. Described tiles take
the rank, padded, as one block of up to `widest` channels."""


def latent_plan(
    rank: int, shared: int, rows: int, dtype: torch.dtype, quantized: bool, far: bool, capability: int,
    describable: bool = True, pack: bool = False,
) -> Plan:  # fmt: skip
    """Tiles by rank, dtype, compute capability and `rows`, which counts queries times heads per item.

    `quantized` says that the ring is int8, `far` that its offsets need 64 bits; neither matters for packed rows.
    `describable` says that descriptors of the queries can be created. `pack` says that rows are packed for few queries,
    too.
    """
    many, few = rows >= PACKED_FROM, min(32 if rank <= 256 else 16, max(16, power_of_two(rows)))
    if dtype == torch.float32:
        tiles = Tiles(64, few, 16, many, 4, 1)
    elif many:
        tiles = next(tiles for limit, tiles in TILES[tile_family(capability)] if rank <= limit)
        if tiles.described and not (describable and max(16, power_of_two(rank)) <= tiles.widest):
            tiles = tiles._replace(block_k=min(64, tiles.block_k), described=False)
    else:
        slow = rank > 256 or (quantized and not pack)
        tiles = Tiles(128, few, 32 if rank <= 256 else 16, False, 8 if slow else 4, 3)
    wide, count, rest = (max(16, power_of_two(rank)), 1, 0) if tiles.described else _blocks(rank, tiles.widest)
    constants = {
        "RANK": rank,
        "WIDE": wide,
        "COUNT": count,
        "REST": rest,
        "BLOCKS": count + (rest > 0),
        "SHARED": shared,
        "PE": max(32, power_of_two(shared)) if shared else 0,
        "BLOCK_M": tiles.block_m,
        "BLOCK_K": tiles.block_k,
        "PACKED": many or pack,
        "PEELED": tiles.peeled,
        "FAR": far and not (many or pack),
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
    }
    return Plan(constants, tiles.warps, tiles.stages, tiles.max_registers, tiles.described)


def row_widths(plan: Plan) -> tuple[int, int]:
    """Padded widths of the latent and of the shared key in a packed row."""
    constants = plan.constants
    return constants["COUNT"] * constants["WIDE"] + constants["REST"], constants["PE"]


def _blocks(rank: int, widest: int) -> tuple[int, int, int]:
    """Cover the rank by powers of two: `(wide, count, rest)`, where `rest` is smaller or 0; 192 = 1 x 128 + 64.

    A narrow rest beside many wide blocks spills registers, so it has a minimum width.
    """
    wide = max(16, min(widest, power_of_two(rank + 1) // 2))
    count, left = divmod(rank, wide)
    rest = max(16 if rank <= 256 else min(64, wide), power_of_two(left)) if left else 0
    if rest != wide:
        return wide, count, rest
    # Two equal blocks become one if it is not too wide: its sums need fewer registers.
    return (2 * wide, 1, 0) if count == 1 and 2 * wide <= widest else (wide, count + 1, 0)
