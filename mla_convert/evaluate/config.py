"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..flow import Sampler, noise_levels
from ..sampling import DenoisingSteps


class EvaluateConfig(BaseModel):
    """How much is measured.

    `clips` held-out clips give the losses and errors. `rollout_prompts` held-out prompts are
    generated at the training length and, with `long_factor` above 0, at that many times it; `factors`
    are further lengths. Each prompt is drawn from `rollout_seeds` noises. `sampler` is the student's,
    `renoise` for one that was trained for it; the teacher takes Euler steps. With `denoising_steps`, falling noise
    levels out of 1000 that `shift` warps, the losses and errors are those at these levels alone, which are all that a
    model of few steps knows.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    clips: int = Field(64, ge=1)
    batch_size: int = Field(16, ge=1)
    rollout_prompts: int = Field(50, ge=0)
    rollout_seeds: int = Field(1, ge=1)
    long_factor: int = Field(8, ge=0)
    factors: tuple[Annotated[int, Field(ge=1)], ...] = ()
    num_inference_steps: int = Field(8, ge=1)
    sampler: Sampler = "euler"
    denoising_steps: DenoisingSteps | None = None
    shift: float = Field(1.0, gt=0)
    guidance_scale: float = Field(1.0, ge=0)
    seed: int = 0

    @property
    def noise_levels(self) -> tuple[float, ...] | None:
        """The only noise levels in (0, 1] of losses and errors; None for all."""
        return noise_levels(self.denoising_steps, self.shift)
