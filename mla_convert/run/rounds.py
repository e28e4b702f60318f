"""Generates the next chunk of many streams of a pool, in as few passes as their shapes and ages allow."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import lacks_memory
from ..mla.model import StreamingModel
from ..mla.pool import CachePool, place_in_window
from .failures import NOT_FINITE, RoundError, StreamError
from .shared import PooledStream, SharedPasses

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What lack of memory raises: it is the fault of no stream, and a server has to know it by its type."""


class Made(NamedTuple):
    """A stream's next chunk `[C, F, H, W]`, float32, and its cached version if the stream has to keep that.

    With an `error`, the stream ends without another frame.
    """

    latents: Tensor
    written: Tensor | None = None
    error: StreamError | None = None


class Rounds:
    """Generates chunks of `size` (C, H, W) with `models` on `devices`, which share `pool`.

    With `keeps_written`, streams keep what was cached.
    """

    def __init__(
        self,
        models: list[StreamingModel],
        devices: list[torch.device],
        pool: CachePool,
        size: tuple[int, int, int],
        keeps_written: bool,
    ) -> None:
        self.models, self.devices, self.pool, self.size = models, devices, pool, size
        self.causal = pool.caches[0].causal
        self.keeps_written = keeps_written

    def chunks(self, streams: Mapping[int, PooledStream], lanes_per_pass: int | None) -> dict[int, Made]:
        """The next chunks of `streams`, by number; `PooledStream.advance` has still to be called with them.

        Until then no stream has moved on, so after an exception the round can be repeated. An exception of a stream's
        source or condition ends that stream only. Raises RoundError if a pass fails, but MemoryError or
        torch's own error for lack of memory.
        """
        made: dict[int, Made] = {}
        for number, stream in streams.items():
            self._prepare(number, stream)
            if stream.error is not None or self._frames(stream) == 0:
                made[number] = Made(self._nothing(), error=stream.error)
        remaining = {number: stream for number, stream in streams.items() if number not in made}
        for number, stream in remaining.items():
            if stream.stale:
                with _named([number]):
                    self._rewrite(stream)
        for numbers in self._shared_passes(remaining, lanes_per_pass):
            with _named(numbers):
                made.update(self._chunks({number: streams[number] for number in numbers}))
        return made

    def _frames(self, stream: PooledStream) -> int:
        """Frames of a stream's next chunk."""
        stop = self.causal.chunk_end(stream.frames_seen)
        return (stop if stream.num_frames is None else min(stop, stream.num_frames)) - stream.frames_seen

    def _prepare(self, number: int, stream: PooledStream) -> None:
        """Ask for what the caller supplies for the next chunk, unless a failed round has; an exception ends the stream.

        A source is never asked for the same frames twice, because a camera could not return them.
        """
        if stream.error is not None:
            return
        supplier = "its source failed"
        try:
            if stream.source is not None and stream.clean is None:
                first, frames = stream.frames_seen, self._frames(stream)
                stream.clean = stream.source.at(first, first + frames)
                if stream.clean.shape[2] < frames:
                    stream.num_frames, stream.cut = first + stream.clean.shape[2], False
            supplier = "its conditions failed"
            self._conditions(stream)
        except Exception as error:
            stream.error = StreamError(number, supplier, error)

    def _conditions(self, stream: PooledStream) -> dict[str, Tensor]:
        """The conditions of a stream's next chunk, `[1, ...]` each; functions are asked once."""
        frames = self._frames(stream)
        return stream.conditions.at(stream.frames_seen, stream.frames_seen + frames) if frames else {}

    def _shared_passes(self, streams: Mapping[int, PooledStream], lanes_per_pass: int | None) -> Iterable[list[int]]:
        """The numbers of `streams`, grouped by shared passes."""
        shared: dict[tuple[Any, ...], list[int]] = {}
        for number, stream in streams.items():
            frames = self._frames(stream)
            place = place_in_window(self.causal, stream.frames_seen, frames)
            held = stream.held(frames)
            held_frames = 0 if held is None else held.shape[1]
            shapes = tuple(sorted((name, x.shape) for name, x in self._conditions(stream).items()))
            opens, times = stream.frames_seen == 0, tuple(stream.schedule.of_chunk(stream.frames_seen).tolist())
            key = (frames, place, opens, times, len(stream.text[0]), held_frames, shapes)
            shared.setdefault(key, []).append(number)
        for numbers in shared.values():
            yield from _parts(numbers, streams, lanes_per_pass)

    def _rewrite(self, stream: PooledStream) -> None:
        """Write a stream's window again for its new prompt; after a failure, the next round starts over."""
        # As in `FrameCache.rewind`.
        oldest = self.causal.first_kept(max(stream.frames_seen, stream.written))
        oldest = min([oldest, *(first for first, _, _ in stream.recent)])
        for expert in range(len(self.models)):
            for first, written, conditions in stream.recent:
                chunk = ([stream], [conditions], written.shape[2])
                passes = SharedPasses(self.models, self.pool, *chunk, self.devices, first, oldest)
                passes.write_to(expert, written, stream.schedule.context_noise)
        stream.stale = False

    def _chunks(self, sharing: Mapping[int, PooledStream]) -> dict[int, Made]:
        """The next chunk of each of the streams `sharing` their passes; one that is not finite is an error."""
        streams = list(sharing.values())
        first, frames = streams[0].frames_seen, self._frames(streams[0])
        channels, height, width = self.size
        schedule, device = streams[0].schedule, self.devices[0]
        draws = schedule.draws(first)
        for stream in streams:
            while len(stream.drawn) < draws:
                stream.drawn.append(torch.randn((1, channels, frames, height, width), generator=stream.generator))
        noises = [torch.cat(drawn).to(device) for drawn in zip(*(stream.drawn for stream in streams), strict=True)]
        begun = []
        for noise, stream in zip(noises[0].split(1), streams, strict=True):
            clean = None if stream.clean is None else stream.clean.to(device)
            begun.append(stream.schedule.begin(noise, first, clean))
        noises[0] = torch.cat(begun)
        starts = [held for held in (stream.held(frames) for stream in streams) if held is not None]
        held = torch.stack(starts).to(device, torch.float32) if starts else None
        conditions = [self._conditions(stream) for stream in streams]
        passes = SharedPasses(self.models, self.pool, streams, conditions, frames, self.devices)
        for stream in streams:
            stream.written = stream.frames_seen + frames
        latents = passes.chunk(noises, schedule, first, held)
        cached = passes.keep(latents, noises, schedule)
        finite = latents.isfinite().flatten(1).all(1).tolist()
        made = {}
        for index, number in enumerate(sharing):
            if finite[index]:
                # Copies, so that a kept chunk does not hold the memory of the whole pass.
                written = cached[index : index + 1].clone() if self.keeps_written else None
                made[number] = Made(latents[index].clone(), written)
            else:
                made[number] = Made(self._nothing(), error=StreamError(number, NOT_FINITE))
        return made

    def _nothing(self) -> Tensor:
        """A chunk without frames."""
        return torch.empty(self.size[0], 0, *self.size[1:], dtype=torch.float32, device=self.devices[0])


@contextlib.contextmanager
def _named(numbers: list[int]) -> Iterator[None]:
    """Let exceptions of passes name the streams `numbers`, except for lack of memory."""
    try:
        yield
    except OUT_OF_MEMORY:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise MemoryError(" ".join(str(error).split())) from error
        raise RoundError(numbers, error) from error


def _parts(numbers: list[int], streams: Mapping[int, PooledStream], most: int | None) -> Iterator[list[int]]:
    """Split streams into runs of at most `most` lanes, but at least one stream."""
    part: list[int] = []
    lanes = 0
    for number in numbers:
        more = len(streams[number].lanes)
        if part and most is not None and lanes + more > most:
            yield part
            part, lanes = [], 0
        part.append(number)
        lanes += more
    yield part
