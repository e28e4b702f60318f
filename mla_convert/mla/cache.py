"""Ring caches by frame slot, the same for dense keys and values and for latents.

A slot holds one latent frame of every layer. Sinks are pinned, the rest wraps behind them; nothing
is ever shifted or cloned, and the position of a slot is looked up when it is read.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .expanded import ExpandedHistories
from .places import PlacesMemo
from .window import CausalConfig


class FrameCache:
    """Per layer one tensor `[B, window_frames, tokens_per_frame, row]`, allocated once.

    `row_widths` says how many scalars a layer keeps a token. `frames_seen` counts the frames that
    were written, so it is also the absolute index of the next one. `written` is the end of the last chunk that has
    taken slots: kernels give them to some chunks that are only denoised, too. After a `rewind` frames before `oldest`,
    sinks aside, are no longer there to be seen. `places` are those of the current chunk, `expanded` the histories that
    kernels have expanded.

    A subclass that allocates `rows` otherwise calls `_begin` in place of `__init__`, and says what it is:

    - `is_ring`: a frame has one slot, which `CausalConfig.slot` gives. Then a rollout can `rewind`, streams can share
      an allocation, and kernels and CUDA graphs can read it.
    - `why_no_kernels`: why kernels cannot read its rows, in one line, although it is a ring.
    - `shared`: its rows are those of a cache that others use, too; it serves one chunk.
    - `fewer_bits`: its rows are latents, which `Int8LatentCache` and `MixedLatentCache` may keep in its place.
    """

    is_ring: ClassVar[bool] = True
    why_no_kernels: ClassVar[str | None] = None
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
            raise ValueError("a streaming cache needs a finite window: set window_frames")
        shape = (batch_size, causal.window_frames, height * width)
        rows = [torch.zeros(*shape, row_width, dtype=dtype, device=device) for row_width in row_widths]
        self._begin(causal, height, width, rows)

    def _begin(self, causal: CausalConfig, height: int, width: int, rows: list[Tensor]) -> None:
        """An empty cache of `height x width` tokens a frame, which keeps its frames in `rows`, a tensor a layer."""
        self.causal, self.height, self.width, self.rows = causal, height, width, rows
        self.places, self.expanded = PlacesMemo(), ExpandedHistories()
        self.reset()

    @property
    def batch_size(self) -> int:
        return self.rows[0].shape[0]

    def reset(self) -> None:
        """Forget every frame; the memory stays."""
        self.frames_seen = self.written = self.oldest = 0
        self.places.forget()
        self.expanded.forget()

    def rewind(self, frame: int) -> None:
        """Go back to absolute `frame`, from where on chunks are written again; earlier ones see what the ring holds."""
        self.oldest = min(max(self.oldest, self.causal.first_kept(max(self.frames_seen, self.written))), frame)
        self.frames_seen = frame
        self.places.forget()
        self.expanded.forget()

    def overwritten(self, stop: int) -> None:
        """Take down that the slots of a chunk which ends before frame `stop` no longer hold what they held."""
        self.written = max(self.written, stop)

    def slots(self, frames: list[int]) -> Tensor:
        """Ring slots of absolute `frames`, int32 `[len(frames)]` on the cache's device."""
        return torch.tensor([self.causal.slot(f) for f in frames], dtype=torch.int32).to(self.rows[0].device)

    def ring(self, kept: Tensor) -> Tensor:
        """A layer's tensor `[lanes, window_frames, ...]` as kernels address it by what `slots` gives."""
        return kept

    def kept(self, layer: int) -> tuple[Any, ...]:
        """The tensors `[B, window_frames, ...]` that hold what is kept of a layer, and what tells how to read them."""
        return (self.rows[layer],)

    def take(self, kept: tuple[Any, ...], slots: Tensor) -> Tensor:
        """Rows `[B, len(frames) * tokens_per_frame, row]` of what is `kept` of a layer in the `slots` of frames."""
        return self._take(kept[0], slots)

    def put(self, kept: tuple[Any, ...], slots: Tensor, rows: Tensor) -> None:
        """The reverse of `take`, in place."""
        self._put(kept[0], slots, rows.detach().to(kept[0].dtype))

    def read(self, layer: int, frames: list[int]) -> Tensor:
        """Rows of absolute `frames`, `[B, len(frames) * tokens_per_frame, row]`."""
        return self.take(self.kept(layer), self.slots(frames))

    def write(self, layer: int, frames: list[int], rows: Tensor) -> None:
        """Store rows `[B, len(frames) * tokens_per_frame, row]` of absolute `frames`."""
        self.put(self.kept(layer), self.slots(frames), rows)

    def _take(self, kept: Tensor, slots: Tensor) -> Tensor:
        """What a layer's tensor `[B, window_frames, ...]` keeps in some slots, `[B, len(slots) * tokens, ...]`."""
        return kept.index_select(1, slots).flatten(1, 2)

    def _put(self, kept: Tensor, slots: Tensor, new: Tensor) -> None:
        """The reverse of `_take`, in place."""
        kept[:, slots] = new.unflatten(1, (slots.shape[-1], -1))

    def bytes(self) -> int:
        """Bytes allocated for all layers."""
        return sum(rows.numel() * rows.element_size() for rows in self.rows)

    def scalars_per_token(self) -> float:
        """Cached scalars a token, averaged over layers."""
        return sum(rows.shape[-1] for rows in self.rows) / len(self.rows)


class DenseCache(FrameCache):
    """Per-head keys before rotation and values: `2 * heads * head_dim` scalars a token a layer."""


class LatentCache(FrameCache):
    """Content latent and shared rotary key, `[c | k_pe]`: `kv_lora_rank + qk_rope_head_dim` scalars."""

    fewer_bits = True
