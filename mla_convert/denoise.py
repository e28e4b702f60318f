"""A chunk on its way from noise to clean: the steps that every rollout takes, whoever runs the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UsageError
from .flow import Sampler, add_noise, next_sample, sampling_times

VelocityAt = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The velocity of a chunk at noise level t; of a flow map the mean one from t down to a second level r."""

StepDone = Callable[[int, Tensor, Tensor], Tensor | None]
"""Told the number of a step, its noise level and the chunk after it, which what it returns replaces."""


@dataclass(frozen=True)
class Schedule:
    """The steps of a rollout's chunks.

    `times` are noise levels that fall to 0, float32 on the CPU, and `opening` those of the first chunk. `sampler` takes
    Euler steps, or with `renoise` adds new noise to the predicted clean chunk. A finished chunk is written to the cache
    at noise level `context_noise`. A rollout with a source begins at the noise level of its `strength`; at 1 nothing of
    the source is seen.
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
        """The schedule of a `SamplingConfig`'s keys, from `strength` on. Raises UsageError unless that is in (0, 1]."""
        if not 0 < strength <= 1:
            raise UsageError(f"the strength is more than 0 and at most 1, not {strength:g}")
        times = sampling_times(num_inference_steps, shift, denoising_steps, strength)
        opening = times
        if first_chunk_steps is not None:
            opening = sampling_times(num_inference_steps, shift, first_chunk_steps, strength)
        return cls(times, opening, sampler, context_noise, strength)

    def of_chunk(self, first: int) -> Tensor:
        """The noise levels of the chunk that begins at frame `first`."""
        return self.times if first > 0 else self.opening

    def draws(self, first: int) -> int:
        """How often the chunk from frame `first` on draws noise: to begin, between its steps, for the cache."""
        between = len(self.of_chunk(first)) - 2 if self.sampler == "renoise" else 0
        return 1 + between + (1 if self.context_noise > 0 else 0)

    def begin(self, noise: Tensor, first: int, source: Tensor | None = None) -> Tensor:
        """What the chunk from frame `first` on begins as: `noise` `[B, C, F, H, W]`, or a clean `source` under it."""
        if source is None or self.strength == 1:
            return noise
        t = torch.full((len(noise),), float(self.of_chunk(first)[0]), device=noise.device)
        return add_noise(source, noise, t)

    def between(self, noises: Sequence[Tensor]) -> Iterator[Tensor] | None:
        """Of all `noises` that a chunk has drawn those between its steps, as `denoise` takes them."""
        return iter(noises[1:]) if self.sampler == "renoise" else None


def denoise(
    x: Tensor,
    times: Tensor,
    velocity: VelocityAt,
    renoise: Iterator[Tensor] | None = None,
    held: Tensor | None = None,
    on_step: StepDone | None = None,
) -> Tensor:
    """The chunk `x` `[B, C, F, H, W]` after a step from each of `times` `[steps + 1]` to the next.

    `renoise` gives the noise of every step that does not end at 0: such a step predicts the clean chunk and noises it
    anew. Without it steps are Euler's. `held` `[B, C, F0, H, W]` are first frames that stay as they are.
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
    """A chunk `[B, C, F, H, W]` whose first frames are those that are `held` `[B, C, F0, H, W]`."""
    return x if held is None else torch.cat([held, x[:, :, held.shape[2] :]], dim=2)
