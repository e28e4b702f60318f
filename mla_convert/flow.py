"""Implement flow matching as Wan defines it: `x_t = (1 - t) x_0 + t eps`, velocity `eps - x_0`, t in [0, 1].

Models take `1000 t` as `timestep`. A flow map predicts the mean velocity from t to a second time `r <= t`; at r = t
that is the velocity itself. Source: arXiv 2210.02747 (flow matching), 2403.03206 (shift), 2505.13447 (mean velocity).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError

NUM_TRAIN_TIMESTEPS = 1000
ALL_NOISE = (0.0, 1.0)
STRENGTH = 0.5
"""Default noise level for restyling a source, a compromise between the source and the prompt; not measured."""

Sampler = Literal["euler", "renoise"]


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Warp times in [0, 1] toward the noisy end: `s t / (1 + (s - 1) t)`."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(num_steps: int, shift: float, steps: Sequence[float] | None = None, strength: float = 1.0) -> Tensor:
    """`num_steps + 1` decreasing times from 1 to 0, float32; if `steps` are given, their `denoising_times`.

    With a `strength` below 1, the times are cut by `from_strength`.
    """
    if steps is not None:
        return denoising_times(steps, shift, strength)
    return shift_time(from_strength(torch.linspace(1, 0, num_steps + 1), strength), shift)


def from_strength(times: Tensor, strength: float) -> Tensor:
    """Cut unshifted `times` `[N + 1]`, which fall to 0, so that they start at the level `strength` in (0, 1].

    `strength` itself comes first, followed by the times below it, so at least one step remains; at 1, `times` are
    unchanged. If one of `times` equals `strength`, the result matches the steps that diffusers' `strength` keeps.
    """
    if strength == 1:
        return times
    # Levels are multiples of 1/1000; a closer one is the same level, up to rounding.
    below = times[:-1][times[:-1] < strength - 0.1 / NUM_TRAIN_TIMESTEPS]
    return torch.cat([torch.tensor([strength]), below, times[-1:]])


def expert_at(noise_ranges: Sequence[tuple[float, float]], t: float) -> int:
    """The index of the expert for noise level `t`: the one with the highest start at or below `t`.

    This is the rule of diffusers' `WanPipeline`.
    """
    below = [index for index, (low, _) in enumerate(noise_ranges) if low <= t]
    return max(below, key=lambda index: noise_ranges[index][0]) if len(noise_ranges) > 1 else 0


def check_steps(steps: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Check `steps` and return them. Raises ValueError unless they are None or fall strictly, within [1, 1000]."""
    if steps is None:
        return None
    falling = all(a > b for a, b in itertools.pairwise(steps))
    if not steps or not falling or steps[0] > NUM_TRAIN_TIMESTEPS or steps[-1] < 1:
        raise ValueError(f"the steps must fall from at most {NUM_TRAIN_TIMESTEPS} to at least 1, got {list(steps)}")
    return steps


def denoising_times(steps: Sequence[float], shift: float, strength: float = 1.0) -> Tensor:
    """The shifted times of denoising `steps` out of 1000, followed by 0: float32 `[len(steps) + 1]`.

    `1000, 750, 500, 250` equal four sampling steps with the same shift. With a `strength` below 1, the times are cut by
    `from_strength`.
    """
    times = torch.tensor([*steps, 0], dtype=torch.float32) / NUM_TRAIN_TIMESTEPS
    return shift_time(from_strength(times, strength), shift)


def noise_levels(steps: Sequence[float] | None, shift: float) -> tuple[float, ...] | None:
    """The noise levels in (0, 1] of denoising `steps` out of 1000 with a `shift`; None (all levels) for None."""
    return None if steps is None else tuple(denoising_times(steps, shift)[:-1].tolist())


def levels_inside(levels: Sequence[float], noise_range: tuple[float, float]) -> list[float]:
    """Those of `levels` that lie in a model's `noise_range`. Raises UsageError if there are none."""
    low, high = noise_range
    inside = [level for level in levels if low <= level <= high]
    if not inside:
        shown = ", ".join(f"{level:.3g}" for level in levels)
        raise UsageError(
            f"none of the denoising_steps, shifted to noise levels {shown}, is in the model's noise range "
            f"[{low:g}, {high:g}]; leave denoising_steps out"
        )
    return inside


def per_frame(t: Tensor, ndim: int) -> Tensor:
    """Reshape times `[B]` or `[B, F]` to broadcast over a video `[B, C, F, ...]` with `ndim` axes."""
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


