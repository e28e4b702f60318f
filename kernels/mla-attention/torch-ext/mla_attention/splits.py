"""Choose how many programs split the keys of one tile of queries: a rule based on the number of tiles, no tuning.

For example, 444 tiles on 132 multiprocessors leave the fourth round of programs one third full. Splitting fills it with
shorter programs, at the cost of a merge (Flash-Decoding; Stream-K, arXiv 2301.03598, for matrix products).
"""

from __future__ import annotations

import functools

import torch

from ._runtime import Plan, capability, ceil_div, tile_family

MOST = 8
LEAST_BLOCKS = 4
"""Minimum number of key blocks per program; with fewer, prologue and epilogue dominate."""
MERGE = 0.02
"""Cost of each additional part relative to the whole: it is written and read again in float32."""


REGISTERS = 65536
"""Registers per multiprocessor."""
MOST_REGISTERS = 256
"""Registers per thread if the compiler has no limit, as large tiles use them."""
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory per multiprocessor, by family: the smallest of its devices."""


def resident(plan: Plan, shared: int, capability: int) -> int:
    """Programs that a multiprocessor holds at once, each with `shared` bytes: one unless more are certain to fit."""
    registers = 32 * plan.num_warps * (plan.max_registers or MOST_REGISTERS)
    # The driver reserves 1 kB per program.
    return max(1, min(REGISTERS // registers, SHARED[tile_family(capability)] // (shared + 1024)))


def programs(device: torch.device, plan: Plan, shared: int) -> int:
    """Programs of a plan that a device runs at once; 1 if it is not a CUDA device."""
    units = multiprocessors(device)
    return units * resident(plan, shared, capability(device)) if units > 1 else units


@functools.cache
def split_count(tiles: int, key_blocks: int, programs: int) -> int:
    """The number of splits with the lowest modeled time: `ceil(tiles splits / programs) / splits` plus the merge.

    `tiles` counts the query tiles of all heads and items, `key_blocks` the blocks of keys that each tile reads, and
    `programs` the programs that the device runs at once.
    """
    if tiles < 1 or programs < 2:
        return 1

    def modeled(splits: int) -> float:
        return ceil_div(tiles * splits, programs) / splits * (1 + MERGE * (splits - 1))

    most = max(1, min(MOST, key_blocks // LEAST_BLOCKS))
    return min(range(1, most + 1), key=modeled)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device, 1 for others. Cached after one driver query; nothing waits for the device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
