"""Chunk-wise rollout of a causal video model, dense or latent, with constant memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..flow import NUM_TRAIN_TIMESTEPS, add_noise, expert_at, sampling_times
from ..mla.window import CausalConfig


def stream_chunks(
    model: Any | Sequence[Any],
    encoder_hidden_states: Tensor,
    num_frames: int,
    height: int,
    width: int,
    num_inference_steps: int = 8,
    shift: float = 1.0,
    context_noise: float = 0.0,
    seed: int = 0,
    guidance_scale: float = 1.0,
    negative_hidden_states: Tensor | None = None,
    start: Tensor | None = None,
) -> Iterator[Tensor]:
    """Yield latent chunks `[B, C, F, H, W]`, float32, of a rollout of `num_frames` frames.

    Every chunk is denoised by `num_inference_steps` Euler steps and then written to the cache by
    one more pass at noise level `context_noise` (Self-Forcing, arXiv 2506.08009, algorithm 1). A flow
    map is asked for the mean velocity of each step, and for r = t by the pass that writes.

    `model` may be several experts, which share the work by their `noise_range` (Wan2.2): each step
    is taken by the expert of its noise level, and a finished chunk is written to the cache of each.

    With `guidance_scale` other than 1 every item is denoised a second time with
    `negative_hidden_states` `[1, L, D]`, zeros by default, and its own half of the cache
    (classifier-free guidance, arXiv 2207.12598).

    `start` `[B or 1, C, F0, H, W]` is a clean beginning: its chunks are written to the cache and
    yielded instead of being denoised. Their noise is drawn all the same, so that a rollout which
    starts with the first chunks of another goes on like it. Raises UsageError where `start` does not
    end with a chunk.
    """
    models = list(model) if isinstance(model, Sequence) else [model]
    batch, channels = encoder_hidden_states.shape[0], models[0].config.in_channels
    experts = [
        _Expert(one, encoder_hidden_states, negative_hidden_states, guidance_scale, height, width) for one in models
    ]
    device, causal = models[0].device, models[0].causal
    if start is not None:
        check_start(start, causal, num_frames, (channels, height, width))
        start = start.to(device, torch.float32).expand(batch, -1, -1, -1, -1)
    generator = torch.Generator().manual_seed(seed)
    times = sampling_times(num_inference_steps, shift)
    for first, stop in causal.chunks(num_frames):
        shape = (batch, channels, stop - first, height, width)
        x = torch.randn(shape, generator=generator).to(device)
        with torch.no_grad():
            if start is not None and stop <= start.shape[2]:
                x = start[:, :, first:stop]
            else:
                for t, t_next in itertools.pairwise(times):
                    v = _expert_for(experts, float(t)).velocity(x, float(t), float(t_next))
                    x = x + (t_next - t).to(device) * v
            t_context = torch.full((batch,), float(context_noise), device=device)
            context = x
            if context_noise > 0:
                noise = torch.randn(shape, generator=generator).to(device)
                context = add_noise(x, noise, t_context)
            for expert in experts:
                expert.write(context, t_context)
        yield x


def check_start(start: Tensor, causal: CausalConfig, num_frames: int, shape: tuple[int, int, int]) -> None:
    """Raise UsageError unless a rollout of `shape` (C, H, W) can begin with `start` `[B, C, F0, H, W]`."""
    channels, frames, height, width = start.shape[1:]
    if (channels, height, width) != shape:
        given, wanted = (f"{c} channels of {h}x{w}" for c, h, w in ((channels, height, width), shape))
        raise UsageError(f"the start has {given}, the rollout {wanted}; give the latent size of the start")
    ends = [stop for _, stop in causal.chunks(num_frames)]
    if frames > num_frames:
        raise UsageError(f"the start has {frames} frames, more than the {num_frames} of the rollout; raise num_frames")
    if frames not in ends:
        shown = ", ".join(map(str, ends[:4])) + (", ..." if len(ends) > 4 else "")
        raise UsageError(f"a start of {frames} frames does not end with a chunk; lengths that fit are {shown}")


class _Expert:
    """A model with its cache; with guidance the batch has a second half for the negative prompt."""

    def __init__(
        self, model: Any, text: Tensor, negative: Tensor | None, guidance_scale: float, height: int, width: int
    ) -> None:
        self.model, self.guidance_scale = model, guidance_scale
        self.copies = 1 if guidance_scale == 1 else 2
        self.text = text.to(model.device, model.dtype)
        if self.copies == 2:
            negative = torch.zeros_like(self.text) if negative is None else negative.to(self.text)
            self.text = torch.cat([self.text, negative.expand_as(self.text)])
        self.cache = model.init_cache(len(self.text), height, width)

    def velocity(self, x: Tensor, t: float, r: float) -> Tensor:
        """Velocity `[B, C, F, H, W]`, float32, at noise level t; of a flow map the mean one down to r."""
        t_all, r_all = (torch.full((len(x),), time * NUM_TRAIN_TIMESTEPS, device=x.device) for time in (t, r))
        v = self._run(x, t_all, r_all, write=False).float().to(x.device)
        if self.copies == 1:
            return v
        v, unguided = v.chunk(2)
        return unguided + self.guidance_scale * (v - unguided)

    def write(self, x: Tensor, t: Tensor) -> None:
        """Keep a finished chunk at noise levels `t` `[B]`; the rollout moves on."""
        timestep = t * NUM_TRAIN_TIMESTEPS
        self._run(x, timestep, timestep, write=True)

    def _run(self, x: Tensor, timestep: Tensor, r_timestep: Tensor, write: bool) -> Tensor:
        model = self.model
        x = x.to(model.device, model.dtype).repeat(self.copies, 1, 1, 1, 1)
        timestep, r_timestep = (time.to(model.device).repeat(self.copies) for time in (timestep, r_timestep))
        conditions = {"r_timestep": r_timestep} if model.flow_map else {}
        out: Tensor = model.forward_chunk(x, timestep, self.text, self.cache, write=write, **conditions)
        return out


def _expert_for(experts: list[_Expert], t: float) -> _Expert:
    """The expert of noise level `t`."""
    return experts[expert_at([expert.model.noise_range for expert in experts], t)]