def velocity_error(v: Tensor, target: Tensor, t: Tensor, r: Tensor | None = None) -> Tensor:
    """The mean squared error of velocities `[B, C, F, H, W]` at times `[B, F]` against the data's `target`.

    For a flow map with second times `r`, only frames with r = t count, because the target is valid only there. The
    error is 0 if there are none.
    """
    if r is None:
        return F.mse_loss(v, target)
    instant = per_frame((r == t).to(v), v.ndim).expand_as(v)
    return ((v - target).square() * instant).sum() / instant.sum().clamp_min(1)


def to_clean(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """The clean video that velocity `v` predicts at `x_t`: `x_t - t v`."""
    return x_t - per_frame(t, x_t.ndim) * v


def next_sample(x_t: Tensor, v: Tensor, t: Tensor, t_next: Tensor, noise: Tensor | None = None) -> Tensor:
    """Step from `x_t` to the lower time `t_next`; both times are scalars, and on the CPU they need no copy to a device.

    This is an Euler step of the ODE. With `noise`, it predicts the clean video and adds new noise: the multistep
    sampling of consistency models (arXiv 2303.01469, algorithm 1), which Self-Forcing and Causal-Forcing use for their
    students.
    """
    if noise is None:
        return x_t + (t_next - t) * v
    return (1 - t_next) * (x_t - t * v) + t_next * noise


def guided(v: Tensor, unguided: Tensor, scale: float | Tensor) -> Tensor:
    """Apply classifier-free guidance (arXiv 2207.12598): `unguided + scale * (v - unguided)`."""
    return unguided + scale * (v - unguided)


def drop_prompts(text: Tensor, rate: float, generator: torch.Generator, negative: Tensor | None = None) -> Tensor:
    """Replace a random share `rate` of the prompts `text` `[B, L, D]` by `negative` `[L, D]`, or by zeros if None."""
    if rate == 0:
        return text
    kept = (torch.rand(len(text), generator=generator) >= rate).view(-1, 1, 1).to(text.device)
    return torch.where(kept, text, torch.zeros_like(text[0]) if negative is None else negative.to(text))


def chunk_times(
    batch_size: int,
    chunks: Sequence[tuple[int, int]],
    generator: torch.Generator,
    shift: float = 1.0,
    noise_range: tuple[float, float] = ALL_NOISE,
    levels: Sequence[float] | None = None,
) -> Tensor:
    """Draw one noise level per chunk, uniform before the `shift`, and repeat it over its frames: `[B, F]` in [0, 1).

    A narrower `noise_range` restricts this distribution to its levels. If `levels` are given (from `noise_levels`,
    already shifted), only those are drawn, with equal probability; raises UsageError if none of them is in the range.
    `chunks` are the half-open frame ranges of `CausalConfig.chunks`.
    """
    if levels is not None:
        inside = levels_inside(levels, noise_range)
        drawn = torch.randint(len(inside), (batch_size, len(chunks)), generator=generator)
        return over_frames(torch.tensor(inside)[drawn], chunks)
    t = torch.rand(batch_size, len(chunks), generator=generator)
    if noise_range == ALL_NOISE:
        return over_frames(shift_time(t, shift), chunks)
    # Shifting by 1 / s is the inverse of shifting by s.
    low, high = shift_time(torch.tensor(noise_range, dtype=torch.float64), 1 / shift).tolist()
    return over_frames(shift_time(low + (high - low) * t, shift).clamp(*noise_range), chunks)


def mean_times(t: Tensor, chunks: Sequence[tuple[int, int]], generator: torch.Generator) -> Tensor:
    """Draw a flow map's second times r `[B, F]` for the noise levels `t` `[B, F]` of `chunk_times`.

    Half of the chunks have r = t, where the flow-matching target is valid; for the others r is uniform in [0, t).
    """
    drawn = torch.rand(2, len(t), len(chunks), generator=generator)
    share = torch.where(drawn[0] < 0.5, torch.ones(()), drawn[1])
    return t * over_frames(share, chunks).to(t)


def over_frames(values: Tensor, chunks: Sequence[tuple[int, int]]) -> Tensor:
    """Repeat values `[B, chunks]` over the frames of each chunk, `[B, F]`."""
    return values.repeat_interleave(torch.tensor([stop - start for start, stop in chunks]), dim=1)
