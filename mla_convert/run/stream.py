"""Rolls out a causal video model, dense or latent, chunk by chunk with constant memory."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..denoise import Schedule
from ..flow import STRENGTH, Sampler, guided
from ..mla.conditions import Conditions, FramesAt, Given, placed
from ..mla.graph import denoiser
from ..mla.model import StreamingModel
from .extent import check_start, end_notice, video_end
from .passes import Passes, run_pass
from .recent import RecentChunks, check_rewinds
from .source import CleanVideo, check_alone, shortest, with_source

logger = logging.getLogger(__name__)

Seeds = int | torch.Generator | Sequence[int] | Sequence[torch.Generator]
OnStep = Callable[[int, int, float, Tensor], Tensor | None]
PromptAt = Callable[[int], Tensor | None]


def stream_chunks(
    model: StreamingModel | Sequence[StreamingModel],
    encoder_hidden_states: Tensor,
    num_frames: int | None,
    height: int,
    width: int,
    num_inference_steps: int = 8,
    shift: float = 1.0,
    context_noise: float = 0.0,
    seed: Seeds = 0,
    guidance_scale: float = 1.0,
    negative_hidden_states: Tensor | None = None,
    start: Tensor | None = None,
    *,
    source: Tensor | FramesAt | None = None,
    strength: float = STRENGTH,
    conditions: Given | None = None,
    sampler: Sampler = "euler",
    denoising_steps: Sequence[float] | None = None,
    first_chunk_steps: Sequence[float] | None = None,
    prompt_at: PromptAt | None = None,
    recache: bool = False,
    hold_start: bool = False,
    on_step: OnStep | None = None,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Yield latent chunks `[B, C, F, H, W]`, float32, of a rollout of `num_frames` frames; None never ends.

    With absolute positions, the rollout ends with the rotary table (see `video_end`), and a warning is logged.

    Every chunk is denoised in `num_inference_steps` steps and yielded. When the next one is asked for, one more pass
    writes it to the cache at noise level `context_noise` (Self-Forcing, arXiv 2506.08009, algorithm 1).
    `denoising_steps`, decreasing noise levels out of 1000, replace evenly spaced steps; `first_chunk_steps` are those
    of the first chunk. `shift` warps all of them. The `sampler` takes Euler steps, or with `renoise` adds new noise to
    the predicted clean chunk, as for few-step students of Self-Forcing, Causal-Forcing and LongLive. A flow map
    predicts the mean velocity of each step (down to 0 with `renoise`), and has r = t in the pass that writes.

    `model` may be several experts that share the work by their `noise_range` (Wan2.2). Each step is taken by the expert
    for its noise level, and a finished chunk is written to the cache of every expert.

    With a `guidance_scale` other than 1, every item is denoised a second time with `negative_hidden_states`
    `[1, L, D]`, zeros by default, and its own half of the cache (classifier-free guidance, arXiv 2207.12598).

    One `seed` draws the noise of the whole batch. With a seed or generator per item, item i equals its rollout alone.

    `start` `[B or 1, C, F0, H, W]` is a clean beginning: its chunks are written to the cache and yielded instead of
    being denoised. Their noise is drawn anyway, so a rollout that starts with the first chunks of another continues
    like it. Raises UsageError if `start` does not end with a chunk, except with `hold_start`: then its frames in that
    chunk are held clean, at noise level 0, while the others are denoised. This is for models that are trained with the
    image as a part of the first chunk.

    `source` is a clean video to restyle: latents `[B or 1, C, F, H, W]`, or a function of (first, stop) that returns
    the frames `[first, stop)`. The function is called once per chunk, in order; the video ends where it returns fewer
    frames, or none. A chunk starts as the source with noise at level `strength` in (0, 1], before the shift, and takes
    the steps from there on (see `from_strength`). At 1 it starts as noise, and only the length depends on the source.
    The restyled chunk is cached. Raises UsageError together with `start`, and for latents that do not fit.

    `conditions` are the model's conditions other than text, by name (see `Conditions`): tensors for the whole video, or
    for kind `frames` functions of (first, stop). They also apply to the negative prompt. An image-to-video model
    requires those of its image. Raises UsageError if one is missing, before anything is computed.

    `prompt_at` is called before every chunk with its first frame and returns a new text `[B or 1, L, D]`, or None to
    keep the current one. No text is cached, so earlier chunks do not change. `on_step` is called with the chunk's first
    frame, the step, its time and the chunk after the step; what it returns, if not None, replaces the chunk. `device`
    is where the model computes, for hooks that move its weights there and back.
    """
    models = list(model) if isinstance(model, Sequence) else [model]
    batch, channels = encoder_hidden_states.shape[0], models[0].noise_channels
    causal = models[0].causal
    clean = None
    if source is not None:
        check_alone(start)
        clean = CleanVideo(source, batch, (channels, height, width))
        num_frames = shortest(num_frames, source)
    end = video_end(causal, models[0].rotary_table().max_len, num_frames, 0 if start is None else start.shape[2])
    supplied = Conditions(models, conditions, batch, end, (height, width))
    passes = _OwnPasses(models, encoder_hidden_states, negative_hidden_states, guidance_scale, (height, width), device)
    device = passes.devices[0]
    if start is not None:
        check_start(start, causal, end, (channels, height, width), whole_chunks=not hold_start)
        start = start.to(device, torch.float32).expand(batch, -1, -1, -1, -1)
    generators = _generators(seed, batch)
    steps = (num_inference_steps, shift, denoising_steps, first_chunk_steps, sampler, context_noise)
    schedule = Schedule.of(*steps, 1.0 if source is None else strength)
    recent = RecentChunks() if recache and prompt_at is not None else None
    check_rewinds(recache, passes.caches)
    for first, stop, given in with_source(causal.chunk_ranges(end), clean, device):
        text = None if prompt_at is None else prompt_at(first)
        if text is not None:
            passes.set_text(text)
            if recent is not None:
                passes.rewrite(recent, context_noise)
        of_chunk = supplied.at(first, stop)
        passes.set_conditions(of_chunk)
        shape = (batch, channels, stop - first, height, width)
        noises = [_noise(shape, generators).to(device) for _ in range(schedule.draws(first))]
        noises[0] = schedule.begin(noises[0], first, given)
        held = None if start is None or start.shape[2] <= first else start[:, :, first:stop]
        done = None if on_step is None else functools.partial(_call_on_step, on_step, first)
        with torch.no_grad():
            x = passes.chunk(noises, schedule, first, held, done)
        # Handed over before the pass that only the next chunk needs; a copy, because its receiver may change it.
        yield x.clone()
        if stop == end:
            break
        with torch.no_grad():
            written = passes.keep(x, noises, schedule)
        if recent is not None:
            recent.add(first, written, causal.first_kept(stop), of_chunk)
    if end != num_frames and stop == end:
        logger.warning("%s", end_notice(causal, "the video", end))


