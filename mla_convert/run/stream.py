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
) -> Iterator[Tensor]:
    """Yield latent chunks `[B, C, F, H, W]`, float32, of a rollout of `num_frames` frames.

    Every chunk is denoised by `num_inference_steps` Euler steps and then written to the cache by
    one more pass at noise level `context_noise` (Self-Forcing, arXiv 2506.08009, algorithm 1).
    """
    device, dtype = model.device, model.dtype
    batch = encoder_hidden_states.shape[0]
    text = encoder_hidden_states.to(device, dtype)
    cache = model.init_cache(batch, height, width)
    generator = torch.Generator().manual_seed(seed)
    times = sampling_times(num_inference_steps, shift)
    for start, stop in cache.causal.chunks(num_frames):
        shape = (batch, model.config.in_channels, stop - start, height, width)
        x = torch.randn(shape, generator=generator).to(device)
        with torch.no_grad():
            for t, t_next in itertools.pairwise(times):
                timestep = torch.full((batch,), float(t) * NUM_TRAIN_TIMESTEPS, device=device)
                v = model.forward_chunk(x.to(dtype), timestep, text, cache)
                x = x + (t_next - t).to(device) * v.float()
            t_context = torch.full((batch,), context_noise, device=device)
            context = x
            if context_noise > 0:
                noise = torch.randn(shape, generator=generator).to(device)
                context = add_noise(x, noise, t_context)
            model.forward_chunk(context.to(dtype), t_context * NUM_TRAIN_TIMESTEPS, text, cache, write=True)
        yield x
