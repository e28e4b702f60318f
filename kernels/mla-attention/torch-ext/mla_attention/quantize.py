"""Quantized cache rows in plain torch: symmetric groups of channels, each with a float16 scale.

Rows are int8 throughout, in groups of 64, or mixed: the first latents in 8 bits, the others in 4 bits in groups of 32,
two per byte, then the shared key in 8 bits. The functions here define the formats that the kernels write and read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import ceil_div, require

GROUP = 64
LEVELS = 127
GROUP_OF_FOUR = 32
LEVELS_OF_FOUR = 7
MAX_SCALE = 65504.0


class Part(NamedTuple):
    """Neighboring channels of a row `[c | k_pe]` with the same number of bits.

    The part begins at scalar `first` of a stored row and has `count` channels. Channel i of the part has scale
    `(phase + i) // group` of the row.
    """

    first: int
    count: int
    phase: int = 0
    group: int = GROUP

    @property
    def per_byte(self) -> int:
        """Channels per scalar of the stored tensor: 2 in 4 bits."""
        return GROUP // self.group

    @property
    def stored(self) -> slice:
        """Its scalars in a stored row."""
        return slice(self.first, self.first + self.count // self.per_byte)

    @property
    def scales(self) -> slice:
        """Its scales, if it does not share one with the part before it."""
        return slice(self.phase // self.group, ceil_div(self.phase + self.count, self.group))


def row_parts(rank: int, shared: int, eight: int | None) -> tuple[Part, Part, Part]:
    """The parts of a row: latents in 8 bits, latents in 4 bits, shared key; any of them may have no channels.

    Without `eight`, the row is not mixed: all channels have the same number of bits, and scales cover the whole row.
    """
    if eight is None:
        return Part(0, rank), Part(rank, 0), Part(rank, shared, rank)
    four, before = rank - eight, ceil_div(eight, GROUP)
    after = before + ceil_div(four, GROUP_OF_FOUR)
    return (
        Part(0, eight),
        Part(eight, four, before * GROUP_OF_FOUR, GROUP_OF_FOUR),
        Part(eight + four // 2, shared, after * GROUP),
    )


def row_width(rank: int, shared: int, eight: int | None) -> int:
    """Scalars of the stored tensor per row."""
    return row_parts(rank, shared, eight)[2].stored.stop


def row_scales(rank: int, shared: int, eight: int | None) -> int:
    """Scales per row."""
    return row_parts(rank, shared, eight)[2].scales.stop


def quantize_rows(rows: Tensor, eight: int | None = None, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Quantize floating-point `rows` `[..., W]` to int8 `[..., W]` with float16 scales `[..., ceil(W / 64)]`.

    The scale of a group is its largest magnitude divided by 127 (4 bits: 7), rounded to float16 before it is used.
    Values are rounded to the nearest step. A group whose scale is 0 becomes all zeros.

    With `eight`, rows are mixed: of the first `rank` channels (default: all), `eight` have 8 bits and an even number
    have 4. They are stored in `eight + (rank - eight) / 2 + W - rank` bytes; each part has scales of its own.
    """
    if eight is None:
        return _quantize(rows, GROUP, LEVELS)
    rank = rows.shape[-1] if rank is None else rank
    first, four, key = rows.split([eight, rank - eight, rows.shape[-1] - rank], dim=-1)
    parts = (
        _quantize(first, GROUP, LEVELS),
        _quantize(four, GROUP_OF_FOUR, LEVELS_OF_FOUR),
        _quantize(key, GROUP, LEVELS),
    )
    low, high = parts[1][0].unflatten(-1, (-1, 2)).unbind(-1)
    values = [parts[0][0], high * 16 | low & 15, parts[2][0]]
    return torch.cat(values, dim=-1), torch.cat([scales for _, scales in parts], dim=-1)


def dequantize_rows(
    rows: Tensor, scales: Tensor, dtype: torch.dtype, eight: int | None = None, rank: int | None = None
) -> Tensor:
    """Dequantize int8 `rows` of `quantize_rows` with their `scales` to `dtype`, in float32 or wider.

    Raises ValueError if the scales do not fit the rows.
    """
    width = rows.shape[-1]
    if eight is not None:
        rank = 2 * width - eight if rank is None else rank
        width += rank - row_width(rank, 0, eight)
    rank = width if rank is None else rank
    parts = row_parts(rank, width - rank, eight)
    fits = tuple(scales.shape) == (*rows.shape[:-1], parts[2].scales.stop)
    require(fits, "scales are {} and do not fit rows {} in groups of {}", list(scales.shape), list(rows.shape), GROUP)
    wide = torch.promote_types(dtype, torch.float32)
    if eight is None:
        return _dequantize(rows, scales, GROUP, wide).to(dtype)
    found = []
    for part in parts:
        values = rows[..., part.stored]
        if part.per_byte == 2:
            # The low half has lost its sign bit; the arithmetic shift restores that of the high half.
            values = torch.stack([(values & 15 ^ 8) - 8, values >> 4], dim=-1).flatten(-2)
        found.append(_dequantize(values, scales[..., part.scales], part.group, wide))
    return torch.cat(found, dim=-1).to(dtype)


def _quantize(rows: Tensor, group: int, levels: int) -> tuple[Tensor, Tensor]:
    width = rows.shape[-1]
    groups = ceil_div(width, group)
    x = F.pad(rows.float(), (0, groups * group - width)).unflatten(-1, (groups, group))
    scales = (x.abs().amax(-1) / levels).clamp(max=MAX_SCALE).half()
    step = scales.float().unsqueeze(-1)
    steps = torch.where(step > 0, x / step, torch.zeros_like(x)).round().clamp(-levels, levels)
    return steps.to(torch.int8).flatten(-2)[..., :width].contiguous(), scales


def _dequantize(rows: Tensor, scales: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    return rows.to(dtype) * scales.to(dtype).repeat_interleave(group, dim=-1)[..., : rows.shape[-1]]
