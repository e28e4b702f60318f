"""Chunk-wise rollout of a causal video model, dense or latent, with constant memory."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..flow import NUM_TRAIN_TIMESTEPS, Sampler, add_noise, expert_at, guided, next_sample, sampling_times
from ..mla.conditions import Conditions, Given, placed
from ..mla.graph import denoiser
from ..mla.window import CausalConfig

logger = logging.getLogger(__name__)

Seeds = int | torch.Generator | Sequence[int] | Sequence[torch.Generator]
OnStep = Callable[[int, int, float, Tensor], Tensor | None]
PromptAt = Callable[[int], Tensor | None]


def stream_chunks(
    model: Any | Sequence[Any],
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

    Where positions are absolute the rotary table ends it, see `video_end`, and a logger says so.

    Every chunk is denoised in `num_inference_steps` steps and then written to the cache by one more pass
    at noise level `context_noise` (Self-Forcing, arXiv 2506.08009, algorithm 1). `denoising_steps`, falling
    noise levels out of 1000, stand in for evenly spaced ones, in the first chunk `first_chunk_steps`; the
    `shift` warps them. `sampler` takes Euler steps, or with `renoise` adds new noise to the predicted clean
    chunk, as few-step students of Self-Forcing, Causal-Forcing and LongLive are sampled. A flow map is asked
    for the mean velocity of each step, which for new noise leads down to 0, and for r = t by the pass that writes.

    `model` may be several experts, which share the work by their `noise_range` (Wan2.2): each step
    is taken by the expert of its noise level, and a finished chunk is written to the cache of each.

    With `guidance_scale` other than 1 every item is denoised a second time with
    `negative_hidden_states` `[1, L, D]`, zeros by default, and its own half of the cache
    (classifier-free guidance, arXiv 2207.12598).

    `seed` draws the noise of the whole batch; a seed, or generator, for each item makes item i the rollout
    that it is alone.

    `start` `[B or 1, C, F0, H, W]` is a clean beginning: its chunks are written to the cache and
    yielded instead of being denoised. Their noise is drawn all the same, so that a rollout which
    starts with the first chunks of another goes on like it. Raises UsageError where `start` does not
    end with a chunk, unless with `hold_start`: its frames in that chunk are then held clean, at noise level 0, while
    the others are denoised beside them, as models are trained whose image is a part of the first chunk.

    `conditions` are what the model is conditioned on beside text, by name, see `Conditions`: tensors for the whole
    video, or for those by frames functions of (first, stop). Passes with the negative prompt are told them too. An
    image-to-video model needs those of its image. Raises UsageError without, before anything is computed.

    `prompt_at` is asked before every chunk, with the number of its first frame, for another text
    `[B or 1, L, D]`; None keeps the one before. No text is cached, so what was made before is untouched.
    `on_step` is told the chunk's first frame, the step, its time and the chunk after it, which what it
    returns replaces. `device` is where the model computes, where hooks move its weights there and back.
    """
    models = list(model) if isinstance(model, Sequence) else [model]
    batch, channels = encoder_hidden_states.shape[0], models[0].noise_channels
    causal = models[0].causal
    end = video_end(causal, models[0].rotary_table().max_len, num_frames, 0 if start is None else start.shape[2])
    told = Conditions(models, conditions, batch, end, (height, width))
    experts = [
        _Expert(one, encoder_hidden_states, negative_hidden_states, guidance_scale, height, width, device)
        for one in models
    ]
    device = experts[0].device
    if start is not None:
        check_start(start, causal, end, (channels, height, width), whole_chunks=not hold_start)
        start = start.to(device, torch.float32).expand(batch, -1, -1, -1, -1)
    generators = _generators(seed, batch)
    times = sampling_times(num_inference_steps, shift, denoising_steps)
    opening = times if first_chunk_steps is None else sampling_times(num_inference_steps, shift, first_chunk_steps)
    t_context = torch.full((batch,), float(context_noise), device=device)
    recent = RecentChunks() if recache and prompt_at is not None else None
    check_rewinds(recache, [expert.cache for expert in experts])
    used = experts[0]
    for first, stop in chunk_ranges(causal, end):
        shape = (batch, channels, stop - first, height, width)
        text = None if prompt_at is None else prompt_at(first)
        if text is not None:
            for expert in experts:
                expert.set_text(text)
                if recent is not None:
                    expert.rewrite(recent, t_context)
        now = told.at(first, stop)
        for expert in experts:
            expert.set_conditions(now)
        held = None if start is None or start.shape[2] <= first else start[:, :, first:stop]
        given = held is not None and held.shape[2] == stop - first
        x = _with_held(_noise(shape, generators).to(device), held)
        with torch.no_grad():
            for index, (t, t_next) in enumerate(itertools.pairwise(times if first > 0 else opening)):
                noise = _noise(shape, generators).to(device) if sampler == "renoise" and t_next > 0 else None
                if given:
                    continue
                target = t_next if sampler == "euler" else times[-1]
                used = _expert_for(experts, float(t))
                v = used.velocity(x, float(t), float(target), 0 if held is None else held.shape[2])
                x = _with_held(next_sample(x, v, t, t_next, noise), held)
                changed = None if on_step is None else on_step(first, index, float(t), x)
                x = x if changed is None else _with_held(changed, held)
            context = x
            if context_noise > 0:
                context = add_noise(x, _noise(shape, generators).to(device), t_context)
            # Weights may travel: the expert that is on the device writes first.
            writers = sorted(experts, key=lambda expert: expert is not used)
            for expert in writers:
                expert.write(context, t_context)
            used = writers[-1]
            if recent is not None:
                recent.add(first, context, causal.first_kept(stop), now)
        yield x
    if end != num_frames:
        logger.warning("%s", end_notice(causal, "the video", end))


