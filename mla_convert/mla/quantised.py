"""Caches in 8 bits, half of bfloat16's bytes, and in 8 and 4; groups of scalars of a row share a scale each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import GROUP, GROUP_OF_FOUR, RowBits
from .cache import LatentCache
from .window import CausalConfig

MAX_SCALE = torch.finfo(torch.float16).max


def quantise(rows: Tensor, group: int = GROUP, largest: int = 127) -> tuple[Tensor, Tensor]:
    """Rows `[..., W]` as int8 `[..., W]` and float16 scales `[..., ceil(W / group)]`: symmetric, to the nearest.

    The scale of a group is its largest magnitude over `largest`, at most float16's largest number, and values beyond
    `largest` of it end there; a group of zeros has scale 0.
    """
    width = rows.shape[-1]
    padded = F.pad(rows.float(), (0, -width % group)).unflatten(-1, (-1, group))
    scales = (padded.abs().amax(-1) / largest).clamp(max=MAX_SCALE).half()
    divisor = torch.where(scales > 0, scales, 1).float().unsqueeze(-1)
    values = (padded / divisor).round().clamp(-largest, largest).to(torch.int8)
    return values.flatten(-2)[..., :width], scales


def dequantise(rows: Tensor, scales: Tensor, group: int = GROUP) -> Tensor:
    """Float32 rows `[..., W]` from what `quantise` gave."""
    return rows.float() * scales.float().repeat_interleave(group, dim=-1)[..., : rows.shape[-1]]


def pack(values: Tensor) -> Tensor:
    """int8 `[..., W]` in [-8, 7], W even, two to a byte: int8 `[..., W / 2]`, the first of two in the low half."""
    low, high = values.unflatten(-1, (-1, 2)).unbind(-1)
    return high * 16 | low & 15


def unpack(packed: Tensor) -> Tensor:
    """The reverse of `pack`."""
    # The low half has lost its sign, which a shift of the whole keeps for the high one.
    return torch.stack([(packed & 15 ^ 8) - 8, packed >> 4], dim=-1).flatten(-2)


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

    def kept(self, layer: int) -> tuple[Any, ...]:
        return self.rows[layer], self.scales[layer]

    def take(self, kept: tuple[Any, ...], slots: Tensor) -> Tensor:
        rows, scales = (self._take(one, slots) for one in kept)
        return dequantise(rows, scales)

    def put(self, kept: tuple[Any, ...], slots: Tensor, rows: Tensor) -> None:
        for one, new in zip(kept, quantise(rows.detach()), strict=True):
            self._put(one, slots, new)

    def bytes(self) -> int:
        return super().bytes() + sum(scales.numel() * scales.element_size() for scales in self.scales)


class MixedRows(NamedTuple):
    """What a `MixedLatentCache` keeps of a layer: int8 `[..., values]`, float16 `[..., scales]`, and what they hold."""

    rows: Tensor
    scales: Tensor
    bits: RowBits


class MixedLatentCache(LatentCache):
    """`LatentCache` whose first latents have 8 bits and whose others have 4, by `bits` of each layer.

    Of a row `[c | k_pe]` the latent comes first, in 8 bits and then in 4, two to a byte; a shared key has 8. `scales`
    lie beside `rows`, a tensor a layer, in the same order.
    """

    why_no_kernels = "latents in 4 bits are read by torch: the kernels know 8 and the model's dtype"

    def __init__(
        self,
        causal: CausalConfig,
        bits: Sequence[RowBits],
        batch_size: int,
        height: int,
        width: int,
        device: torch.device | str,
    ) -> None:
        super().__init__(causal, [one.values for one in bits], batch_size, height, width, torch.int8, device)
        self.bits = list(bits)
        self.scales = [
            torch.zeros(*rows.shape[:-1], sum(one.scales), dtype=torch.float16, device=device)
            for rows, one in zip(self.rows, bits, strict=True)
        ]

    def kept(self, layer: int) -> MixedRows:
        return MixedRows(self.rows[layer], self.scales[layer], self.bits[layer])

    def take(self, kept: tuple[Any, ...], slots: Tensor) -> Tensor:
        rows, scales, bits = kept
        values = self._take(rows, slots).split([bits.eight, bits.four // 2, bits.key], dim=-1)
        of_eight, of_four, of_key = self._take(scales, slots).split(bits.scales, dim=-1)
        eight, key = dequantise(values[0], of_eight), dequantise(values[2], of_key)
        return torch.cat([eight, dequantise(unpack(values[1]), of_four, GROUP_OF_FOUR), key], dim=-1)

    def put(self, kept: tuple[Any, ...], slots: Tensor, rows: Tensor) -> None:
        bits: RowBits = kept[2]
        eight, four, key = rows.detach().split([bits.eight, bits.four, bits.key], dim=-1)
        values, scales = zip(quantise(eight), quantise(four, GROUP_OF_FOUR, 7), quantise(key), strict=True)
        self._put(kept[0], slots, torch.cat([values[0], pack(values[1]), values[2]], dim=-1))
        self._put(kept[1], slots, torch.cat(scales, dim=-1))

    def bytes(self) -> int:
        return super().bytes() + sum(scales.numel() * scales.element_size() for scales in self.scales)

    def scalars_per_token(self) -> float:
        return sum(one.scalars for one in self.bits) / len(self.bits)
