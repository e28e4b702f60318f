"""int8 cache rows in plain torch: symmetric groups of 64 channels, each with a float16 scale.

These two functions define the format that the kernels write and read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._runtime import ceil_div, require

GROUP = 64
LEVELS = 127
MAX_SCALE = 65504.0


def quantise_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize floating-point `rows` `[..., W]` to int8 `[..., W]` with float16 scales `[..., ceil(W / 64)]`.

    The scale of a group is its largest magnitude divided by 127, rounded to float16 before it is used. Values are
    rounded to the nearest step. A group whose scale is 0 becomes all zeros.
    """
    width = rows.shape[-1]
    groups = ceil_div(width, GROUP)
    x = F.pad(rows.float(), (0, groups * GROUP - width)).unflatten(-1, (groups, GROUP))
    scales = (x.abs().amax(-1) / LEVELS).clamp(max=MAX_SCALE).half()
    step = scales.float().unsqueeze(-1)
    steps = torch.where(step > 0, x / step, torch.zeros_like(x)).round().clamp(-LEVELS, LEVELS)
    return steps.to(torch.int8).flatten(-2)[..., :width].contiguous(), scales


def dequantise_rows(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize int8 `rows` `[..., W]` with `scales` `[..., ceil(W / 64)]` to `dtype`, in float32 or wider.

    Raises ValueError if the scales do not fit the rows.
    """
    width = rows.shape[-1]
    fits = tuple(scales.shape) == (*rows.shape[:-1], ceil_div(width, GROUP))
    require(fits, "scales are {} and do not fit rows {} in groups of {}", list(scales.shape), list(rows.shape), GROUP)
    wide = torch.promote_types(dtype, torch.float32)
    return (rows.to(wide) * scales.to(wide).repeat_interleave(GROUP, dim=-1)[..., :width]).to(dtype)
