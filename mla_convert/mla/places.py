"""Computes the rotations and ring slots of a chunk's tokens and of its history."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rope import RotaryTable
from .window import Chunk

if TYPE_CHECKING:
    from .cache import FrameCache


class Places:
    """Rotations and slots of one chunk, shared by its passes and layers.

    `rotations` are complex64 `[tokens, P]` of the history in reading order, then of the chunk's own tokens; `grid` are
    those of the own tokens with time left at 0. `slots`, in the same order, come from the cache. A ring gives int32
    `[frames]` on its device, or `[B, frames]` where every batch item has its own slots (`pool.py`). The first
    `num_history_tokens` rotations and `num_history_slots` slots are the history's.
    """

    def __init__(
        self, rotations: Tensor, grid: Tensor, slots: Tensor, num_history_tokens: int, num_history_slots: int
    ) -> None:
        self.rotations, self.grid, self.slots = rotations, grid, slots
        self.history_rotations, self.own_rotations = rotations[:num_history_tokens], rotations[num_history_tokens:]
        # In memory of their own: Triton compiles a kernel again for an address that is no multiple of 16 bytes.
        self.history_slots, self.own_slots = (
            part.clone() for part in (slots[..., :num_history_slots], slots[..., num_history_slots:])
        )

    def move_to(self, other: Places) -> None:
        """Copy `other` into this memory, where a captured graph expects it."""
        for kept, new in zip(self._tensors, other._tensors, strict=True):
            kept.copy_(new)

    @property
    def memory(self) -> tuple[tuple[torch.Size, int], ...]:
        """Shapes and addresses; a captured graph is valid for places where these are equal."""
        return tuple((x.shape, x.data_ptr()) for x in self._tensors)

    @property
    def _tensors(self) -> tuple[Tensor, ...]:
        return self.rotations, self.grid, self.slots, self.history_slots, self.own_slots

    def like(self, other: Places) -> bool:
        """Whether both have the same shapes."""
        return self.own_rotations.shape == other.own_rotations.shape and (
            self.history_rotations.shape == other.history_rotations.shape
        )


class RotationsMemo:
    """Memoizes the rotations of a cache's latest chunk by the indices of its frames; the views of a pool share one.

    With positions in the window, all chunks of the steady state have the same.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[list[int], Tensor]] = {}

    def of(self, name: str, indices: list[int], compute: Callable[[list[int]], Tensor]) -> Tensor:
        """What `compute` returns for `indices`; only the latest of each `name` is kept."""
        if name not in self._kept or self._kept[name][0] != indices:
            self._kept[name] = indices, compute(indices)
        return self._kept[name][1]


class PlacesMemo:
    """Memoizes the places of a cache's current chunk for all of its passes.

    While it is `fixed`, chunks of the same shape (the steady state) reuse the same tensors.
    """

    def __init__(self) -> None:
        self.fixed = False
        self._chunk: Chunk | None = None
        self._places: Places | None = None

    def next(self, rotary_table: Callable[[], RotaryTable], cache: FrameCache, num_frames: int) -> Places:
        """Places of the next `num_frames` frames of the rollout in `cache`, the owner of this memo.

        `rotary_table` makes the model's table, which is needed only where rotations change.
        """
        chunk = Chunk(cache.frames_seen, cache.frames_seen + num_frames)
        return self.of(chunk, lambda: _compute(rotary_table, cache, chunk))

    def of(self, chunk: Chunk, compute: Callable[[], Places]) -> Places:
        """The places of `chunk`, from `compute` unless the last call was for the same chunk."""
        if self._places is None or self._chunk != chunk:
            places = compute()
            if self.fixed and self._places is not None and places.like(self._places):
                self._places.move_to(places)
            else:
                self._places = places
            self._chunk = chunk
        return self._places

    def forget(self) -> None:
        """Forget the places; the next ones are computed into new memory."""
        self._chunk = self._places = None


def _compute(rotary_table: Callable[[], RotaryTable], cache: FrameCache, chunk: Chunk) -> Places:
    causal, own = cache.causal, list(range(*chunk))
    history = [f for f in causal.history(*chunk) if f < causal.sink_frames or f >= cache.oldest]

    def rotations(name: str, indices: list[int]) -> Tensor:
        return cache.rotations.of(name, indices, computed)

    def computed(indices: list[int]) -> Tensor:
        # The weights may be elsewhere between calls of the model.
        return rotary_table().to(cache.rows[0].device).rotations(indices, cache.height, cache.width)

    frames = [*history, *own]
    return Places(
        rotations("all", causal.temporal_index(frames, chunk.stop)),
        rotations("grid", [0] * len(own)),
        cache.slots(frames),
        len(history) * cache.height * cache.width,
        len(history),
    )