class RecentChunks:
    """The chunks that a ring still holds whole, as written: first frame, chunk `[B, C, F, H, W]`, conditions."""

    def __init__(self) -> None:
        self._chunks: deque[tuple[int, Tensor, Mapping[str, Tensor]]] = deque()

    def __iter__(self) -> Iterator[tuple[int, Tensor, Mapping[str, Tensor]]]:
        return iter(self._chunks)

    def add(self, first: int, written: Tensor, first_kept: int, conditions: Mapping[str, Tensor]) -> None:
        """Take a chunk that begins at frame `first`; let go of those that begin before `first_kept`."""
        self._chunks.append((first, written, conditions))
        while self._chunks and self._chunks[0][0] < first_kept:
            self._chunks.popleft()


def check_rewinds(recache: bool, caches: Sequence[Any]) -> None:
    """Raise UsageError where `recache` is asked of a cache that cannot be rewound."""
    other = next((type(cache).__name__ for cache in caches if not cache.can_rewind), None)
    if recache and other is not None:
        raise UsageError(
            f"a {other} cannot be written again for a new prompt, and encodes its near history anew after every chunk "
            "anyway; leave recache out"
        )


def chunk_ranges(causal: CausalConfig, num_frames: int | None) -> Iterator[tuple[int, int]]:
    """Half-open frame ranges of the chunks of a rollout; None goes on for ever."""
    if num_frames is not None:
        yield from causal.chunks(num_frames)
        return
    stop = 0
    while True:
        first, stop = stop, causal.chunk_end(stop)
        yield first, stop


def video_end(causal: CausalConfig, positions: int, num_frames: int | None, given: int = 0) -> int | None:
    """The frames that a rollout has in the end, by a rotary table of `positions`; None where it goes on for ever.

    With absolute positions one without `num_frames` ends at the last whole chunk that the table has positions for.
    Raises UsageError where `num_frames`, or the `given` ones that it begins with, are more than those.
    """
    longest = causal.longest(positions)
    if longest is None:
        return num_frames
    whole = causal.chunk_end(0)
    asked = max(whole if num_frames is None else num_frames, given)
    if asked > longest:
        raise UsageError(
            f"{asked} latent frames are more than the rotary table's {longest} positions: make a shorter video, or "
            f"{_remedy(causal)}"
        )
    return longest - (longest - whole) % causal.num_frames_per_block if num_frames is None else num_frames


def end_notice(causal: CausalConfig, what: str, frames: int | None) -> str:
    """That `what`, which was to go on for ever, ends after so many frames, and what would not."""
    return f"{what} ends after {frames} latent frames, where the rotary table does: {_remedy(causal)}"


def _remedy(causal: CausalConfig) -> str:
    if causal.sink_positions == "absolute":
        return "set causal.sink_positions: window, which never leaves it"
    return f"set causal.window_frames, which is {causal.window_frames}, to no more than its positions"


def _generators(seed: Seeds, batch: int) -> list[torch.Generator]:
    """One generator for the whole batch, or one an item. Raises ValueError for another number of them."""
    seeds: list[Any] = list(seed) if isinstance(seed, Sequence) else [seed]
    if isinstance(seed, Sequence) and len(seeds) != batch:
        raise ValueError(f"{len(seeds)} seeds do not fit a batch of {batch}")
    return [one if isinstance(one, torch.Generator) else torch.Generator().manual_seed(one) for one in seeds]


def _noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    if len(generators) == 1:
        return torch.randn(shape, generator=generators[0], device=generators[0].device)
    return torch.cat([torch.randn((1, *shape[1:]), generator=one, device=one.device) for one in generators])


def _with_held(x: Tensor, held: Tensor | None) -> Tensor:
    """A chunk `[B, C, F, H, W]` whose first frames are those that are `held` `[B, C, F0, H, W]`."""
    return x if held is None else torch.cat([held, x[:, :, held.shape[2] :]], dim=2)


