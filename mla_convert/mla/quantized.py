"""Stores latents quantized to 8 bits (half of bfloat16's bytes) or to 8 and 4 bits, with one scale per group."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .bits import GROUP, GROUP_OF_FOUR, RowBits
from .cache import LatentCache, StoredRows
from .window import CausalConfig

MAX_SCALE = torch.finfo(torch.float16).max


def quantize(rows: Tensor, group: int = GROUP, largest: int = 127) -> tuple[Tensor, Tensor]:
    """Quantize rows `[..., W]`, symmetric, to nearest: int8 `[..., W]` and float16 scales `[..., ceil(W / group)]`.

    The scale of a group is its largest magnitude divided by `largest`, at most float16's maximum. Values beyond
    `largest` scales are clamped. A group of zeros has scale 0.
    """
    width = rows.shape[-1]
    padded = F.pad(rows.float(), (0, -width % group)).unflatten(-1, (-1, group))
    scales = (padded.abs().amax(-1) / largest).clamp(max=MAX_SCALE).half()
    divisor = torch.where(scales > 0, scales, 1).float().unsqueeze(-1)
    values = (padded / divisor).round().clamp(-largest, largest).to(torch.int8)
    return values.flatten(-2)[..., :width], scales


def dequantize(rows: Tensor, scales: Tensor, group: int = GROUP) -> Tensor:
    """Float32 rows `[..., W]` from the int8 rows and scales of `quantize`."""
    return rows.float() * steps(scales, rows.shape[-1], group)


def steps(scales: Tensor, width: int, group: int = GROUP) -> Tensor:
    """The scale of each scalar, float32 `[..., width]`, from the scales of groups `[..., ceil(width / group)]`."""
    return scales.float().repeat_interleave(group, dim=-1)[..., :width]


def pack(values: Tensor) -> Tensor:
    """Pack int8 `[..., W]` in [-8, 7], W even, two per byte: int8 `[..., W / 2]`, the first of two in the low half."""
    low, high = values.unflatten(-1, (-1, 2)).unbind(-1)
    return high * 16 | low & 15


def unpack(packed: Tensor) -> Tensor:
    """The reverse of `pack`."""
    # The low half has lost its sign bit; the arithmetic shift restores that of the high half.
    return torch.stack([(packed & 15 ^ 8) - 8, packed >> 4], dim=-1).flatten(-2)


class Int8LatentCache(LatentCache):
    """`LatentCache` that quantizes rows to 8 bits when they are written; `scales` holds one tensor per layer."""

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

    def kept(self, layer: int) -> StoredRows:
        return StoredRows(self.rows[layer], self.scales[layer])

    def take(self, kept: StoredRows, slots: Tensor) -> Tensor:
        assert kept.scales is not None
        return dequantize(self._take(kept.rows, slots), self._take(kept.scales, slots))

    def steps(self, kept: StoredRows, slots: Tensor) -> Tensor | float:
        assert kept.scales is not None
        return steps(self._take(kept.scales, slots), kept.rows.shape[-1])

    def put(self, kept: StoredRows, slots: Tensor, rows: Tensor) -> None:
        assert kept.scales is not None
        values, scales = quantize(rows.detach())
        self._put(kept.rows, slots, values)
        self._put(kept.scales, slots, scales)

    def bytes(self) -> int:
        return super().bytes() + sum(scales.numel() * scales.element_size() for scales in self.scales)


class MixedLatentCache(LatentCache):
    """`LatentCache` that stores the first numbers of a latent in 8 bits and the others in 4, as `bits` says per layer.

    A row `[c | k_pe]` starts with the latent, first in 8 bits, then in 4 bits, two per byte. The shared key has 8 bits.
    `scales` holds one tensor per layer, in the same order. Kernels read and write this layout.
    """

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

    def kept(self, layer: int) -> StoredRows:
        return StoredRows(self.rows[layer], self.scales[layer], self.bits[layer])

    def take(self, kept: StoredRows, slots: Tensor) -> Tensor:
        rows, scales, bits = kept
        assert scales is not None and bits is not None
        values = self._take(rows, slots).split([bits.eight, bits.four // 2, bits.key], dim=-1)
        of_eight, of_four, of_key = self._take(scales, slots).split(bits.scales, dim=-1)
        eight, key = dequantize(values[0], of_eight), dequantize(values[2], of_key)
        return torch.cat([eight, dequantize(unpack(values[1]), of_four, GROUP_OF_FOUR), key], dim=-1)

    def steps(self, kept: StoredRows, slots: Tensor) -> Tensor | float:
        _, scales, bits = kept
        assert scales is not None and bits is not None
        of_eight, of_four, of_key = self._take(scales, slots).split(bits.scales, dim=-1)
        parts = steps(of_eight, bits.eight), steps(of_four, bits.four, GROUP_OF_FOUR), steps(of_key, bits.key)
        return torch.cat(parts, dim=-1)

    def put(self, kept: StoredRows, slots: Tensor, rows: Tensor) -> None:
        stored, stored_scales, bits = kept
        assert stored_scales is not None and bits is not None
        eight, four, key = rows.detach().split([bits.eight, bits.four, bits.key], dim=-1)
        values, scales = zip(quantize(eight), quantize(four, GROUP_OF_FOUR, 7), quantize(key), strict=True)
        self._put(stored, slots, torch.cat([values[0], pack(values[1]), values[2]], dim=-1))
        self._put(stored_scales, slots, torch.cat(scales, dim=-1))

    def bytes(self) -> int:
        return super().bytes() + sum(scales.numel() * scales.element_size() for scales in self.scales)

    def scalars_per_token(self) -> float:
        return sum(one.scalars for one in self.bits) / len(self.bits)
