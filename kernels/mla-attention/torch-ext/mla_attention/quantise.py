"""int8 cache rows: groups of 64 channels, symmetric, each with a float16 scale. Plain torch.

Kernels that write or read such rows follow these two functions.
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
    """Floating `rows` `[..., W]` as int8 `[..., W]` and float16 scales `[..., ceil(W / 64)]`.

    A group's scale is its largest magnitude over 127, rounded to float16 before it divides; values are
    rounded to the nearest step. A group whose scale is 0 is all zeros.
    """
    width = rows.shape[-1]
    groups = ceil_div(width, GROUP)
    x = F.pad(rows.float(), (0, groups * GROUP - width)).unflatten(-1, (groups, GROUP))
    scales = (x.abs().amax(-1) / LEVELS).clamp(max=MAX_SCALE).half()
    step = scales.float().unsqueeze(-1)
    steps = torch.where(step > 0, x / step, torch.zeros_like(x)).round().clamp(-LEVELS, LEVELS)
    return steps.to(torch.int8).flatten(-2)[..., :width].contiguous(), scales


def dequantise_rows(rows: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """int8 `rows` `[..., W]` with `scales` `[..., ceil(W / 64)]` in `dtype`, computed in float32 or wider.

    Raises ValueError when the scales do not fit the rows.
    """
    width = rows.shape[-1]
    fits = tuple(scales.shape) == (*rows.shape[:-1], ceil_div(width, GROUP))
    require(fits, "scales are {}, they do not fit rows {} in groups of {}", list(scales.shape), list(rows.shape), GROUP)
    wide = torch.promote_types(dtype, torch.float32)
    return (rows.to(wide) * scales.to(wide).repeat_interleave(GROUP, dim=-1)[..., :width]).to(dtype)
