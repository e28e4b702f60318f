"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..flow import noise_levels
from ..sampling import SamplingConfig


class EvaluateConfig(SamplingConfig):
    """How much is measured.

    `clips` held-out clips give the losses and errors. `rollout_prompts` held-out prompts are
    generated at the training length and, with `long_factor` above 0, at that many times it; `factors`
    are further lengths. Each prompt is drawn from `rollout_seeds` noises. How the student is sampled is said in
    the keys of `generate`; the teacher takes `num_inference_steps` Euler steps. With `denoising_steps` the losses
    and errors, too, are those at their noise levels alone, warped by `shift`, which are all that a model of few
    steps knows.
    """

    clips: int = Field(64, ge=1)
    batch_size: int = Field(16, ge=1)
    rollout_prompts: int = Field(50, ge=0)
    rollout_seeds: int = Field(1, ge=1)
    long_factor: int = Field(8, ge=0)
    factors: tuple[Annotated[int, Field(ge=1)], ...] = ()
    seed: int = 0

    @property
    def noise_levels(self) -> tuple[float, ...] | None:
        """The only noise levels in (0, 1] of losses and errors; None for all."""
        return noise_levels(self.denoising_steps, self.shift)
