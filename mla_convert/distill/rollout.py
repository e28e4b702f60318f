"""Rolls out the student in training, which then learns from its own video (Self Forcing, arXiv 2506.08009).

It is the rollout of `run/stream.py`, chunk by chunk with the cache of inference. One denoising step per chunk
carries a gradient; the cache carries none.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..denoise import denoise
from ..flow import NUM_TRAIN_TIMESTEPS, Sampler, add_noise, to_clean
from ..mla.cache import FrameCache
from ..mla.conditions import Conditions, Given, placed


def self_rollout(
    model: Any,
    text: Tensor,
    size: tuple[int, int, int],
    times: Tensor,
    exit_step: int,
    generator: torch.Generator,
    *,
    context_noise: float = 0.0,
    sampler: Sampler = "euler",
    gradient_from: int = 0,
    conditions: Given | None = None,
) -> Tensor:
    """A video `[B, C, F, H, W]`, float32, that `model` makes for `text` `[B, L, D]`; `size` is (F, H, W).

    Every chunk takes the steps of `sampler` along the falling `times` (the last is 0), up to step number `exit_step`,
    counted from 0. The clean chunk is predicted from the velocity of that step. Only that step
    carries a gradient, and only in chunks from frame `gradient_from` onward and if gradients are enabled.
    Another pass, at noise level `context_noise` and without a graph, then writes the chunk to the cache for the next.
    F may exceed the window, which wraps as in inference. With gradient checkpointing, the cache that a
    chunk has read is kept until the backward pass. `conditions` are as in `stream_chunks`, for at least F frames.

    Noise is drawn from `generator` on the CPU, in the order of `stream_chunks`, so with the last exit
    step the two rollouts are equal.
    """
    frames, height, width = size
    batch, channels, device = len(text), model.noise_channels, text.device
    text = text.to(model.dtype)
    cache = model.init_cache(batch, height, width, device=device)
    all_conditions = Conditions([model], conditions, batch, frames, (height, width))
    clean_chunks = []
    for start, stop in model.causal.chunks(frames):
        shape = (batch, channels, stop - start, height, width)
        noises = _noises(shape, generator, device)
        now = placed([all_conditions.at(start, stop)], device, model.dtype)
        with torch.no_grad():
            velocity = functools.partial(_velocity, model, text=text, cache=cache, conditions=now)
            x = denoise(next(noises), times[: exit_step + 1], velocity, noises if sampler == "renoise" else None)
        carries = torch.is_grad_enabled() and start >= gradient_from
        if carries:
            # Some torch versions would let autocast reuse weights that it has cast without a gradient.
            torch.clear_autocast_cache()
        with torch.set_grad_enabled(carries):
            # A recomputation in the backward pass must read the same cache as the forward.
            read = _kept(cache) if carries and model.is_gradient_checkpointing else cache
            t = times[exit_step]
            clean = to_clean(x, _velocity(model, x, t, t, text, read, now), t.to(device).expand(batch))
        with torch.no_grad():
            t_context = torch.full((batch,), context_noise, device=device)
            context = clean
            if context_noise > 0:
                context = add_noise(clean, next(noises), t_context)
            if stop < frames:
                _pass(model, context, t_context, text, cache, now, write=True)
        clean_chunks.append(clean)
    return torch.cat(clean_chunks, dim=2)


def _noises(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    """Yield noise endlessly, each tensor drawn when it is requested."""
    while True:
        yield torch.randn(shape, generator=generator).to(device)


def _velocity(
    model: Any, x: Tensor, t: Tensor, r: Tensor, text: Tensor, cache: FrameCache, conditions: Mapping[str, Tensor]
) -> Tensor:
    # `denoise` passes `r` for flow maps, which no stage rolls out.
    return _pass(model, x, t.to(x.device).expand(len(x)), text, cache, conditions, write=False)


def _pass(
    model: Any, x: Tensor, t: Tensor, text: Tensor, cache: FrameCache, conditions: Mapping[str, Tensor], write: bool
) -> Tensor:
    """The velocity, float32, at noise levels `t` `[B]` with the `conditions` of the chunk."""
    x, timestep = x.to(model.dtype), t * NUM_TRAIN_TIMESTEPS
    out: Tensor = model.forward_chunk(x, timestep, text, cache, write=write, **conditions)
    return out.float()


def _kept(cache: FrameCache) -> FrameCache:
    """A cache that keeps the present memory and content; `cache` itself continues in a copy of the memory."""
    kept = copy.copy(cache)
    cache.rows = [rows.clone() for rows in cache.rows]
    return kept
