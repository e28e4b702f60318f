"""Parses the number of bits in which a cache stores its latents, and computes the bytes of a row."""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

GROUP = 64
"""8-bit scalars per scale."""

GROUP_OF_FOUR = 32
"""4-bit scalars per scale."""

SCALE_BYTES = 2

CacheBits = Literal["auto", "int8"] | tuple[tuple[int, int], ...]
"""`auto` (the model's dtype), `int8`, or pairs (numbers of the latent, bits); the last pair takes all that remain."""


def check_bits(cache: CacheBits) -> CacheBits:
    """Check `cache` and return it. Raises ValueError for bits other than 8 and 4, and where bits increase."""
    if isinstance(cache, str):
        return cache
    bits = [width for _, width in cache]
    if not bits or any(count < 1 for count, _ in cache) or not {4, 8}.issuperset(bits):
        raise ValueError("give pairs of a number of latents and 8 or 4 bits, such as [[24, 8], [64, 4]]")
    if bits != sorted(bits, reverse=True):
        raise ValueError("the first latents matter most; put the pairs of 8 bits before those of 4")
    return cache


class RowBits(NamedTuple):
    """Scalars of a row `[c | k_pe]`: those of the latent in 8 bits, then in 4 bits, and the shared key in 8 bits."""

    eight: int
    four: int
    key: int

    @property
    def scalars(self) -> int:
        """Scalars of a row."""
        return self.eight + self.four + self.key

    @property
    def values(self) -> int:
        """Bytes of a row without its scales."""
        return self.eight + self.four // 2 + self.key

    @property
    def scales(self) -> tuple[int, int, int]:
        """Number of scales of each part."""
        return -(-self.eight // GROUP), -(-self.four // GROUP_OF_FOUR), -(-self.key // GROUP)


def is_mixed(cache: CacheBits) -> bool:
    """Whether some of the latent is stored in 4 bits."""
    return not isinstance(cache, str) and any(bits == 4 for _, bits in cache)


def row_bits(cache: CacheBits, latents: int, key: int) -> RowBits:
    """The layout of a row of `latents` and `key` scalars where part of the latent is stored in 4 bits.

    Two 4-bit numbers fill a byte, so if their count were odd, one more number gets 8 bits.
    """
    eight = 0 if isinstance(cache, str) else min(latents, sum(count for count, bits in cache[:-1] if bits == 8))
    eight += (latents - eight) % 2
    return RowBits(eight, latents - eight, key)


def row_bytes(cache: CacheBits, latents: int, key: int, itemsize: int) -> int:
    """Bytes of a row of `latents` and `key` scalars; `itemsize` is that of the model's dtype."""
    if cache == "auto":
        return (latents + key) * itemsize
    if not is_mixed(cache):
        return latents + key + SCALE_BYTES * -(-(latents + key) // GROUP)
    bits = row_bits(cache, latents, key)
    return bits.values + SCALE_BYTES * sum(bits.scales)


def parse_bits(text: str) -> CacheBits:
    """Parse and check `auto`, `int8` or pairs such as `24x8,64x4`. Raises ValueError for other text."""
    if text == "auto":
        return "auto"
    if text == "int8":
        return "int8"
    parts = [re.fullmatch(r"(\d+)x(\d+)", part.strip()) for part in text.split(",")]
    if not all(parts):
        raise ValueError(f"{text!r} is no cache format; write auto, int8 or LATENTSxBITS,..., such as 24x8,64x4")
    return check_bits(tuple((int(part[1]), int(part[2])) for part in parts if part is not None))


def format_bits(cache: CacheBits) -> str:
    """The reverse of `parse_bits`."""
    return cache if isinstance(cache, str) else ",".join(f"{count}x{bits}" for count, bits in cache)
