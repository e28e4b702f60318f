"""Tiles of `expand_kv_`.

They were chosen from ahead-of-time compilations as the widest without spilled registers, not from timings. For compute
capability 9.0 they are the widest of which two programs fit a multiprocessor (98 kB of shared memory each, at most 128
registers per thread), so that one multiplies while the other loads or stores. Tiles twice as wide would read 30 % less
through the L2 cache, but then a single program per multiprocessor could not hide its loads and stores.
"""

from __future__ import annotations

from typing import NamedTuple


class Tiles(NamedTuple):
    """Most channels of several heads, keys, scalars of the rank per step, warps and stages."""

    width: int
    block_m: int
    block_r: int
    warps: int
    stages: int


TILES = {80: Tiles(128, 128, 64, 8, 3), 90: Tiles(128, 128, 64, 8, 3), 100: Tiles(256, 128, 64, 8, 3)}
"""Tiles in 16 bits, by family."""

UNTUNED = {80: Tiles(128, 128, 64, 8, 3), 90: Tiles(128, 128, 64, 8, 3), 100: Tiles(256, 128, 64, 8, 3)}
"""Tiles for rows in 8 and 4 bits and for ranks that 4 does not divide. These need more registers than what
`benchmarks/tune.py` measures, so they would spill with some of the candidates; it does not change these tiles."""
