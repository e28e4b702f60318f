"""A cache in int8: half of bfloat16's bytes, with one scale for each 64 scalars of a row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import LatentCache
from .window import CausalConfig

GROUP = 64
MAX_SCALE = torch.finfo(torch.float16).max


def quantise(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[..., W]` as int8 `[..., W]` and float16 scales `[..., ceil(W / 64)]`: symmetric, to the nearest.

    The scale of a group is its largest magnitude over 127, at most float16's largest number, and values beyond
    127 of it end there; a group of zeros has scale 0.
    """
    width = rows.shape[-1]
    padded = F.pad(rows.float(), (0, -width % GROUP)).unflatten(-1, (-1, GROUP))
    scales = (padded.abs().amax(-1) / 127).clamp(max=MAX_SCALE).half()
    divisor = torch.where(scales > 0, scales, 1).float().unsqueeze(-1)
    values = (padded / divisor).round().clamp(-127, 127).to(torch.int8)
    return values.flatten(-2)[..., :width], scales


def dequantise(rows: Tensor, scales: Tensor) -> Tensor:
    """Float32 rows `[..., W]` from what `quantise` gave."""
    return rows.float() * scales.float().repeat_interleave(GROUP, dim=-1)[..., : rows.shape[-1]]


class Int8LatentCache(LatentCache):
    """`LatentCache` whose rows are quantised when they are written; `scales` lie beside `rows`, a tensor a layer."""

    def __init__(
        self,
        causal: CausalConfig,
        row_widths: list[int],
        batch_size: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(causal, row_widths, batch_size, height, width, torch.int8, device)
        self.scales = [
            torch.zeros(*rows.shape[:-1], -(-rows.shape[-1] // GROUP), dtype=torch.float16, device=device)
            for rows in self.rows
        ]

    def kept(self, layer: int) -> tuple[Tensor, ...]:
        return self.rows[layer], self.scales[layer]

    def take(self, kept: tuple[Tensor, ...], slots: Tensor) -> Tensor:
        rows, scales = (self._take(one, slots) for one in kept)
        return dequantise(rows, scales)

    def put(self, kept: tuple[Tensor, ...], slots: Tensor, rows: Tensor) -> None:
        for one, new in zip(kept, quantise(rows.detach()), strict=True):
            self._put(one, slots, new)

    def bytes(self) -> int:
        return super().bytes() + sum(scales.numel() * scales.element_size() for scales in self.scales)
