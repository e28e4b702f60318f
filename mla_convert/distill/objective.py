"""The flow-matching objective of a causal video model, for training and for evaluation.

Teacher forcing (arXiv 2412.07772, 2506.08009): a clean copy of each clip provides the history, and
noisy copies with an independent noise level a chunk are denoised against it in one block-causal
forward. Shape letters: B clips, C channels, F frames, L text tokens, D text channels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import flow
from ..mla.conditions import CLIP, conditions_of, placed
from ..mla.window import CausalConfig

HELDOUT_SEED = 1


class NoisedClips(NamedTuple):
    """One forward's inputs and its flow-matching target, all float32.

    `x_t` and `target` `[B, C, F, H, W]`, `t` `[B, F]` in [0, 1], `text` `[B, L, D]`. With teacher
    forcing `context` `[B', C, F, H, W]` is the history at noise level `t_context` `[B']`, B a
    multiple of B'. `r` `[B, F]` are the second times of a flow map, None for r = t; `target` holds
    where r = t. `conditions` `[B, ...]` are what the model is conditioned on beside text, under the names by which it
    takes them.
    """

    x_t: Tensor
    t: Tensor
    text: Tensor
    target: Tensor
    context: Tensor | None = None
    t_context: Tensor | None = None
    r: Tensor | None = None
    conditions: Mapping[str, Tensor] = MappingProxyType({})

    def split(self, size: int) -> Iterator[NoisedClips]:
        """`size` clips at a time, of one noisy version of each."""
        for start in range(0, len(self.target), size):
            yield self._each(operator.itemgetter(slice(start, start + size)))

    def to(self, device: torch.device | str) -> NoisedClips:
        """The same on `device`."""
        return self._each(operator.methodcaller("to", device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> NoisedClips:
        tensors = {name: tensor for name, tensor in self._asdict().items() if isinstance(tensor, Tensor)}
        conditions = {name: change(tensor) for name, tensor in self.conditions.items()}
        return self._replace(**{name: change(tensor) for name, tensor in tensors.items()}, conditions=conditions)


def noised_clips(
    latents: Tensor,
    text: Tensor,
    causal: CausalConfig,
    generator: torch.Generator,
    *,
    copies: int = 1,
    shift: float = 1.0,
    clean_history: bool = True,
    context_noise: float = 0.0,
    noise_range: tuple[float, float] = flow.ALL_NOISE,
    levels: Sequence[float] | None = None,
    flow_map: bool = False,
    conditions: Mapping[str, Tensor] = MappingProxyType({}),
) -> NoisedClips:
    """`copies` noisy versions of each of `latents` `[B, C, F, H, W]` with `text` `[B, L, D]` and `conditions`.

    `shift` warps the noise levels, all of which lie in `noise_range`; with `levels` they are drawn from those.
    Without `clean_history` every chunk sees the noisy history of its own copy. With `context_noise`, half of the
    clean histories carry noise up to that level, so that a model learns to repair what it will have made itself. With
    `flow_map` second times r are drawn too (`flow.mean_times`), after everything else. Everything is drawn on the CPU
    from `generator`, so that the draws do not depend on the device.
    """
    device = latents.device
    clips, chunks = latents.shape[0], causal.chunks(latents.shape[2])
    videos = latents.repeat(copies, 1, 1, 1, 1)
    noise = torch.randn(videos.shape, generator=generator).to(device)
    t = flow.chunk_times(len(videos), chunks, generator, shift, noise_range, levels).to(device)
    told = {name: x.repeat(copies, *(1,) * (x.ndim - 1)) for name, x in conditions.items()}
    x_t, target = flow.add_noise(videos, noise, t), flow.velocity(videos, noise)
    noised = NoisedClips(x_t, t, text.repeat(copies, 1, 1), target, conditions=told)
    if clean_history:
        noisy_history = torch.rand(clips, generator=generator) < 0.5
        t_context = (context_noise * torch.rand(clips, generator=generator) * noisy_history).to(device)
        context = flow.add_noise(latents, torch.randn(latents.shape, generator=generator).to(device), t_context)
        noised = noised._replace(context=context, t_context=t_context)
    return noised._replace(r=flow.mean_times(t, chunks, generator)) if flow_map else noised


def predict_velocity(model: Any, clips: NoisedClips) -> Tensor:
    """Velocity `[B, C, F, H, W]`, float32, of a causal model; inputs are cast to the model's dtype."""
    dtype = model.dtype
    given = placed([clips.conditions], clips.x_t.device, dtype)
    if clips.context is not None and clips.t_context is not None:
        given["context"] = clips.context.to(dtype)
        given["context_timestep"] = clips.t_context * flow.NUM_TRAIN_TIMESTEPS
    timestep = clips.t * flow.NUM_TRAIN_TIMESTEPS
    if model.flow_map:
        given["r_timestep"] = timestep if clips.r is None else clips.r * flow.NUM_TRAIN_TIMESTEPS
    sample: Tensor = model(clips.x_t.to(dtype), timestep, clips.text.to(dtype), **given).sample
    return sample.float()


def teacher_forcing_loss(
    model: Any,
    latents: Tensor,
    text: Tensor,
    generator: torch.Generator,
    *,
    copies: int = 1,
    shift: float = 1.0,
    context_noise: float = 0.0,
) -> Tensor:
    """Mean squared velocity error of `copies` noisy versions of each clip given its clean history.

    Noise levels are those of the model's `noise_range`; of a flow map it is the velocity at r = t.
    """
    clips = noised_clips(
        latents,
        text,
        model.causal,
        generator,
        copies=copies,
        shift=shift,
        context_noise=context_noise,
        noise_range=model.noise_range,
    )
    return (predict_velocity(model, clips) - clips.target).square().mean()


def in_batches(clips: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """`clips`, tensors `[N, ...]` by name, `size` of them at a time."""
    for start in range(0, len(clips["latents"]), size):
        yield {name: x[start : start + size] for name, x in clips.items()}


@torch.no_grad()
def flow_loss(
    model: Any,
    clips: Mapping[str, Tensor],
    seed: int = HELDOUT_SEED,
    batch_size: int = 32,
    forward_size: int | None = None,
    levels: Sequence[float] | None = None,
) -> float:
    """Teacher-forcing loss on `clips` with the noise that `seed` gives: comparable between models.

    `clips` holds `latents` `[N, C, F, H, W]`, `encoder_hidden_states` `[N, L, D]` and what the model is conditioned on
    beside; the figure depends on `batch_size` through the order of the draws. Noise levels are all of the model's, or
    `levels`. A forward takes `forward_size` clips of a batch, all of them when left out.
    """
    generator = torch.Generator().manual_seed(seed)
    losses, sizes = [], []
    for batch in in_batches(clips, batch_size):
        latents, text = (batch[name] for name in CLIP)
        noised = noised_clips(
            latents,
            text,
            model.causal,
            generator,
            noise_range=model.noise_range,
            levels=levels,
            conditions=conditions_of(batch),
        )
        for part in noised.split(forward_size or len(latents)):
            part = part.to(model.device)
            losses.append((predict_velocity(model, part) - part.target).square().mean().item())
            sizes.append(len(part.target))
    return float(np.average(losses, weights=sizes))
