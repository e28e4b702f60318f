"""Stores history in ring buffers of frame slots, for dense keys and values and for latents alike.

A slot holds one latent frame of every layer. Sinks are pinned, and the other slots are reused in turn. Nothing is
ever shifted or cloned; the position of a slot is looked up when the slot is read.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from .bits import RowBits
from .expanded import ExpandedHistories
from .places import PlacesMemo, RotationsMemo
from .rope import sent
from .window import CausalConfig


class StoredRows(NamedTuple):
    """The tensors `[B, window_frames, tokens_per_frame, ...]` that store a layer, and what else reading them needs.

    `rows` in fewer bits are int8 and have float16 `scales`; `bits` is the layout of both where not all have 8 bits.
    """

    rows: Tensor
    scales: Tensor | None = None
    bits: RowBits | None = None


class FrameCache:
    """A ring cache: one tensor `[B, window_frames, tokens_per_frame, row]` per layer, allocated once.

    `row_widths` holds the scalars per token of each layer. `frames_seen` counts the frames written so far, so it is
    also the absolute index of the next frame. `written` is the end of the last chunk that has taken slots; kernels
    also give slots to some chunks that are only denoised. After a `rewind`, frames before `oldest` are no longer
    visible, except sinks. `compared`: processes that share chunks have begun alike. `places` memoizes the places of the
    current chunk, and `rotations` the part of them that later chunks may share. `expanded` holds the histories that
    kernels have expanded.

    A subclass that allocates `rows` differently calls `_begin` instead of `__init__`. Subclasses declare:

    - `is_ring`: every frame has one slot, given by `CausalConfig.slot`. Only then can a rollout `rewind`, streams share
      an allocation, and kernels and CUDA graphs read the cache.
    - `why_no_kernels`: one line on why kernels cannot read the rows of a cache that is a ring.
    - `shared`: its rows belong to a cache that others also use; it serves one chunk.
    - `fewer_bits`: its rows are latents, so `Int8LatentCache` or `MixedLatentCache` can take its place.
    """

    is_ring: ClassVar[bool] = True
    why_no_kernels: str | None = None
    shared: ClassVar[bool] = False
    fewer_bits: ClassVar[bool] = False

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
        if causal.window_frames is None:
            raise ValueError("a streaming cache needs a finite window; set window_frames")
        shape = (batch_size, causal.window_frames, height * width)
        rows = [torch.zeros(*shape, row_width, dtype=dtype, device=device) for row_width in row_widths]
        self._begin(causal, height, width, rows)

    def _begin(self, causal: CausalConfig, height: int, width: int, rows: list[Tensor]) -> None:
        """Start empty, with `height x width` tokens per frame stored in `rows`, one tensor per layer."""
        self.causal, self.height, self.width, self.rows = causal, height, width, rows
        self.places, self.rotations, self.expanded = PlacesMemo(), RotationsMemo(), ExpandedHistories()
        self.reset()

    @property
    def batch_size(self) -> int:
        return self.rows[0].shape[0]

    def reset(self) -> None:
        """Forget every frame; the memory stays allocated."""
        self.frames_seen = self.written = self.oldest = 0
        self.compared = False
        self.places.forget()
        self.expanded.forget()

    def rewind(self, frame: int) -> None:
        """Go back to absolute `frame` and write on from there; of earlier frames, the ring's are still visible."""
        self.oldest = min(max(self.oldest, self.causal.first_kept(max(self.frames_seen, self.written))), frame)
        self.frames_seen = frame
        self.places.forget()
        self.expanded.forget()

    def overwritten(self, stop: int) -> None:
        """Record that a chunk that ends before frame `stop` has overwritten its slots."""
        self.written = max(self.written, stop)

    def slots(self, frames: list[int]) -> Tensor:
        """Ring slots of absolute `frames`, int32 `[len(frames)]` on the cache's device."""
        return sent(torch.tensor([self.causal.slot(f) for f in frames], dtype=torch.int32), self.rows[0].device)

    def ring(self, kept: Tensor) -> Tensor:
        """A layer's tensor `[lanes, window_frames, ...]` in the shape that kernels index with `slots`."""
        return kept

    def kept(self, layer: int) -> StoredRows:
        """What stores a layer."""
        return StoredRows(self.rows[layer])

    def take(self, kept: StoredRows, slots: Tensor) -> Tensor:
        """Rows `[B, len(slots) * tokens_per_frame, row]` in some `slots` of what stores a layer."""
        return self._take(kept.rows, slots)

    def put(self, kept: StoredRows, slots: Tensor, rows: Tensor) -> None:
        """The reverse of `take`, in place."""
        self._put(kept.rows, slots, rows.detach().to(kept.rows.dtype))

    def steps(self, kept: StoredRows, slots: Tensor) -> Tensor | float:
        """The quantization step of each scalar of `take`, float32 of that shape; 0 for rows that are not quantized."""
        return 0.0

    def _take(self, kept: Tensor, slots: Tensor) -> Tensor:
        """Some slots of a layer's tensor `[B, window_frames, ...]`, as `[B, frames * tokens, ...]`.

        `slots` are `[frames]`, or `[B', frames]` numbered across all items, for a result with B' of them.
        """
        if slots.ndim == 1:
            return kept.index_select(1, slots).flatten(1, 2)
        return all_slots(kept).index_select(0, slots.flatten()).unflatten(0, slots.shape).flatten(1, 2)

    def _put(self, kept: Tensor, slots: Tensor, new: Tensor) -> None:
        """The reverse of `_take`, in place."""
        frames = new.unflatten(1, (slots.shape[-1], -1))
        if slots.ndim == 1:
            kept[:, slots] = frames
        else:
            all_slots(kept)[slots] = frames

    def bytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(rows.numel() * rows.element_size() for rows in self.rows)

    def scalars_per_token(self) -> float:
        """Cached scalars per token, averaged over layers."""
        return sum(rows.shape[-1] for rows in self.rows) / len(self.rows)


def all_slots(kept: Tensor) -> Tensor:
    """A view of a layer's tensor `[B, window_frames, ...]` as `[B * window_frames, ...]`."""
    return kept.view(-1, *kept.shape[2:])


class DenseCache(FrameCache):
    """Keys before rotation and values of every head: `2 * heads * head_dim` scalars per token per layer."""


class LatentCache(FrameCache):
    """Latent and shared rotary key, `[c | k_pe]`: `kv_lora_rank + qk_rope_head_dim` scalars per token per layer."""

    fewer_bits = True
