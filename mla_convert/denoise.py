"""Denoise one chunk from noise to clean video: the steps that every rollout takes, whatever runs the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError
from .flow import Sampler, add_noise, next_sample, sampling_times

VelocityAt = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Called with x, t, r; returns the velocity of a chunk at noise level t, or a flow map's mean velocity from t to r."""

StepDone = Callable[[int, Tensor, Tensor], Tensor | None]
"""Called after each step with its index, its noise level and the new chunk; a returned tensor replaces that chunk."""


@dataclass(frozen=True)
class Schedule:
    """The denoising steps of a rollout's chunks.

    `times` are noise levels that fall to 0, float32 on the CPU; `opening` are those of the first chunk. `sampler` takes
    Euler steps (`euler`) or adds new noise to the predicted clean chunk (`renoise`). A finished chunk is written to the
    cache at noise level `context_noise`. A rollout with a source begins at the noise level of its `strength`; at 1,
    nothing of the source remains.
    """

    times: Tensor
    opening: Tensor
    sampler: Sampler = "euler"
    context_noise: float = 0.0
    strength: float = 1.0

    @classmethod
    def of(
        cls,
        num_inference_steps: int,
        shift: float,
        denoising_steps: Sequence[float] | None = None,
        first_chunk_steps: Sequence[float] | None = None,
        sampler: Sampler = "euler",
        context_noise: float = 0.0,
        strength: float = 1.0,
    ) -> Schedule:
        """Build a schedule from a `SamplingConfig`'s keys. Raises UsageError unless `strength` is in (0, 1]."""
        if not 0 < strength <= 1:
            raise UsageError(f"the strength must be above 0 and at most 1, not {strength:g}")
        times = sampling_times(num_inference_steps, shift, denoising_steps, strength)
        opening = times
        if first_chunk_steps is not None:
            opening = sampling_times(num_inference_steps, shift, first_chunk_steps, strength)
        return cls(times, opening, sampler, context_noise, strength)

    def of_chunk(self, first: int) -> Tensor:
        """The noise levels of the chunk that begins at frame `first`."""
        return self.times if first > 0 else self.opening

    def draws(self, first: int) -> int:
        """Count the noise draws of the chunk that begins at frame `first`: to begin, between steps, for the cache."""
        between = len(self.of_chunk(first)) - 2 if self.sampler == "renoise" else 0
        return 1 + between + (1 if self.context_noise > 0 else 0)

    def begin(self, noise: Tensor, first: int, source: Tensor | None = None) -> Tensor:
        """The initial state of the chunk that begins at frame `first`, `[B, C, F, H, W]`.

        This is `noise`, or the clean `source` with `noise` added at the first noise level.
        """
        if source is None or self.strength == 1:
            return noise
        t = torch.full((len(noise),), float(self.of_chunk(first)[0]), device=noise.device)
        return add_noise(source, noise, t)

    def between(self, noises: Sequence[Tensor]) -> Iterator[Tensor] | None:
        """Select, from all `noises` that a chunk has drawn, those between its steps, as `denoise` takes them."""
        return iter(noises[1:]) if self.sampler == "renoise" else None


def denoise(
    x: Tensor,
    times: Tensor,
    velocity: VelocityAt,
    renoise: Iterator[Tensor] | None = None,
    held: Tensor | None = None,
    on_step: StepDone | None = None,
) -> Tensor:
    """Denoise the chunk `x` `[B, C, F, H, W]` by a step from each of `times` `[steps + 1]` to the next.

    With `renoise`, every step predicts the clean chunk and adds new noise to it; the iterator provides the noise of
    each step that does not end at 0. Without it, steps are Euler steps. `held` `[B, C, F0, H, W]` are first frames that
    stay unchanged.
    """
    x = with_held(x, held)
    for index, (t, t_next) in enumerate(itertools.pairwise(times)):
        v = velocity(x, t, t_next if renoise is None else times[-1])
        noise = next(renoise) if renoise is not None and t_next > 0 else None
        x = with_held(next_sample(x, v, t, t_next, noise), held)
        changed = None if on_step is None else on_step(index, t, x)
        x = x if changed is None else with_held(changed, held)
    return x


def with_held(x: Tensor, held: Tensor | None) -> Tensor:
    """Replace the first frames of a chunk `[B, C, F, H, W]` by the `held` ones `[B, C, F0, H, W]`."""
    return x if held is None else torch.cat([held, x[:, :, held.shape[2] :]], dim=2)
