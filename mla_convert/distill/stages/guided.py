"""Shared by stages with a guided teacher: guidance (arXiv 2207.12598) and the noise levels of few-step sampling."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from ...errors import UserError
from ...flow import ALL_NOISE, guided
from ...sampling import DenoisingSteps
from ..objective import NoisedClips, predict_velocity
from .base import StageConfig


class GuidedStageConfig(StageConfig):
    """Keys of stages with a guided teacher and a student that takes few steps.

    `timestep_shift` warps every noise level (5 for Wan). `guidance_scale` guides the teacher away from the
    data's negative prompt; 1 disables guidance. `denoising_steps` are the noise levels at which the student is
    sampled: falling, out of 1000, before the shift.
    """

    timestep_shift: float = Field(5.0, gt=0)
    guidance_scale: float = Field(3.0, ge=0)
    denoising_steps: DenoisingSteps | None = None

    @property
    def reads_negative(self) -> bool:
        return self.guidance_scale != 1


def negative_text(negative: Tensor | None, text: Tensor) -> Tensor:
    """The `negative` prompt `[L, D]`, or zeros if None, expanded to the shape of `text` `[B, L, D]`."""
    return torch.zeros_like(text) if negative is None else negative.to(text).expand_as(text)


def guided_velocity(model: Any, clips: NoisedClips, negative: Tensor, scale: float) -> Tensor:
    """`v_neg + scale (v_text - v_neg)`, float32 `[B, C, F, H, W]`.

    Each of the two velocities also encodes the history with its own prompt.
    """
    v = predict_velocity(model, clips)
    if scale == 1:
        return v
    unguided = predict_velocity(model, clips._replace(text=negative))
    return guided(v, unguided, scale)


def check_few_step(stage: str, student: Any) -> None:
    """Raise UserError for a student or teacher that these stages cannot use."""
    if student.flow_map:
        raise UserError(
            f"stage {stage} cannot train {type(student).__name__}: a flow map takes few steps already; "
            "use match_velocity or teacher_forcing"
        )
    if student.noise_range != ALL_NOISE:
        raise UserError(
            f"stage {stage} needs a model of all noise levels, this one covers {list(student.noise_range)}; "
            "train experts with match_velocity or teacher_forcing"
        )
