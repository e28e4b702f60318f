"""The `evaluate` section of a recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from ..flow import Sampler


class EvaluateConfig(BaseModel):
    """How much is measured.

    `clips` held-out clips give the losses and errors. `rollout_prompts` held-out prompts are
    generated at the training length and, with `long_factor` above 0, at that many times it; `factors`
    are further lengths. Each prompt is drawn from `rollout_seeds` noises. `sampler` is the student's,
    `renoise` for one that was trained for it; the teacher takes Euler steps.
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
    shift: float = Field(1.0, gt=0)
    guidance_scale: float = Field(1.0, ge=0)
    seed: int = 0
