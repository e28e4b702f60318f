"""Regress each layer's self-attention on the frozen dense teacher's, for the same inputs.

Layers are trained side by side without a graph between them: every layer sees the activations of
one forward without gradient. It is the attention-transfer step of linearisation (LoLCATs, arXiv
2410.10254, section 3.2), here for the latent attention of VideoMLA (arXiv 2605.30351).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...flow import drop_prompts
from ...mla.attention import AttentionPass
from ..data import Batch
from ..objective import NoisedClips, noised_clips, predict_velocity
from ..trainable import Trainable
from .base import Models, Stage, StageConfig


class MatchAttentionConfig(StageConfig):
    """Keys of `match_attention`.

    `copies`, `timestep_shift`, `context`, `context_noise` and `empty_prompt_rate` are those of
    `match_velocity`. `hidden_states` says whose activations the layers are compared on: `teacher`,
    or `student` for what the converted layers in front really produce. `trainable` is `latent` or
    `attention`, since nothing else takes part.
    """

    stage: Literal["match_attention"] = "match_attention"
    copies: int = Field(1, ge=1)
    timestep_shift: float = Field(1.0, gt=0)
    context: Literal["clean", "noisy"] = "clean"
    context_noise: float = Field(0.0, ge=0, le=1)
    empty_prompt_rate: float = Field(0.0, ge=0, le=1)
    hidden_states: Literal["teacher", "student"] = "teacher"

    @field_validator("trainable")
    @classmethod
    def _only_attention_takes_part(cls, trainable: Trainable) -> Trainable:
        if trainable == "all":
            raise ValueError("match_attention trains latent or attention: nothing else gets a gradient")
        return trainable


class _Call(NamedTuple):
    """One self-attention layer at work: `hidden_states` and its output `out`, both `[B, S, C]`."""

    hidden_states: Tensor
    step: AttentionPass
    out: Tensor


@torch.no_grad()
def _attention_calls(model: Any, clips: NoisedClips) -> list[_Call]:
    """What every self-attention of `model` is given and answers on `clips`, by layer."""
    calls: list[_Call] = []

    def record(module: torch.nn.Module, args: tuple[Tensor, None, None, AttentionPass], out: Tensor) -> None:
        calls.append(_Call(args[0], args[3], out))

    hooks = [block.attn1.register_forward_hook(record) for block in model.blocks]
    try:
        predict_velocity(model, clips)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class MatchAttention(Stage[MatchAttentionConfig]):
    """Mean over layers of `|student - teacher|^2 / |teacher|^2`, sums over all tokens and channels.

    Tokens of the clean history count like noisy ones: later layers make keys and values of them.
    """

    name = "match_attention"
    config_class = MatchAttentionConfig

    @property
    def networks(self) -> tuple[str, ...]:
        return ("teacher",)

    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config, teacher, student = self.config, models["teacher"], models["student"]
        clips = noised_clips(
            batch["latents"],
            drop_prompts(batch["encoder_hidden_states"], config.empty_prompt_rate, generator),
            student.causal,
            generator,
            copies=config.copies,
            shift=config.timestep_shift,
            clean_history=config.context == "clean",
            context_noise=config.context_noise,
        )
        own_inputs = config.hidden_states == "student"
        calls = _attention_calls(student if own_inputs else teacher, clips)
        errors = []
        for block, dense_block, call in zip(student.blocks, teacher.blocks, calls, strict=True):
            if own_inputs:
                with torch.no_grad():
                    out = dense_block.attn1(call.hidden_states.to(teacher.dtype), None, None, call.step)
                call = call._replace(out=out)
            # Recomputed in the backward pass, so that one layer's graph is alive at a time.
            errors.append(checkpoint(_relative_error, block.attn1, call, use_reentrant=False, preserve_rng_state=False))
        squared = torch.stack(errors)
        relative = squared.detach().sqrt()
        return squared.mean(), {"attention_error": relative.mean(), "attention_error_max": relative.max()}


def _relative_error(attention: torch.nn.Module, call: _Call) -> Tensor:
    """Squared error of `attention` over the energy of `call.out`, float32."""
    dtype = next(attention.parameters()).dtype
    out, expected = attention(call.hidden_states.to(dtype), None, None, call.step).float(), call.out.float()
    return (out - expected).square().sum() / expected.square().sum().clamp_min(1e-30)


STAGE = MatchAttention
