"""Flow matching as Wan defines it: `x_t = (1 - t) x_0 + t eps`, velocity `eps - x_0`, t in [0, 1].

Models take `1000 t` as `timestep`. Source: arXiv 2210.02747 (flow matching), 2403.03206 (shift).
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Warp times in [0, 1] towards the noisy end: `s t / (1 + (s - 1) t)`."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(num_steps: int, shift: float) -> Tensor:
    """`num_steps + 1` decreasing times from 1 to 0, float32."""
    return shift_time(torch.linspace(1, 0, num_steps + 1), shift)


def per_frame(t: Tensor, ndim: int) -> Tensor:
    """Times `[B]` or `[B, F]` shaped to broadcast over a video `[B, C, F, ...]` of `ndim` axes."""
    if t.ndim == 1:
        return t.view(-1, *[1] * (ndim - 1))
    return t.view(t.shape[0], 1, t.shape[1], *[1] * (ndim - 3))


def add_noise(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """`x_t` for clean video `[B, C, F, H, W]` and times `[B]` or `[B, F]`."""
    t = per_frame(t, x0.ndim)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The regression target `eps - x_0`."""
    return noise - x0


def to_clean(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean video that velocity `v` at `x_t` points to: `x_t - t v`."""
    return x_t - per_frame(t, x_t.ndim) * v


def drop_prompts(text: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """`text` `[B, L, D]` with a random share of the prompts emptied: zeros, the default negative of guidance."""
    if rate == 0:
        return text
    kept = torch.rand(len(text), generator=generator) >= rate
    return text * kept.view(-1, 1, 1).to(text)


def chunk_times(batch_size: int, chunks: list[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """One uniform noise level a chunk, repeated over its frames: `[B, F]` in [0, 1).

    `chunks` are the half-open frame ranges of `CausalConfig.chunks`.
    """
    t = torch.rand(batch_size, len(chunks), generator=generator)
    return t.repeat_interleave(torch.tensor([stop - start for start, stop in chunks]), dim=1)
