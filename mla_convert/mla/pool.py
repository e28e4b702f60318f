"""Ring caches of many streams in one allocation, and passes over streams of any age.

A pool is a cache whose batch items are lanes. A stream takes one when it joins (two with guidance) and gives it
back when it leaves; nothing is cleared, since a stream reads only the slots that it has written itself.

A pass takes some lanes as a `LaneView`. Once a window has filled, every stream sees the same places, namely all of
its window, in the same order; streams differ in how many frames they have seen and thereby in the slots of the
ring where their rows lie. So a view names frames by their place in the window, the same for all of its streams:
they share the rotations, and only the table of slots has a batch axis. While windows fill up, streams share a
pass if they have seen as many frames. With `sink_positions: absolute` the age shows in the rotations, so only
streams of one age share a pass.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..errors import UserError
from .cache import FrameCache
from .window import CausalConfig


def place_in_window(causal: CausalConfig, start: int, num_frames: int) -> int:
    """The name of frame `start` in a view, where a chunk of `num_frames` frames begins.

    Chunks of the same size that begin at the same place can share a pass.
    """
    assert causal.window_frames is not None
    return start if causal.sink_positions == "absolute" else min(start, causal.window_frames - num_frames)


def _all_slots(kept: Tensor) -> Tensor:
    """A layer's tensor `[lanes, window_frames, ...]` as `[lanes * window_frames, ...]`, in the same memory."""
    return kept.view(-1, *kept.shape[2:])


class LaneView(FrameCache):
    """Some lanes of a pool as the cache of one chunk of their streams, `frames_seen` of which each has seen.

    Made anew for every chunk, so what kernels have expanded is a chunk's own, too. The rows are the pool's; a pass
    that writes moves no stream on.
    With `oldest`, a frame of a single stream, earlier ones are not seen, see `FrameCache.rewind`. `view_class` gives
    the views of a class of caches. Raises ValueError where the streams cannot share a pass.
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
        # What the cache keeps beside its rows, such as scales, is the view's as it stands.
        vars(self).update(vars(cache))
        self._begin(cache.causal, cache.height, cache.width, cache.rows)
        places = {place_in_window(cache.causal, start, num_frames) for start in frames_seen}
        if len(places) != 1:
            raise ValueError(f"chunks of {num_frames} frames at {sorted(set(frames_seen))} cannot share a pass")
        (self.frames_seen,) = places
        self.lanes, self.offsets = list(lanes), [start - self.frames_seen for start in frames_seen]
        if oldest is not None:
            self.oldest = oldest - self.offsets[0]

    @property
    def batch_size(self) -> int:
        return len(self.lanes)

    def slots(self, frames: list[int]) -> Tensor:
        """Slots of `frames` in each lane, counted through all lanes of the pool: int32 `[B, len(frames)]`."""
        causal, window = self.causal, self.rows[0].shape[1]
        table = [
            [lane * window + causal.slot(f if f < causal.sink_frames else f + offset) for f in frames]
            for lane, offset in zip(self.lanes, self.offsets, strict=True)
        ]
        return torch.tensor(table, dtype=torch.int32).view(len(table), len(frames)).to(self.rows[0].device)

    def ring(self, kept: Tensor) -> Tensor:
        """One ring of the slots of all lanes, `[1, lanes * window_frames, ...]`, in the same memory."""
        return _all_slots(kept).unsqueeze(0)

    def _take(self, kept: Tensor, slots: Tensor) -> Tensor:
        return _all_slots(kept).index_select(0, slots.flatten()).unflatten(0, slots.shape).flatten(1, 2)

    def _put(self, kept: Tensor, slots: Tensor, new: Tensor) -> None:
        _all_slots(kept)[slots] = new.unflatten(1, (slots.shape[-1], -1))


_VIEW_CLASSES: dict[type[FrameCache], type[LaneView]] = {}


def view_class(cache_class: type[FrameCache]) -> type[LaneView]:
    """Lanes of caches of a class: they keep what it keeps, in the slots that `LaneView` gives."""
    if cache_class not in _VIEW_CLASSES:
        made = type(f"{cache_class.__name__}LaneView", (LaneView, cache_class), {})
        _VIEW_CLASSES[cache_class] = cast("type[LaneView]", made)
    return _VIEW_CLASSES[cache_class]


class CachePool:
    """The caches of many streams, allocated once: `caches`, one for each expert of a model, of a lane a batch item.

    Raises UserError for a cache that is no ring of frames.
    """

    def __init__(self, caches: Sequence[FrameCache]) -> None:
        for cache in caches:
            # A standalone checkpoint brings classes of its own, of which there are no views.
            if not (isinstance(cache, FrameCache) and cache.is_ring):
                raise UserError(
                    f"streams cannot share a {type(cache).__name__}, which encodes its near history anew after every "
                    "chunk; roll them out one by one"
                )
        self.caches = list(caches)
        self.lanes = caches[0].batch_size
        self.free = list(range(self.lanes))

    def take(self, count: int) -> list[int]:
        """`count` lanes, the lowest that are free. Raises UserError when there are too few."""
        if count > len(self.free):
            raise UserError(f"{count} lanes are asked for, {len(self.free)} of {self.lanes} in the pool are free")
        return [heapq.heappop(self.free) for _ in range(count)]

    def give_back(self, lanes: Sequence[int]) -> None:
        """Free some lanes for the next stream."""
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
        """The cache of one expert for the next `num_frames` frames of the streams in `lanes`."""
        cache = self.caches[expert]
        return view_class(type(cache))(cache, lanes, frames_seen, num_frames, oldest)

    def bytes(self) -> int:
        """Bytes allocated for all lanes, layers and experts."""
        return sum(cache.bytes() for cache in self.caches)
