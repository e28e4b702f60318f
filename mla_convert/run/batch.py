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
import threading
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..denoise import Schedule
from ..errors import UsageError, UserError
from ..flow import STRENGTH, Sampler
from ..mla.conditions import Conditions, FramesAt, Given
from ..mla.model import StreamingModel
from ..mla.pool import CachePool
from .extent import check_start, end_notice, video_end
from .failures import RoundError, StreamError
from .rounds import Rounds
from .shared import PooledStream
from .source import CleanVideo, check_alone, shortest

__all__ = ["RoundError", "StreamBatch", "StreamChunk", "StreamError"]

logger = logging.getLogger(__name__)


class StreamChunk(NamedTuple):
    """A finished chunk of a stream: `latents` `[C, F, H, W]`, float32, starting at its frame `first`.

    `last` means that the stream has ended and left. The chunk has no frames if the source ended at the chunk before, or
    if the stream ended with an `error`: its source or condition raised something, or its chunk was not finite.
    """

    stream: int
    first: int
    latents: Tensor
    last: bool
    error: StreamError | None = None


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

    `step` runs in one thread at a time; all other methods can be called from any thread at any time, and take effect
    with the next round. `lanes_per_pass` can be set between rounds.

    Raises UserError for a model whose cache is not a ring of frames.
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
        self.causal = self.pool.caches[0].causal
        self.size = (self.models[0].noise_channels, height, width)
        steps = (num_inference_steps, shift, denoising_steps, first_chunk_steps, sampler, context_noise)
        self._schedule_from = functools.partial(Schedule.of, *steps)
        self.schedule = self._schedule_from()
        self.recache, self.when_full, self.lanes_per_pass = recache, when_full, lanes_per_pass
        self._rounds = Rounds(self.models, self.devices, self.pool, self.size, recache)
        # Of the streams, the queue and the free lanes; a round holds it only to begin and to end.
        self._lock, self._stepping = threading.Lock(), threading.Lock()
        self._streams: dict[int, PooledStream] = {}
        self._waiting: deque[int] = deque()
        self._numbers = itertools.count()

    @property
    def active(self) -> list[int]:
        """Streams that have lanes."""
        with self._lock:
            return [number for number, stream in self._streams.items() if stream.lanes]

    @property
    def waiting(self) -> list[int]:
        """Streams that wait for lanes, in order of arrival."""
        with self._lock:
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

        `encoder_hidden_states` and `negative_hidden_states` (zeros by default) are `[L, D]`; they are moved to the
        device here, unless they are there already in the model's dtype. `start` is `[C, F0, H, W]`. `conditions` are
        for a batch of one, as from `image_conditions`. Their meaning is that in `stream_chunks`. Without `num_frames`,
        the stream runs until `leave`; with absolute positions, it ends at the last whole chunk within the rotary table,
        and a warning is logged.

        `source` is `[C, F, H, W]`, or a function that returns `[1, C, F, H, W]`. A round calls it for one chunk before
        generating anything, so a source that waits for frames delays the round; leave its stream out of `step` until
        they are there. The stream ends with its source. Streams share passes only with those of the same `strength`.

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
            clean = CleanVideo(source.unsqueeze(0) if isinstance(source, Tensor) else source, 1, self.size)
            num_frames = shortest(num_frames, clean.given)
        schedule = self.schedule if source is None else self._schedule_from(strength)
        positions, given = self.models[0].rotary_table().max_len, 0 if start is None else start.shape[1]
        end = video_end(self.causal, positions, num_frames, given)
        if start is not None:
            check_start(start.unsqueeze(0), self.causal, end, self.size, whole_chunks=not hold_start)
        generator = torch.Generator().manual_seed(seed)
        supplied = Conditions(self.models, conditions, 1, end, self.size[1:])
        cut = end != num_frames
        stream = PooledStream(text, negative, guidance_scale, end, start, generator, supplied, schedule, clean, cut=cut)
        with self._lock:
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
        text = self._read(encoder_hidden_states)
        with self._lock:
            found = self._found(stream)
            negative = found.negative if found.changed is None else found.changed[1]
            tokens, before = len(text[0]), len(negative[0])
            if tokens != before:
                if negative[0].any():
                    raise UsageError(
                        f"the prompt has {tokens} tokens, the negative prompt {before}; pad it to that length"
                    )
                negative = _zeros(text)
            found.changed = text, negative

    def leave(self, stream: int) -> None:
        """Remove a stream from the batch or the queue and free its lanes. Raises UsageError for an unknown stream.

        A chunk of it that a running round makes is dropped.
        """
        with self._lock:
            self._found(stream)
            self._remove(stream)

    @torch.no_grad()
    def step(self, streams: Collection[int] | None = None) -> list[StreamChunk]:
        """Run one round: return the next chunk of every active stream, in the order of their numbers.

        With `streams`, only those of them that are active take part; the others keep their lanes and wait. So a stream
        whose reader is slow, or whose source has no frames yet, holds up nobody.

        A stream whose source, condition or chunk fails ends with an `error` in its chunk, and the others go on. A round
        that fails leaves every stream unchanged and can be repeated: lack of memory raises torch's or Python's own
        error, any other failure of a pass RoundError. Raises UsageError while another thread runs a round.
        """
        if not self._stepping.acquire(blocking=False):
            raise UsageError("another thread is running a round of this batch; call step in one thread")
        try:
            return self._round(streams)
        finally:
            self._stepping.release()

    def _round(self, streams: Collection[int] | None) -> list[StreamChunk]:
        with self._lock:
            taking_part = {
                number: stream
                for number, stream in sorted(self._streams.items())
                if stream.lanes and (streams is None or number in streams)
            }
            for stream in taking_part.values():
                stream.change(self.recache)
        made = self._rounds.chunks(taking_part, self.lanes_per_pass)
        chunks, notices = [], []
        with self._lock:
            for number, (latents, written, error) in sorted(made.items()):
                stream, frames = taking_part[number], latents.shape[1]
                if number not in self._streams:
                    continue
                first, seen = stream.frames_seen, stream.frames_seen + frames
                last = error is not None or seen == stream.num_frames
                chunks.append(StreamChunk(number, first, latents, last, error))
                stream.advance(frames, written, self.causal.first_kept(seen))
                if last:
                    self._remove(number)
                if error is not None:
                    notices.append(str(error))
                elif last and stream.cut:
                    notices.append(end_notice(self.causal, f"stream {number}", stream.num_frames))
        for notice in notices:
            logger.warning("%s", notice)
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
        # On a device this would wait for the kernels of a running round; a chunk that is not finite is noticed anyway.
        if text.device.type == "cpu" and not text.isfinite().all():
            raise UsageError("the prompt of a stream contains NaN or Inf; check the text encoder and its dtype")
        kinds = [(place, model.dtype) for model, place in zip(self.models, self.devices, strict=True)]
        copies = {kind: text.to(*kind) for kind in kinds}
        return [copies[kind] for kind in kinds]

    def _found(self, stream: int) -> PooledStream:
        if stream not in self._streams:
            raise UsageError(f"there is no stream {stream} in the batch; it may have ended")
        return self._streams[stream]

    def _remove(self, number: int) -> None:
        # A running round may still write to these lanes, but others that get them begin with the next round.
        self.pool.give_back(self._streams.pop(number).lanes)
        if number in self._waiting:
            self._waiting.remove(number)
        self._admit()

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


def _zeros(text: list[Tensor]) -> list[Tensor]:
    """Zeros in the shapes of `text`, expanded from one scalar."""
    return [one.new_zeros(()).expand_as(one) for one in text]
