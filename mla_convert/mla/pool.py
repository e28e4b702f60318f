"""Keeps the ring caches of many streams in one allocation, and lets streams of different ages share a pass.

A pool is a cache whose batch items are lanes. A stream takes one lane when it joins (two with guidance) and gives it
back when it leaves. Nothing is cleared, because a stream reads only slots that it has written itself.

A pass gets some lanes as a `LaneView`. Once their windows are full, all streams see the same places in the same order;
they differ only in the frames they have seen, and so in the ring slots of their rows. A view therefore numbers frames
by their place in the window. Its streams share the rotations, and only the table of slots has a batch axis. While
windows fill up, streams share a pass if they have seen the same number of frames. With `sink_positions: absolute`, the
rotations depend on the age, so only streams of one age share a pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import UserError
from .cache import FrameCache, StoredRows, all_slots
from .rope import sent
from .window import CausalConfig


def place_in_window(causal: CausalConfig, start: int, num_frames: int) -> int:
    """The number that a view gives to frame `start`, the first of a chunk of `num_frames` frames.

    Chunks of the same size with the same number can share a pass.
    """
    assert causal.window_frames is not None
    return start if causal.sink_positions == "absolute" else min(start, causal.window_frames - num_frames)


class LaneView(FrameCache):
    """Some lanes of a pool as the cache for one chunk of their streams; `frames_seen` has an entry per stream.

    A new view is made for every chunk, so expanded histories also belong to one chunk. The rows are the pool's, and its
    own `cache` reads and writes them; a pass that writes does not advance any stream. `oldest` is a frame of a single
    stream; earlier frames are not visible (see `FrameCache.rewind`). Raises ValueError if the streams cannot share a
    pass.
    """

    shared = True

    def __init__(
        self,
        cache: FrameCache,
        lanes: Sequence[int],
        frames_seen: Sequence[int],
        num_frames: int,
        oldest: int | None = None,
    ) -> None:
        self._begin(cache.causal, cache.height, cache.width, cache.rows)
        self.cache, self.rotations, self.why_no_kernels = cache, cache.rotations, cache.why_no_kernels
        places = {place_in_window(cache.causal, start, num_frames) for start in frames_seen}
        if len(places) != 1:
            raise ValueError(f"chunks of {num_frames} frames at {sorted(set(frames_seen))} cannot share a pass")
        (self.frames_seen,) = places
        # A view is new in every chunk, but its streams begin only once.
        self.compared = min(frames_seen) > 0
        self.lanes, self.offsets = list(lanes), [start - self.frames_seen for start in frames_seen]
        if oldest is not None:
            self.oldest = oldest - self.offsets[0]

    @property
    def batch_size(self) -> int:
        return len(self.lanes)

    def slots(self, frames: list[int]) -> Tensor:
        """Slots of `frames` in each lane, numbered across all lanes of the pool: int32 `[B, len(frames)]`."""
        causal, window = self.causal, self.rows[0].shape[1]
        table = [
            [lane * window + causal.slot(f if f < causal.sink_frames else f + offset) for f in frames]
            for lane, offset in zip(self.lanes, self.offsets, strict=True)
        ]
        return sent(torch.tensor(table, dtype=torch.int32).view(len(table), len(frames)), self.rows[0].device)

    def ring(self, kept: Tensor) -> Tensor:
        """A view of the slots of all lanes as one ring, `[1, lanes * window_frames, ...]`."""
        return all_slots(kept).unsqueeze(0)

    def kept(self, layer: int) -> StoredRows:
        return self.cache.kept(layer)

    def take(self, kept: StoredRows, slots: Tensor) -> Tensor:
        return self.cache.take(kept, slots)

    def put(self, kept: StoredRows, slots: Tensor, rows: Tensor) -> None:
        self.cache.put(kept, slots, rows)

    def steps(self, kept: StoredRows, slots: Tensor) -> Tensor | float:
        return self.cache.steps(kept, slots)


class CachePool:
    """The caches of many streams, allocated once: one cache per expert of a model, whose batch items are the lanes.

    Raises UserError for a cache that is not a ring of frames.
    """

    def __init__(self, caches: Sequence[FrameCache]) -> None:
        for cache in caches:
            # A standalone checkpoint has its own cache classes, which have no views.
            if not (isinstance(cache, FrameCache) and cache.is_ring):
                raise UserError(
                    f"streams cannot share a {type(cache).__name__}, which encodes its near history again after every "
                    "chunk; roll them out one by one"
                )
        self.caches = list(caches)
        self.lanes = caches[0].batch_size
        self.free = list(range(self.lanes))

    def take(self, count: int) -> list[int]:
        """Take the `count` lowest free lanes. Raises UserError when there are too few."""
        if count > len(self.free):
            raise UserError(f"{count} lanes requested, but only {len(self.free)} of the pool's {self.lanes} are free")
        return [heapq.heappop(self.free) for _ in range(count)]

    def give_back(self, lanes: Sequence[int]) -> None:
        """Free `lanes` for other streams."""
        for lane in lanes:
            heapq.heappush(self.free, lane)

    def view(
        self,
        expert: int,
        lanes: Sequence[int],
        frames_seen: Sequence[int],
        num_frames: int,
        oldest: int | None = None,
    ) -> LaneView:
        """The cache of `expert` for the next `num_frames` frames of the streams in `lanes`."""
        return LaneView(self.caches[expert], lanes, frames_seen, num_frames, oldest)

    def bytes(self) -> int:
        """Bytes allocated for all lanes, layers and experts."""
        return sum(cache.bytes() for cache in self.caches)
