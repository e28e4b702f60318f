"""Shared by stages on noised data: the keys that define how clips are noised, and the noised batch."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...flow import drop_prompts
from ...mla.conditions import conditions_of
from ..data import Batch
from ..objective import NoisedClips, noised_clips
from .base import StageConfig


class NoisedStageConfig(StageConfig):
    """Keys of stages on noised data.

    `copies` noisy versions of each clip share one forward. `timestep_shift` warps the noise levels
    (5 for Wan). `context: clean` is teacher forcing: every chunk sees clean history, with noise up to level
    `context_noise`. `noisy` is the plain block-causal forward. A share `empty_prompt_rate` of the
    clips gets the negative prompt instead of its own, for models that are sampled with guidance.
    """

    copies: int = Field(1, ge=1)
    timestep_shift: float = Field(1.0, gt=0)
    context: Literal["clean", "noisy"] = "clean"
    context_noise: float = Field(0.0, ge=0, le=1)
    empty_prompt_rate: float = Field(0.0, ge=0, le=1)

    @property
    def reads_negative(self) -> bool:
        return self.empty_prompt_rate > 0

    @property
    def sequences_a_clip(self) -> int:
        return self.copies + (self.context == "clean")


def noised_batch(
    config: NoisedStageConfig, batch: Batch, model: Any, generator: torch.Generator, negative: Tensor | None = None
) -> NoisedClips:
    """The clips of a training batch, noised as `config` says, with the chunks and noise range of `model`.

    Clips that lose their prompt get `negative` `[L, D]`, or zeros if None. A flow map gets second times r;
    where r differs from t, only a teacher can provide the target.
    """
    return noised_clips(
        batch["latents"],
        drop_prompts(batch["encoder_hidden_states"], config.empty_prompt_rate, generator, negative),
        model.causal,
        generator,
        copies=config.copies,
        shift=config.timestep_shift,
        clean_history=config.context == "clean",
        context_noise=config.context_noise,
        noise_range=model.noise_range,
        levels=config.noise_levels,
        flow_map=model.flow_map,
        conditions=conditions_of(batch),
    )
