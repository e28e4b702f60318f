"""Over how many programs the keys of a tile of queries are split: a rule by the number of tiles, no tuning.

With 444 tiles on 132 multiprocessors the fourth round of programs is a third full. Splitting makes shorter
programs that fill it (Flash-Decoding; Stream-K, arXiv 2301.03598, for products), at the price of a merge.
"""

from __future__ import annotations

import torch

from ._runtime import ceil_div

MOST = 8
LEAST_BLOCKS = 4
"""Blocks of keys that a program must have, for its start and end not to dominate."""
MERGE = 0.02
"""What another part costs, relative to the whole: written and read once more in float32."""


def split_count(tiles: int, key_blocks: int, multiprocessors: int) -> int:
    """The splits with the least modelled time `ceil(tiles splits / multiprocessors) / splits`, plus their merge.

    `tiles` counts the tiles of queries of all heads and items, `key_blocks` the blocks of keys that each reads.
    """
    if tiles < 1 or multiprocessors < 2:
        return 1

    def modelled(splits: int) -> float:
        return ceil_div(tiles * splits, multiprocessors) / splits * (1 + MERGE * (splits - 1))

    most = max(1, min(MOST, key_blocks // LEAST_BLOCKS))
    return min(range(1, most + 1), key=modelled)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device, 1 for others. Asked of the driver once; nothing waits for the device."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
