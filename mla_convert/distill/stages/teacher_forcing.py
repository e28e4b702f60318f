"""Flow matching on the data itself, with clean history: the first stage of Causal Forcing (arXiv 2602.02214).

Clips are packed as in `objective.noised_clips`: every chunk has its own noise level. The stage uses no other
network.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...flow import NUM_TRAIN_TIMESTEPS, per_frame, sampling_times
from ..data import Batch
from ..objective import predict_velocity
from .base import Models, Stage
from .noised import NoisedStageConfig, noised_batch


class TeacherForcingConfig(NoisedStageConfig):
    """Keys of `teacher_forcing`, in addition to those of stages on noised data; the history is always clean.

    `weighting: bell` gives noise levels near 1/2 the most weight, see `bell_weight`; `none` weights all levels equally.
    """

    stage: Literal["teacher_forcing"] = "teacher_forcing"
    context: Literal["clean"] = "clean"
    weighting: Literal["none", "bell"] = "bell"


def bell_weight(t: Tensor, shift: float) -> Tensor:
    """The weight of noise levels `t` in [0, 1], of any shape: a bell around 1/2 that falls to 0 at both ends.

    It is `exp(-2 (t - 1/2)^2)` less its minimum, scaled to a mean of 1 over the 1000 training steps that
    `shift` warps. No paper states it; the flow-matching schedulers of public code for Wan use it.
    """
    steps = _bell(sampling_times(NUM_TRAIN_TIMESTEPS, shift)[:-1])
    lowest = steps.min()
    return (_bell(t) - lowest).clamp_min(0) / (steps - lowest).mean()


def _bell(t: Tensor) -> Tensor:
    return torch.exp(-2 * (t - 0.5).square())


class TeacherForcing(Stage[TeacherForcingConfig]):
    """The loss is the mean of `w(t) |v_student - (eps - x_0)|^2` over all elements; a flow map is trained at r = t."""

    name = "teacher_forcing"
    config_class = TeacherForcingConfig

    @property
    def networks(self) -> tuple[str, ...]:
        return ()

    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config, student = self.config, models["student"]
        # The data gives only the velocity at r = t.
        clips = noised_batch(config, batch, student, generator, self.negative)._replace(r=None)
        squared = (predict_velocity(student, clips) - clips.target).square()
        logs = {"data_loss": squared.detach().mean()}
        if config.weighting == "none":
            return squared.mean(), logs
        return (per_frame(bell_weight(clips.t, config.timestep_shift), squared.ndim) * squared).mean(), logs


STAGE = TeacherForcing
