"""Over how many programs the keys of a tile of queries are split: a rule by the number of tiles, no tuning.

With 444 tiles on 132 multiprocessors the fourth round of programs is a third full. Splitting makes shorter
programs that fill it (Flash-Decoding; Stream-K, arXiv 2301.03598, for products), at the price of a merge.
"""

from __future__ import annotations

import torch

from ._runtime import Plan, ceil_div, tile_family

MOST = 8
LEAST_BLOCKS = 4
"""Blocks of keys that a program must have, for its start and end not to dominate."""
MERGE = 0.02
"""What another part costs, relative to the whole: written and read once more in float32."""


REGISTERS = 65536
"""Registers of a multiprocessor."""
MOST_REGISTERS = 256
"""Registers of a thread where the compiler may take as many as there are, as it does for large tiles."""
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory of a multiprocessor by family, of the devices that have the least."""


def resident(plan: Plan, shared: int, capability: int) -> int:
    """Programs of a plan that a multiprocessor holds at once, each with `shared` bytes: one, unless more surely fit."""
    registers = 32 * plan.num_warps * (plan.max_registers or MOST_REGISTERS)
    # The driver keeps a kilobyte of every program.
    return max(1, min(REGISTERS // registers, SHARED[tile_family(capability)] // (shared + 1024)))


def programs(device: torch.device, plan: Plan, shared: int, capability: int) -> int:
    """Programs of a plan that a device runs at once, 1 where it is no CUDA device."""
    units = multiprocessors(device)
    return units * resident(plan, shared, capability) if units > 1 else units


def split_count(tiles: int, key_blocks: int, programs: int) -> int:
    """The splits with the least modelled time `ceil(tiles splits / programs) / splits`, plus their merge.

    `tiles` counts the tiles of queries of all heads and items, `key_blocks` the blocks of keys that each reads,
    `programs` those that the device runs at once.
    """
    if tiles < 1 or programs < 2:
        return 1

    def modelled(splits: int) -> float:
        return ceil_div(tiles * splits, programs) / splits * (1 + MERGE * (splits - 1))

    most = max(1, min(MOST, key_blocks // LEAST_BLOCKS))
    return min(range(1, most + 1), key=modelled)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device, 1 for others. Asked of the driver once; nothing waits for the device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
