"""Consistency distillation of a causal student: the second stage of Causal Forcing (arXiv 2602.02214, 2605.15141).

One Euler step of the guided teacher leads from a noise level of a grid to the next lower one. Both
ends lie on one path of the probability-flow ODE, so they must point to the same clean chunk. Every
chunk draws its own noise level and sees clean history (teacher forcing).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ...flow import add_noise, denoising_times, over_frames, per_frame, sampling_times, to_clean, velocity
from ...mla.conditions import conditions_of
from ..data import Batch, Data
from ..objective import NoisedClips, predict_velocity
from .base import AVERAGE, START, TEACHER, Models, Stage
from .guided import GuidedStageConfig, check_few_step, guided_velocity, negative_text


class ConsistencyConfig(GuidedStageConfig):
    """Keys of `consistency`, in addition to those of stages with a guided teacher.

    `solver_steps` Euler steps make the grid from noise to data; `denoising_steps` are added to it where it lacks them.
    `teacher` is the run's dense `source`, or `start`, the student as it was when the stage began: use this for a
    student that earlier stages made causal, as in the papers. `ema_decay` is required, because the averaged student
    provides the target.
    """

    stage: Literal["consistency"] = "consistency"
    ema_decay: float = Field(gt=0, lt=1)
    solver_steps: int = Field(48, ge=2)
    teacher: Literal["source", "start"] = "source"

    @property
    def sequences_a_clip(self) -> int:
        return 2


class Consistency(Stage[ConsistencyConfig]):
    """The loss is the mean of `|f(x_t, t) - f_average(x_t', t')|^2` over all elements, with `f(x, t) = x - t v(x, t)`.

    `x_t' = x_t + (t' - t) v_teacher(x_t, t)`, with guidance; at t' = 0 the target is `x_t'` itself.
    """

    name = "consistency"
    config_class = ConsistencyConfig

    @property
    def networks(self) -> tuple[str, ...]:
        return (self._teacher, AVERAGE)

    @property
    def _teacher(self) -> str:
        return START if self.config.teacher == "start" else TEACHER

    def check(self, student: Any, networks: Models, data: Data) -> None:
        check_few_step(self.name, student)
        if self._teacher in networks:
            check_few_step(self.name, networks[self._teacher])

    def grid(self) -> Tensor:
        """The falling noise levels from 1 to 0, float32."""
        config = self.config
        times = sampling_times(config.solver_steps, config.timestep_shift)
        if config.denoising_steps is None:
            return times
        wanted = denoising_times(config.denoising_steps, config.timestep_shift)
        # Noise levels that differ only by rounding are the same.
        missing = [t for t in wanted if (times - t).abs().min() > 1e-6]
        return torch.cat([times, torch.stack(missing)]).sort(descending=True).values if missing else times

    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config, student = self.config, models["student"]
        latents, text = batch["latents"], batch["encoder_hidden_states"]
        chunks, grid = student.causal.chunks(latents.shape[2]), self.grid()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        index = torch.randint(len(grid) - 1, (len(latents), len(chunks)), generator=generator)
        t, t_next = (over_frames(grid[index + step], chunks).to(latents.device) for step in (0, 1))
        clips = NoisedClips(
            add_noise(latents, noise, t),
            t,
            text,
            velocity(latents, noise),
            context=latents,
            t_context=torch.zeros(len(latents), device=latents.device),
            conditions=conditions_of(batch),
        )
        with torch.no_grad():
            negative = negative_text(self.negative, text)
            v_teacher = guided_velocity(models[self._teacher], clips, negative, config.guidance_scale)
            x_next = clips.x_t + per_frame(t_next - t, latents.ndim) * v_teacher
            next_clips = clips._replace(x_t=x_next, t=t_next)
            target = to_clean(x_next, predict_velocity(models[AVERAGE], next_clips), t_next)
        clean = to_clean(clips.x_t, predict_velocity(student, clips), t)
        return F.mse_loss(clean, target), {"clean_error": F.mse_loss(clean.detach(), latents)}


STAGE = Consistency
