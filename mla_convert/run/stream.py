"""Chunk-wise rollout of a causal video model, dense or latent, with constant memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..flow import NUM_TRAIN_TIMESTEPS, add_noise, sampling_times


def stream_chunks(
    model: Any,
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
) -> Iterator[Tensor]:
    """Yield latent chunks `[B, C, F, H, W]`, float32, of a rollout of `num_frames` frames.

    Every chunk is denoised by `num_inference_steps` Euler steps and then written to the cache by
    one more pass at noise level `context_noise` (Self-Forcing, arXiv 2506.08009, algorithm 1).

    With `guidance_scale` other than 1 every item is denoised a second time with
    `negative_hidden_states` `[1, L, D]`, zeros by default, and its own half of the cache
    (classifier-free guidance, arXiv 2207.12598).
    """
    device, dtype = model.device, model.dtype
    batch = encoder_hidden_states.shape[0]
    text = encoder_hidden_states.to(device, dtype)
    guided = guidance_scale != 1
    if guided:
        negative = torch.zeros_like(text) if negative_hidden_states is None else negative_hidden_states.to(text)
        text = torch.cat([text, negative.expand_as(text)])
    copies = 2 if guided else 1
    cache = model.init_cache(copies * batch, height, width)
    generator = torch.Generator().manual_seed(seed)
    times = sampling_times(num_inference_steps, shift)
    for start, stop in cache.causal.chunks(num_frames):
        shape = (batch, model.config.in_channels, stop - start, height, width)
        x = torch.randn(shape, generator=generator).to(device)
        with torch.no_grad():
            for t, t_next in itertools.pairwise(times):
                timestep = torch.full((copies * batch,), float(t) * NUM_TRAIN_TIMESTEPS, device=device)
                v = model.forward_chunk(x.to(dtype).repeat(copies, 1, 1, 1, 1), timestep, text, cache).float()
                if guided:
                    v, unguided = v.chunk(2)
                    v = unguided + guidance_scale * (v - unguided)
                x = x + (t_next - t).to(device) * v
            t_context = torch.full((batch,), float(context_noise), device=device)
            context = x
            if context_noise > 0:
                noise = torch.randn(shape, generator=generator).to(device)
                context = add_noise(x, noise, t_context)
            context, t_context = context.to(dtype).repeat(copies, 1, 1, 1, 1), t_context.repeat(copies)
            model.forward_chunk(context, t_context * NUM_TRAIN_TIMESTEPS, text, cache, write=True)
        yield x