def _call_on_step(on_step: OnStep, first: int, index: int, t: Tensor, x: Tensor) -> Tensor | None:
    return on_step(first, index, float(t), x)


def _generators(seed: Seeds, batch: int) -> list[torch.Generator]:
    """One generator for the whole batch, or one per item. Raises ValueError for any other number."""
    seeds: list[Any] = list(seed) if isinstance(seed, Sequence) else [seed]
    if isinstance(seed, Sequence) and len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds do not fit a batch of {batch}; give one, or one per item")
    return [one if isinstance(one, torch.Generator) else torch.Generator().manual_seed(one) for one in seeds]


def _noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    if len(generators) == 1:
        return torch.randn(shape, generator=generators[0], device=generators[0].device)
    return torch.cat([torch.randn((1, *shape[1:]), generator=one, device=one.device) for one in generators])


class _OwnPasses(Passes):
    """The passes of a rollout with its own caches.

    With guidance, the second half of the batch is for the negative prompt.
    """

    def __init__(
        self,
        models: Sequence[StreamingModel],
        text: Tensor,
        negative: Tensor | None,
        guidance_scale: float,
        size: tuple[int, int],
        device: torch.device | None,
    ) -> None:
        super().__init__(models)
        self.devices = [device or model.device for model in models]
        self.guidance_scale, self.copies = guidance_scale, 1 if guidance_scale == 1 else 2
        self.batch, self.negative = len(text), negative
        places = list(zip(self.models, self.devices, strict=True))
        self.caches = [model.init_cache(self.copies * self.batch, *size, device=place) for model, place in places]
        self.denoisers = [denoiser(model, cache) for model, cache in zip(self.models, self.caches, strict=True)]
        self.texts: list[Tensor] = []
        self.conditions: list[dict[str, Tensor]] = []
        self.set_text(text)

    def set_text(self, text: Tensor) -> None:
        """Set the prompts `[B or 1, L, D]` of later passes."""
        self.texts = [
            self._with_negative(text.to(place, model.dtype).expand(self.batch, -1, -1))
            for model, place in zip(self.models, self.devices, strict=True)
        ]

    def _with_negative(self, text: Tensor) -> Tensor:
        if self.copies == 1:
            return text
        negative = torch.zeros_like(text) if self.negative is None else self.negative.to(text)
        return torch.cat([text, negative.expand_as(text)])

    def set_conditions(self, conditions: Mapping[str, Tensor]) -> None:
        """Set the conditions of later passes, `[B, ...]` each, also for the negative prompt."""
        self.conditions = [self._placed(expert, conditions) for expert in range(len(self.models))]

    def _placed(self, expert: int, conditions: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return placed([conditions] * self.copies, self.devices[expert], self.models[expert].dtype)

    @torch.no_grad()
    def rewrite(self, recent: RecentChunks, t: float) -> None:
        """Write the chunks in the ring again, at noise level t, with the current text."""
        for expert in self.writers():
            for index, (first, written, conditions) in enumerate(recent):
                if index == 0:
                    self.caches[expert].rewind(first)
                self.conditions[expert] = self._placed(expert, conditions)
                self.write_to(expert, written, t)

    def _guided(self, v: Tensor, batch: int) -> Tensor:
        return v if self.copies == 1 else guided(v[:batch], v[batch:], self.guidance_scale)

    def _run(self, expert: int, x: Tensor, levels: tuple[float, float], held: int, write: bool) -> Tensor:
        model = self.models[expert]
        x = x.to(self.devices[expert], model.dtype).repeat(self.copies, 1, 1, 1, 1)
        # Call the model, not `forward_chunk`: hooks that move weights to the device run only on calls.
        call = functools.partial(model, cache=self.caches[expert], write=True) if write else self.denoisers[expert]
        return run_pass(model, call, x, levels, held, self.texts[expert], self.conditions[expert])