def check_start(
    start: Tensor,
    causal: CausalConfig,
    num_frames: int | None,
    shape: tuple[int, int, int],
    whole_chunks: bool = True,
) -> None:
    """Raise UsageError unless a rollout of `shape` (C, H, W) can begin with `start` `[B, C, F0, H, W]`."""
    channels, frames, height, width = start.shape[1:]
    if (channels, height, width) != shape:
        given, wanted = (f"{c} channels of {h}x{w}" for c, h, w in ((channels, height, width), shape))
        raise UsageError(f"the start has {given}, the rollout {wanted}; give the latent size of the start")
    ends = [stop for _, stop in causal.chunks(num_frames or frames + 4 * causal.num_frames_per_block)]
    if num_frames is not None and frames > num_frames:
        raise UsageError(f"the start has {frames} frames, more than the {num_frames} of the rollout; raise num_frames")
    if whole_chunks and frames not in ends:
        shown = ", ".join(map(str, ends[:4])) + (", ..." if len(ends) > 4 else "")
        raise UsageError(f"a start of {frames} frames does not end with a chunk; lengths that fit are {shown}")


class _Expert:
    """A model with its cache; with guidance the batch has a second half for the negative prompt."""

    def __init__(
        self,
        model: Any,
        text: Tensor,
        negative: Tensor | None,
        guidance_scale: float,
        height: int,
        width: int,
        device: torch.device | None,
    ) -> None:
        self.model, self.guidance_scale = model, guidance_scale
        self.device = device or model.device
        self.copies = 1 if guidance_scale == 1 else 2
        self.batch, self.negative = len(text), negative
        self.set_text(text)
        self.conditions: dict[str, Tensor] = {}
        self.cache = model.init_cache(len(self.text), height, width, device=self.device)
        self.denoise = denoiser(model, self.cache)

    def set_text(self, text: Tensor) -> None:
        """The prompts `[B or 1, L, D]` of the passes to come."""
        self.text = text.to(self.device, self.model.dtype).expand(self.batch, -1, -1)
        if self.copies == 2:
            negative = torch.zeros_like(self.text) if self.negative is None else self.negative.to(self.text)
            self.text = torch.cat([self.text, negative.expand_as(self.text)])

    def set_conditions(self, conditions: Mapping[str, Tensor]) -> None:
        """What the passes to come are conditioned on, `[B, ...]` each; those with the negative prompt, too."""
        self.conditions = placed([conditions] * self.copies, self.device, self.model.dtype)

    def velocity(self, x: Tensor, t: float, r: float, held: int = 0) -> Tensor:
        """Velocity `[B, C, F, H, W]`, float32, at noise level t; of a flow map the mean one down to r.

        The first `held` frames are clean, and told to be.
        """
        size = (len(x), x.shape[2]) if held else (len(x),)
        t_all, r_all = (torch.full(size, time * NUM_TRAIN_TIMESTEPS, device=x.device) for time in (t, r))
        if held:
            t_all[:, :held] = r_all[:, :held] = 0
        v = self._run(x, t_all, r_all, write=False).float().to(x.device)
        if self.copies == 1:
            return v
        v, unguided = v.chunk(2)
        return guided(v, unguided, self.guidance_scale)

    def write(self, x: Tensor, t: Tensor) -> None:
        """Keep a finished chunk at noise levels `t` `[B]`; the rollout moves on."""
        timestep = t * NUM_TRAIN_TIMESTEPS
        self._run(x, timestep, timestep, write=True)

    @torch.no_grad()
    def rewrite(self, recent: RecentChunks, t: Tensor) -> None:
        """Write the chunks that the ring holds again, for the text of now."""
        for index, (first, written, conditions) in enumerate(recent):
            if index == 0:
                self.cache.rewind(first)
            self.set_conditions(conditions)
            self.write(written, t)

    def _run(self, x: Tensor, timestep: Tensor, r_timestep: Tensor, write: bool) -> Tensor:
        """A pass of the model, the one place where a rollout calls it."""
        model = self.model
        x = x.to(self.device, model.dtype).repeat(self.copies, 1, 1, 1, 1)
        timestep, r_timestep = (torch.cat([time.to(self.device)] * self.copies) for time in (timestep, r_timestep))
        conditions = {**self.conditions, **({"r_timestep": r_timestep} if model.flow_map else {})}
        if write:
            # By the call, not by `forward_chunk`: hooks that bring weights to the device see calls alone.
            out: Tensor = model(x, timestep, self.text, cache=self.cache, write=True, **conditions)
        else:
            out = self.denoise(x, timestep, self.text, **conditions)
        if model.kernels is not None:
            model.kernels.announce()
        return out


def _expert_for(experts: list[_Expert], t: float) -> _Expert:
    """The expert of noise level `t`."""
    return experts[expert_at([expert.model.noise_range for expert in experts], t)]
