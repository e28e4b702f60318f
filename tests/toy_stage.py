"""A distillation stage as another package would write it: regression that outliers do not rule."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from mla_convert.distill.data import Batch
from mla_convert.distill.objective import predict_velocity
from mla_convert.distill.stages.base import Models, Stage
from mla_convert.distill.stages.noised import NoisedStageConfig, noised_batch


class MatchRobustConfig(NoisedStageConfig):
    """Keys of `toy_match_robust`: errors above `delta` count linearly."""

    stage: Literal["toy_match_robust"] = "toy_match_robust"
    delta: float = Field(0.1, gt=0)


class MatchRobust(Stage[MatchRobustConfig]):
    """Huber loss between the student's velocity and the teacher's."""

    name = "toy_match_robust"
    config_class = MatchRobustConfig

    @property
    def networks(self) -> tuple[str, ...]:
        return ("teacher",)

    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        clips = noised_batch(self.config, batch, models["student"], generator, self.negative)
        with torch.no_grad():
            target = predict_velocity(models["teacher"], clips)
        error = predict_velocity(models["student"], clips) - target
        loss = F.huber_loss(error, torch.zeros_like(error), delta=self.config.delta)
        return loss, {"largest_error": error.detach().abs().max()}


STAGE = MatchRobust
