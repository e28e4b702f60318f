"""Computes which frames a chunk of a causal video model attends to, and at which temporal index.

The block-causal forward over a whole clip and the streaming forward over a ring cache share this arithmetic, so they
cannot disagree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Chunk(NamedTuple):
    """The frames `[start, stop)` of a chunk; its history is what comes before."""

    start: int
    stop: int


class CausalConfig(BaseModel):
    """Chunks, window and sinks of a causal video transformer, all in latent frames.

    `window_frames` counts everything a query can see: sinks, history and its own chunk. `None` is an unbounded window,
    which the streaming cache does not support.

    With `sink_positions="window"`, the frames of a window that has moved on are re-indexed from 0, so the temporal
    index stays in `[0, window_frames)`, however long the rollout. With `"absolute"`, every frame keeps the index of its
    place in the video, as Self-Forcing (arXiv 2506.08009) does. The two differ only in how far away the sinks appear,
    but an `"absolute"` rollout ends where the rotary table does.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_frames_per_block: int = Field(3, ge=1)
    window_frames: int | None = Field(21, ge=1)
    sink_frames: int = Field(0, ge=0)
    independent_first_frame: bool = False
    sink_positions: Literal["window", "absolute"] = "window"

    @model_validator(mode="after")
    def _window_holds_sinks_and_a_chunk(self) -> CausalConfig:
        if self.window_frames is not None and self.window_frames < self.sink_frames + self.num_frames_per_block:
            raise ValueError(
                f"window_frames={self.window_frames} cannot hold sink_frames={self.sink_frames} and one chunk of "
                f"num_frames_per_block={self.num_frames_per_block}"
            )
        return self

    def chunks(self, num_frames: int) -> list[Chunk]:
        """The chunks of a clip; the last one may be short."""
        return list(self.chunk_ranges(num_frames))

    def chunk_ranges(self, num_frames: int | None) -> Iterator[Chunk]:
        """The same chunks one by one, for rollouts of any length; endless if `num_frames` is None."""
        stop = 0
        while num_frames is None or stop < num_frames:
            start, stop = stop, self.chunk_end(stop)
            if num_frames is not None:
                stop = min(stop, num_frames)
            yield Chunk(start, stop)

    def chunk_end(self, start: int) -> int:
        """The end of the chunk that begins at frame `start`, unless the clip ends earlier."""
        return 1 if self.independent_first_frame and start == 0 else start + self.num_frames_per_block

    def history(self, start: int, stop: int) -> list[int]:
        """Earlier frames visible to the chunk `[start, stop)`: the sinks, then the recent frames."""
        if self.window_frames is None:
            return list(range(start))
        sinks = range(min(self.sink_frames, start))
        recent = range(max(self.sink_frames, stop - (self.window_frames - self.sink_frames)), start)
        return [*sinks, *recent]

    def temporal_index(self, frames: list[int], stop: int) -> list[int]:
        """Rotary index of each of `frames` as seen by the chunk that ends at `stop`."""
        if self.window_frames is None or self.sink_positions == "absolute":
            return list(frames)
        shift = max(0, stop - self.window_frames)
        return [frame if frame < self.sink_frames else frame - shift for frame in frames]

    def longest(self, positions: int) -> int | None:
        """Frames of the longest rollout that a rotary table of `positions` allows; None if there is no limit."""
        in_window = self.window_frames is not None and self.sink_positions == "window"
        return None if in_window and (self.window_frames or 0) <= positions else positions

    def first_kept(self, frames_seen: int) -> int:
        """The first frame after the sinks that the ring still holds after `frames_seen` frames."""
        assert self.window_frames is not None
        return max(self.sink_frames, frames_seen - (self.window_frames - self.sink_frames))

    def slot(self, frame: int) -> int:
        """Ring slot of an absolute frame: sinks are pinned, the other slots are reused in turn."""
        assert self.window_frames is not None
        if frame < self.sink_frames:
            return frame
        return self.sink_frames + (frame - self.sink_frames) % (self.window_frames - self.sink_frames)


def causal_of(config: Mapping[str, Any]) -> CausalConfig:
    """The `causal` section of a transformer's configuration, by default with the defaults of every key."""
    return CausalConfig(**(config.get("causal") or {}))
