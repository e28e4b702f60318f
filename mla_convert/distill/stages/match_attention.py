"""Regresses the output of each self-attention layer on the frozen dense teacher's, for the same inputs.

One forward pass provides the inputs of all layers, and no graph connects the layers. This is the attention
transfer of LoLCATs (arXiv 2410.10254, section 3.2), applied to the latent attention of VideoMLA
(arXiv 2605.30351).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import field_validator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...errors import UsageError
from ...mla.attention import AttentionPass
from ...mla.latent import reading_together
from ..data import Batch, Data
from ..execution import checkpointed
from ..objective import NoisedClips, predict_velocity
from ..trainable import Trainable
from .base import TEACHER, Models, Stage
from .noised import NoisedStageConfig, noised_batch


class MatchAttentionConfig(NoisedStageConfig):
    """Keys of `match_attention`, in addition to those of stages on noised data.

    `metric` defines the cost of an error in a layer's output: `velocity` is its effect on the model's velocity,
    `output` is its square. `hidden_states` chooses the activations on which the layers are compared: `teacher`, or
    `student` for what the preceding converted layers actually produce. `trainable` is `latent` or `attention`, because
    no other weights are used.
    """

    adapted_part = "attn1"

    stage: Literal["match_attention"] = "match_attention"
    metric: Literal["output", "velocity"] = "velocity"
    hidden_states: Literal["teacher", "student"] = "teacher"

    @field_validator("trainable")
    @classmethod
    def _only_attention_takes_part(cls, trainable: Trainable) -> Trainable:
        if trainable == "all":
            raise ValueError("match_attention gives no other weights a gradient; set trainable to latent or attention")
        return trainable

    @field_validator("compile")
    @classmethod
    def _layers_are_looked_into(cls, wanted: bool) -> bool:
        if wanted:
            raise ValueError("match_attention hooks into the blocks, which compiled blocks do not allow; leave it out")
        return wanted


@dataclass
class _Call:
    """One call of a self-attention layer: its input `hidden_states` and the expected `out`, both `[B, S, C]`.

    `gradient` `[B, S, C]` is the gradient of a random projection of the velocity with respect to `out`. The squared
    products `(scale * gradient . error)^2` per token sum to the error's share of the velocity's energy, to first
    order and with tokens taken as independent.
    """

    hidden_states: Tensor
    step: AttentionPass
    out: Tensor
    gradient: Tensor | None = None
    scale: Tensor | None = None

    def cost(self, error: Tensor) -> Tensor | None:
        """The estimated relative squared velocity error that `error` `[B, S, C]` causes; None without a gradient."""
        if self.gradient is None or self.scale is None:
            return None
        return (error * (self.scale * self.gradient.float())).sum(-1).square().sum()


@contextlib.contextmanager
def _hooked(model: Any, hook: Any) -> Iterator[None]:
    """Call `hook(layer, args, out)` on every self-attention of `model`; a returned tensor replaces `out`."""
    handles = [
        block.attn1.register_forward_hook(lambda _, args, out, layer=layer: hook(layer, args, out))
        for layer, block in enumerate(model.blocks)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _calls(model: Any, clips: NoisedClips) -> list[_Call]:
    """The input and output of every self-attention layer of `model` on `clips`, in layer order."""
    calls: list[_Call] = []

    def record(layer: int, args: tuple[Tensor, None, None, AttentionPass], out: Tensor) -> None:
        calls.append(_Call(args[0], args[3], out))

    with _hooked(model, record):
        predict_velocity(model, clips)
    return calls


@torch.enable_grad()
def _calls_with_gradient(model: Any, clips: NoisedClips, generator: torch.Generator) -> list[_Call]:
    """`_calls`, with the gradient of a random projection of the velocity for each layer."""
    calls: dict[int, _Call] = {}
    offsets: dict[int, Tensor] = {}

    def record(layer: int, args: tuple[Tensor, None, None, AttentionPass], out: Tensor) -> Tensor:
        # Checkpointing recomputes the block, and must add the same leaf again.
        if layer not in calls:
            calls[layer] = _Call(args[0].detach(), args[3], out.detach())
            offsets[layer] = torch.zeros_like(out, requires_grad=True)
        return out + offsets[layer]

    with _hooked(model, record), checkpointed(model):
        velocity = predict_velocity(model, clips)
        projection = torch.randn(velocity.shape, generator=generator).to(velocity.device)
        gradients = torch.autograd.grad((projection * velocity).sum(), list(offsets.values()))
    scale = velocity.detach().square().sum().clamp_min(1e-30).rsqrt()
    for layer, gradient in zip(offsets, gradients, strict=True):
        # Not converted to float32: the gradients of all layers are in memory at once.
        calls[layer].gradient, calls[layer].scale = gradient, scale
    return [calls[layer] for layer in sorted(calls)]


class MatchAttention(Stage[MatchAttentionConfig]):
    """The loss is the cost of the output errors of all layers, each layer on its own.

    With `metric: output`, it is the mean over layers of `|student - teacher|^2 / |teacher|^2`, summed over
    all tokens and channels. With `metric: velocity`, it is the sum over layers of `sum_tokens (g . error)^2`. If the
    errors of different tokens and layers were independent, this would be an unbiased estimate of the squared
    relative error of the velocity. g is the gradient of a random projection of the velocity, as in a conversion
    with `metric: velocity`. Tokens of the clean history count too, because later chunks read their keys and values.
    """

    name = "match_attention"
    config_class = MatchAttentionConfig
    calls_parts = True

    @property
    def networks(self) -> tuple[str, ...]:
        return (TEACHER,)

    def check(self, student: Any, networks: Models, data: Data) -> None:
        super().check(student, networks, data)
        if self.config.shard_frozen:
            raise UsageError("match_attention hooks into the teacher's blocks; leave shard_frozen out")
        if self.config.hidden_states == "student" and any(len(layers) > 1 for layers in student.latent_groups):
            raise UsageError(
                "match_attention: layers that share a latent process a clip chunk by chunk, which hidden_states: "
                "student cannot record; set hidden_states to teacher"
            )

    def loss(self, models: Models, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        config, teacher, student = self.config, models[TEACHER], models["student"]
        clips = noised_batch(config, batch, student, generator, self.negative)
        own = config.hidden_states == "student"
        source = student if own else teacher
        weighted = config.metric == "velocity"
        calls = _calls_with_gradient(source, clips, generator) if weighted else _calls(source, clips)
        errors = []
        for layers in student.latent_groups:
            shared = [calls[layer] for layer in layers]
            if own:
                for layer, call in zip(layers, shared, strict=True):
                    with torch.no_grad():
                        dense = teacher.blocks[layer].attn1
                        call.out = dense(call.hidden_states.to(teacher.dtype), None, None, call.step)
            attentions = [student.blocks[layer].attn1 for layer in layers]
            # Recomputed in the backward pass, so that only one group's graph is in memory at a time.
            errors.append(checkpoint(_errors, attentions, shared, use_reentrant=False, preserve_rng_state=False))
        squared, costs = torch.cat(errors).unbind(1)
        relative = squared.detach().sqrt()
        logs = {"attention_error": relative.mean(), "attention_error_max": relative.max()}
        if not weighted:
            return squared.mean(), logs
        cost = costs.sum()
        return cost, {**logs, "velocity_error": cost.detach().sqrt()}


def _errors(attentions: list[Any], calls: list[_Call]) -> Tensor:
    """Relative squared error and cost of each layer that shares one latent, `[layers, 2]`, float32.

    The relative error is over the energy of the expected output. Without a gradient the cost equals it.
    """
    dtype = next(attentions[0].parameters()).dtype
    step = reading_together(attentions, [call.hidden_states.to(dtype) for call in calls], calls[0].step)
    errors = []
    for attention, call in zip(attentions, calls, strict=True):
        expected = call.out.float()
        error = attention(call.hidden_states.to(dtype), None, None, step).float() - expected
        relative = error.square().sum() / expected.square().sum().clamp_min(1e-30)
        cost = call.cost(error)
        errors.append(torch.stack([relative, relative if cost is None else cost]))
    return torch.stack(errors)


STAGE = MatchAttention
