"""Runs many independent rollouts in one process: streams join and leave, and share passes.

A `StreamBatch` works in rounds, one per call of `step`. A round generates the next chunk of every stream in the batch:
the denoising steps, then the pass that writes the chunk to the cache. Rounds begin and end at chunk boundaries, where
streams join, leave and change their prompt. So all streams of a pass are at the same denoising step, whatever their
age. A stream that arrives during a round waits for its end, at most one chunk.

Streams share a pass when their chunks have the same shape and begin at the same place in the window (`mla/pool.py`). In
the steady state all do, and a round takes as many passes as one chunk of one stream, whatever the ages of the streams.
Other streams have their own passes in the same round: those whose windows are still filling up, by age; those with a
short last chunk; those with prompts of another length.

Noise comes from each stream's own generator, and no operation mixes batch items. So a stream equals the rollout of
`stream_chunks` with its prompt and seed. It is bit-identical where the stream shares no pass. Otherwise the summation
order of matrix products may differ, because it may depend on the batch size.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..denoise import Schedule
from ..errors import UsageError, UserError
from ..flow import STRENGTH, Sampler
from ..mla.conditions import Conditions, FramesAt, Given
from ..mla.model import StreamingModel
from ..mla.pool import CachePool, place_in_window
from .extent import check_start, end_notice, video_end
from .shared import PooledStream, SharedPasses
from .source import Source, check_alone

logger = logging.getLogger(__name__)


class StreamChunk(NamedTuple):
    """A finished chunk of a stream: `latents` `[C, F, H, W]`, float32, starting at its frame `first`.

    `last` means that the stream has ended and left. The chunk has no frames if the source ended at the chunk before.
    """

    stream: int
    first: int
    latents: Tensor
    last: bool


class StreamBatch:
    """Continuous batching of rollouts of `model`, or of several experts that share the noise levels (Wan2.2).

    The cache is a pool of `lanes`, allocated once for latents of `height x width`, in `cache_dtype` or by default as
    `set_cache` says. A stream takes one lane, with classifier-free guidance two. `num_inference_steps`, `shift`,
    `context_noise`, `sampler`, `denoising_steps` and `first_chunk_steps` are those of `stream_chunks` and apply to all
    streams, because they belong to the model.

    When there are too few free lanes for a stream, `when_full="refuse"` raises UserError and `"queue"` lets the stream
    wait in order of arrival. A pass takes at most `lanes_per_pass` lanes, by default all. Its working memory grows with
    this number; the cache does not. `device` is where the model computes, for hooks that move its weights there and
    back; the pool is allocated there. With `recache`, the window of a stream whose prompt has changed is written again
    before its next chunk, as in `stream_chunks`.

    Not thread-safe. Raises UserError for a model whose cache is not a ring of frames.
    """

    def __init__(
        self,
        model: StreamingModel | Sequence[StreamingModel],
        lanes: int,
        height: int,
        width: int,
        num_inference_steps: int = 8,
        shift: float = 1.0,
        context_noise: float = 0.0,
        when_full: Literal["refuse", "queue"] = "refuse",
        lanes_per_pass: int | None = None,
        cache_dtype: torch.dtype | None = None,
        sampler: Sampler = "euler",
        denoising_steps: Sequence[float] | None = None,
        first_chunk_steps: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        recache: bool = False,
    ) -> None:
        if lanes < 1 or (lanes_per_pass is not None and lanes_per_pass < 1):
            raise UsageError(f"lanes and lanes_per_pass must be at least 1, got {lanes} and {lanes_per_pass}")
        if when_full not in ("refuse", "queue"):
            raise UsageError(f"when_full must be 'refuse' or 'queue', got {when_full!r}")
        self.models = list(model) if isinstance(model, Sequence) else [model]
        self.devices = [torch.device(device or one.device) for one in self.models]
        places = zip(self.models, self.devices, strict=True)
        self.pool = CachePool([m.init_cache(lanes, height, width, dtype=cache_dtype, device=d) for m, d in places])
        self.causal, self.device = self.pool.caches[0].causal, self.devices[0]
        self.size = (self.models[0].noise_channels, height, width)
        steps = (num_inference_steps, shift, denoising_steps, first_chunk_steps, sampler, context_noise)
        self._schedule_from = functools.partial(Schedule.of, *steps)
        self.schedule = self._schedule_from()
        self.recache, self.when_full, self.lanes_per_pass = recache, when_full, lanes_per_pass
        self._streams: dict[int, PooledStream] = {}
        self._waiting: deque[int] = deque()
        self._numbers = itertools.count()

    @property
    def active(self) -> list[int]:
        """Streams that have lanes."""
        return [number for number, stream in self._streams.items() if stream.lanes]

    @property
    def waiting(self) -> list[int]:
        """Streams that wait for lanes, in order of arrival."""
        return list(self._waiting)

    def bytes(self) -> int:
        """Bytes of the pool."""
        return self.pool.bytes()

    def join(
        self,
        encoder_hidden_states: Tensor,
        seed: int = 0,
        num_frames: int | None = None,
        guidance_scale: float = 1.0,
        negative_hidden_states: Tensor | None = None,
        start: Tensor | None = None,
        conditions: Given | None = None,
        hold_start: bool = False,
        source: Tensor | FramesAt | None = None,
        strength: float = STRENGTH,
    ) -> int:
        """Add a stream that starts in the next round, and return its number.

        `encoder_hidden_states` and `negative_hidden_states` (zeros by default) are `[L, D]`. `start` is
        `[C, F0, H, W]`. `conditions` are for a batch of one, as from `image_conditions`. Their meaning is that in
        `stream_chunks`. Without `num_frames`, the stream runs until `leave`; with absolute positions, it ends at the
        last whole chunk within the rotary table, and a warning is logged.

        `source` is `[C, F, H, W]`, or a function that returns `[1, C, F, H, W]`. A round calls it for one chunk before
        generating anything, so a source that waits for frames delays all streams. The stream ends with its source.
        Streams share passes only with those of the same `strength`.

        Raises UserError when the pool is full and `when_full` is `refuse`; UsageError for values that do not fit.
        """
        text = self._read(encoder_hidden_states)
        negative = _zeros(text) if negative_hidden_states is None else self._read(negative_hidden_states)
        if len(negative[0]) != len(text[0]):
            raise UsageError(
                f"the negative prompt has {len(negative[0])} tokens, the prompt {len(text[0])}; pad both to one length"
            )
        if num_frames is not None and num_frames < 1:
            raise UsageError(f"num_frames must be at least 1, got {num_frames}; leave it out for an endless stream")
        clean = None
        if source is not None:
            check_alone(start)
            clean = Source(source.unsqueeze(0) if isinstance(source, Tensor) else source, 1, self.size)
            num_frames = clean.cut(num_frames)
        schedule = self.schedule if source is None else self._schedule_from(strength)
        positions, given = self.models[0].rotary_table().max_len, 0 if start is None else start.shape[1]
        end = video_end(self.causal, positions, num_frames, given)
        if start is not None:
            check_start(start.unsqueeze(0), self.causal, end, self.size, whole_chunks=not hold_start)
        generator = torch.Generator().manual_seed(seed)
        supplied = Conditions(self.models, conditions, 1, end, self.size[1:])
        cut = end != num_frames
        stream = PooledStream(text, negative, guidance_scale, end, start, generator, supplied, schedule, clean, cut=cut)
        self._check_room(stream)
        number = next(self._numbers)
        self._streams[number] = stream
        self._waiting.append(number)
        self._admit()
        return number

    def change_prompt(self, stream: int, encoder_hidden_states: Tensor) -> None:
        """Give a stream another prompt `[L, D]`, starting with its next chunk; earlier chunks do not change.

        With `recache`, the next round begins by writing its window to the cache again. Raises UsageError if the length
        differs from that of a negative prompt other than zeros.
        """
        changed, text = self._found(stream), self._read(encoder_hidden_states)
        tokens, before = len(text[0]), len(changed.negative[0])
        if tokens != before:
            if changed.negative[0].any():
                raise UsageError(f"the prompt has {tokens} tokens, the negative prompt {before}; pad it to that length")
            changed.negative = _zeros(text)
        changed.text, changed.stale = text, self.recache

    def leave(self, stream: int) -> None:
        """Remove a stream from the batch or the queue and free its lanes. Raises UsageError for an unknown stream."""
        self.pool.give_back(self._found(stream).lanes)
        del self._streams[stream]
        if stream in self._waiting:
            self._waiting.remove(stream)
        self._admit()

    @torch.no_grad()
    def step(self) -> list[StreamChunk]:
        """Run one round: return the next chunk of every active stream, in the order of their numbers.

        A round that fails, such as by running out of memory, leaves every stream unchanged and can be repeated.
        """
        for number in self.active:
            self._rewrite(self._streams[number])
            self._fetch(self._streams[number])
        made: dict[int, tuple[Tensor, Tensor]] = {}
        for number in self.active:
            if self._frames(self._streams[number]) == 0:
                nothing = torch.empty(self.size[0], 0, *self.size[1:], device=self.device)
                made[number] = nothing, nothing
        for numbers in self._shared_passes():
            made.update(zip(numbers, self._chunks([self._streams[number] for number in numbers]), strict=True))
        chunks = []
        for number in sorted(made):
            # A copy, so that a kept chunk does not hold the memory of the whole pass.
            stream, latents = self._streams[number], made[number][0].clone()
            first, stream.drawn, stream.clean = stream.frames_seen, [], None
            stream.frames_seen += latents.shape[1]
            if self.recache and latents.shape[1]:
                written = made[number][1].clone().unsqueeze(0)
                conditions = stream.conditions.at(first, stream.frames_seen)
                stream.recent.add(first, written, self.causal.first_kept(stream.frames_seen), conditions)
            last = stream.frames_seen == stream.num_frames
            chunks.append(StreamChunk(number, first, latents, last))
        for chunk in chunks:
            if chunk.last:
                ended = self._streams[chunk.stream]
                if ended.cut:
                    logger.warning("%s", end_notice(self.causal, f"stream {chunk.stream}", ended.num_frames))
                self.leave(chunk.stream)
        return chunks

    def chunks(self) -> Iterator[StreamChunk]:
        """Run rounds and yield their chunks until no stream is left."""
        while self._streams:
            yield from self.step()

    def _read(self, text: Tensor) -> list[Tensor]:
        """A prompt per expert, on its device and in its dtype; experts with the same ones share a copy."""
        width = self.models[0].config.text_dim
        if text.ndim != 2 or text.shape[1] != width:
            raise UsageError(f"the prompt of a stream must have shape [L, {width}], got {list(text.shape)}")
        kinds = [(place, model.dtype) for model, place in zip(self.models, self.devices, strict=True)]
        copies = {kind: text.to(*kind) for kind in kinds}
        return [copies[kind] for kind in kinds]

    def _found(self, stream: int) -> PooledStream:
        if stream not in self._streams:
            raise UsageError(f"there is no stream {stream} in the batch; it may have ended")
        return self._streams[stream]

    def _check_room(self, stream: PooledStream) -> None:
        """Raise UsageError or UserError unless the stream can join or queue."""
        needed, free = stream.lanes_needed, len(self.pool.free)
        if needed > self.pool.lanes:
            raise UsageError(f"a stream with guidance needs {needed} lanes, the pool has {self.pool.lanes}")
        if self.when_full == "refuse" and needed > free:
            raise UserError(
                f"the pool is full: the stream needs {needed} of its {self.pool.lanes} lanes, but {free} are free; "
                "set when_full='queue' to let it wait"
            )

    def _admit(self) -> None:
        """Give lanes to waiting streams, strictly in order, so that none waits forever."""
        while self._waiting and self._streams[self._waiting[0]].lanes_needed <= len(self.pool.free):
            stream = self._streams[self._waiting.popleft()]
            stream.lanes = self.pool.take(stream.lanes_needed)

    def _frames(self, stream: PooledStream) -> int:
        """Frames of a stream's next chunk."""
        stop = self.causal.chunk_end(stream.frames_seen)
        return (stop if stream.num_frames is None else min(stop, stream.num_frames)) - stream.frames_seen

    def _fetch(self, stream: PooledStream) -> None:
        """Get the next chunk of a stream's source, which may be the last, unless a failed round already has."""
        if stream.source is None or stream.clean is not None:
            return
        first, frames = stream.frames_seen, self._frames(stream)
        stream.clean = stream.source.at(first, first + frames, self.device)
        if stream.clean.shape[2] < frames:
            stream.num_frames, stream.cut = first + stream.clean.shape[2], False

    def _conditions(self, stream: PooledStream, frames: int) -> dict[str, Tensor]:
        """The conditions of a stream's next chunk, `[1, ...]` each."""
        return stream.conditions.at(stream.frames_seen, stream.frames_seen + frames)

    def _shared_passes(self) -> list[list[int]]:
        """The active streams, grouped by shared passes."""
        shared: dict[tuple[Any, ...], list[int]] = {}
        for number in self.active:
            stream = self._streams[number]
            frames = self._frames(stream)
            if frames == 0:
                continue
            place = place_in_window(self.causal, stream.frames_seen, frames)
            held = stream.held(frames)
            held_frames = 0 if held is None else held.shape[1]
            shapes = tuple(sorted((name, x.shape) for name, x in self._conditions(stream, frames).items()))
            opens, times = stream.frames_seen == 0, tuple(stream.schedule.of_chunk(stream.frames_seen).tolist())
            key = (frames, place, opens, times, len(stream.text[0]), held_frames, shapes)
            shared.setdefault(key, []).append(number)
        return [part for numbers in shared.values() for part in self._parts(numbers)]

    def _parts(self, numbers: list[int]) -> Iterator[list[int]]:
        """Split streams into runs of at most `lanes_per_pass` lanes, but at least one stream."""
        part: list[int] = []
        lanes = 0
        for number in numbers:
            more = len(self._streams[number].lanes)
            if part and self.lanes_per_pass is not None and lanes + more > self.lanes_per_pass:
                yield part
                part, lanes = [], 0
            part.append(number)
            lanes += more
        yield part

    def _rewrite(self, stream: PooledStream) -> None:
        """Write a stream's window again if its prompt has changed; after a failure, the next round starts over."""
        if not stream.stale:
            return
        # As in `FrameCache.rewind`.
        oldest = self.causal.first_kept(max(stream.frames_seen, stream.written))
        oldest = min([oldest, *(first for first, _, _ in stream.recent)])
        for expert in range(len(self.models)):
            for first, written, conditions in stream.recent:
                chunk = ([stream], [conditions], written.shape[2])
                passes = SharedPasses(self.models, self.pool, *chunk, self.devices, first, oldest)
                passes.write_to(expert, written, self.schedule.context_noise)
        stream.stale = False

    def _chunks(self, streams: list[PooledStream]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each of the streams, which share their passes: the next chunk `[C, F, H, W]`, and its cached version."""
        first, frames = streams[0].frames_seen, self._frames(streams[0])
        channels, height, width = self.size
        schedule = streams[0].schedule
        draws = schedule.draws(first)
        for stream in streams:
            while len(stream.drawn) < draws:
                stream.drawn.append(torch.randn((1, channels, frames, height, width), generator=stream.generator))
        noises = [torch.cat(drawn).to(self.device) for drawn in zip(*(stream.drawn for stream in streams), strict=True)]
        begun = zip(noises[0].split(1), streams, strict=True)
        noises[0] = torch.cat([stream.schedule.begin(noise, first, stream.clean) for noise, stream in begun])
        starts = [held for held in (stream.held(frames) for stream in streams) if held is not None]
        held = torch.stack(starts).to(self.device, torch.float32) if starts else None
        conditions = [self._conditions(stream, frames) for stream in streams]
        passes = SharedPasses(self.models, self.pool, streams, conditions, frames, self.devices)
        for stream in streams:
            stream.written = first + frames
        return zip(*passes.chunk(noises, schedule, first, held), strict=True)


def _zeros(text: list[Tensor]) -> list[Tensor]:
    """Zeros in the shapes of `text`, expanded from one scalar."""
    return [one.new_zeros(()).expand_as(one) for one in text]
