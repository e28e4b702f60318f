"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ..flow import noise_levels
from ..sampling import SamplingConfig, Seed


class EvaluateConfig(SamplingConfig):
    """How much is measured.

    The losses and errors come from `clips` held-out clips. `rollout_prompts` held-out prompts are generated at the
    training length and, with `long_factor` above 0, at that multiple of it; `factors` are further multiples. Each
    prompt is generated from `rollout_seeds` different noises.

    The keys of `generate` set how the student is sampled; the teacher takes `num_inference_steps` Euler steps. With
    `denoising_steps`, the losses and errors are also measured at these noise levels only, warped by `shift`, because a
    few-step model knows no others.
    """

    clips: int = Field(64, ge=1)
    batch_size: int = Field(16, ge=1)
    rollout_prompts: int = Field(50, ge=0)
    rollout_seeds: int = Field(1, ge=1)
    long_factor: int = Field(8, ge=0)
    factors: tuple[Annotated[int, Field(ge=1)], ...] = ()
    seed: Seed = 0

    @property
    def noise_levels(self) -> tuple[float, ...] | None:
        """The only noise levels in (0, 1] of losses and errors; None for all."""
        return noise_levels(self.denoising_steps, self.shift)
