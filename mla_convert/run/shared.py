"""Runs the passes over a chunk of several streams of a pool that share them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..denoise import Schedule
from ..flow import guided
from ..mla.conditions import Conditions, placed
from ..mla.model import StreamingModel
from ..mla.pool import CachePool, LaneView
from .failures import StreamError
from .passes import Passes, run_pass
from .recent import RecentChunks
from .source import CleanVideo


@dataclass
class PooledStream:
    """The state of a rollout in a pool.

    `text` and `negative` `[L, D]` hold one prompt per expert, on its device and in its dtype; `changed` is the next
    pair of them. `drawn`, `clean` and `error` are noise and source of the current chunk and what ends the stream at it,
    kept so that a failed round can be repeated. `cut` says that `num_frames` is the limit of the rotary table, not the
    requested length. With `recache`, `recent` holds the chunks `[1, C, F, H, W]` that are in the ring, and `stale` says
    that they have to be written again. `written` is the end of the last chunk that has taken slots of the ring, also in
    a failed round.
    """

    text: list[Tensor]
    negative: list[Tensor]
    guidance_scale: float
    num_frames: int | None
    start: Tensor | None
    generator: torch.Generator
    conditions: Conditions
    schedule: Schedule
    source: CleanVideo | None = None
    lanes: list[int] = field(default_factory=list)
    frames_seen: int = 0
    written: int = 0
    drawn: list[Tensor] = field(default_factory=list)
    clean: Tensor | None = None
    recent: RecentChunks = field(default_factory=RecentChunks)
    stale: bool = False
    cut: bool = False
    changed: tuple[list[Tensor], list[Tensor]] | None = None
    error: StreamError | None = None

    @property
    def lanes_needed(self) -> int:
        return 1 if self.guidance_scale == 1 else 2

    def change(self, recache: bool) -> None:
        """Read the prompts of `changed` from now on; with `recache`, the window is stale."""
        if self.changed is not None:
            (self.text, self.negative), self.changed, self.stale = self.changed, None, recache

    def advance(self, frames: int, written: Tensor | None, first_kept: int) -> None:
        """Move on by a chunk of `frames` frames, `written` `[1, C, F, H, W]` as it is cached, if that is to be kept.

        Allocates nothing on a device, so it cannot fail halfway. `first_kept` is the first frame left in the ring.
        """
        first, self.drawn, self.clean = self.frames_seen, [], None
        self.frames_seen += frames
        if written is not None:
            self.recent.add(first, written, first_kept, self.conditions.at(first, self.frames_seen))
        if self.start is not None and self.start.shape[1] <= self.frames_seen:
            self.start = None

    def held(self, frames: int) -> Tensor | None:
        """The part `[C, F0, H, W]` of the next `frames` frames that the start covers; None if there is none."""
        if self.start is None or self.start.shape[1] <= self.frames_seen:
            return None
        return self.start[:, self.frames_seen : self.frames_seen + frames]


class _Inputs(NamedTuple):
    """What an expert reads beside the chunk: its lanes of the pool, the texts `[B, L, D]` and the conditions."""

    view: LaneView
    text: Tensor
    conditions: dict[str, Tensor]


class SharedPasses(Passes):
    """The passes over one chunk of some streams; the batch has a lane per stream, then a lane per guided stream.

    The chunk is the next one of each stream. For a single stream, `first` can name an earlier chunk by its first frame;
    `oldest` is then the first visible frame. `of_streams` are the conditions of each stream for the chunk.
    """

    def __init__(
        self,
        models: list[StreamingModel],
        pool: CachePool,
        streams: list[PooledStream],
        of_streams: Sequence[Mapping[str, Tensor]],
        frames: int,
        devices: list[torch.device],
        first: int | None = None,
        oldest: int | None = None,
    ) -> None:
        super().__init__(models)
        self.pool, self.streams, self.of_streams = pool, streams, of_streams
        self.frames, self.devices, self.first, self.oldest = frames, devices, first, oldest
        self.doubled = [index for index, stream in enumerate(streams) if stream.lanes_needed == 2]
        self.indices = [*range(len(streams)), *self.doubled]
        self._inputs: dict[int, _Inputs] = {}
        device = devices[0]
        self.order = torch.tensor(self.indices).to(device)
        self.guided = torch.tensor(self.doubled, dtype=torch.long).to(device)
        scales = [streams[index].guidance_scale for index in self.doubled]
        self.scales = torch.tensor(scales).view(-1, 1, 1, 1, 1).to(device)

    def _of(self, expert: int) -> _Inputs:
        """What an expert reads, made for its first pass over the chunk: a window that is rewritten has one expert."""
        if expert not in self._inputs:
            streams, doubled = self.streams, [self.streams[index] for index in self.doubled]
            lanes = [stream.lanes[0] for stream in streams] + [stream.lanes[1] for stream in doubled]
            seen = [self.streams[index].frames_seen if self.first is None else self.first for index in self.indices]
            view = self.pool.view(expert, lanes, seen, self.frames, self.oldest)
            text = [stream.text[expert] for stream in streams] + [stream.negative[expert] for stream in doubled]
            in_order = [self.of_streams[index] for index in self.indices]
            conditions = placed(in_order, self.devices[expert], self.models[expert].dtype)
            self._inputs[expert] = _Inputs(view, torch.stack(text), conditions)
        return self._inputs[expert]

    def _guided(self, v: Tensor, batch: int) -> Tensor:
        v, unguided = v[:batch], v[batch:]
        if not len(unguided):
            return v
        return v.index_copy(0, self.guided, guided(v[self.guided], unguided, self.scales))

    def _run(self, expert: int, x: Tensor, levels: tuple[float, float], held: int, write: bool) -> Tensor:
        model, (view, text, conditions) = self.models[expert], self._of(expert)
        x = x.index_select(0, self.order).to(self.devices[expert], model.dtype)
        # Call the model, not `forward_chunk`: hooks that move weights to the device run only on calls.
        call = functools.partial(model, cache=view, write=write)
        return run_pass(model, call, x, levels, held, text, conditions)
