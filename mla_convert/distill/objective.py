"""The flow-matching objective of a causal video model, for training and for evaluation.

Teacher forcing (arXiv 2412.07772, 2506.08009): a clean copy of each clip provides the history. Noisy copies, with an
independent noise level per chunk, are denoised against it in one block-causal
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
    """The inputs of one forward and its flow-matching target, all float32.

    `x_t` and `target` are `[B, C, F, H, W]`, `t` is `[B, F]` in [0, 1], `text` is `[B, L, D]`. With teacher
    forcing, `context` `[B', C, F, H, W]` is the history at noise level `t_context` `[B']`; B is a
    multiple of B'. `r` `[B, F]` are the second times of a flow map, None for r = t; `target` is valid
    only where r = t. `conditions` `[B, ...]` are the model's conditions other than text, keyed by its argument names.
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
        """Yield `size` clips at a time, in order. Requires one noisy version per clip."""
        for start in range(0, len(self.target), size):
            yield self._each(operator.itemgetter(slice(start, start + size)))

    def to(self, device: torch.device | str) -> NoisedClips:
        """These clips on `device`."""
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
    """`copies` noisy versions of each clip in `latents` `[B, C, F, H, W]`, `text` `[B, L, D]`, `conditions`.

    `shift` warps the noise levels, which all lie in `noise_range`; with `levels`, they are drawn from that list.
    Without `clean_history`, every chunk sees the noisy history of its own copy. With `context_noise`, half of the
    clean histories carry noise up to that level, so that the model learns to correct its own errors. With
    `flow_map`, second times r are drawn too (`flow.mean_times`), after everything else. Everything is drawn on the CPU
    from `generator`, so that the draws do not depend on the device.
    """
    device = latents.device
    clips, chunks = latents.shape[0], causal.chunks(latents.shape[2])
    videos = latents.repeat(copies, 1, 1, 1, 1)
    noise = torch.randn(videos.shape, generator=generator).to(device)
    t = flow.chunk_times(len(videos), chunks, generator, shift, noise_range, levels).to(device)
    repeated = {name: x.repeat(copies, *(1,) * (x.ndim - 1)) for name, x in conditions.items()}
    x_t, target = flow.add_noise(videos, noise, t), flow.velocity(videos, noise)
    noised = NoisedClips(x_t, t, text.repeat(copies, 1, 1), target, conditions=repeated)
    if clean_history:
        noisy_history = torch.rand(clips, generator=generator) < 0.5
        t_context = (context_noise * torch.rand(clips, generator=generator) * noisy_history).to(device)
        context = flow.add_noise(latents, torch.randn(latents.shape, generator=generator).to(device), t_context)
        noised = noised._replace(context=context, t_context=t_context)
    return noised._replace(r=flow.mean_times(t, chunks, generator)) if flow_map else noised


def predict_velocity(model: Any, clips: NoisedClips) -> Tensor:
    """The velocity `[B, C, F, H, W]`, float32, of a causal model; inputs are cast to the model's dtype."""
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
    """The mean squared velocity error of `copies` noisy versions of each clip, given its clean history.

    Noise levels lie in the model's `noise_range`. A flow map is evaluated at r = t.
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
    """Yield `clips`, tensors `[N, ...]` by name, `size` clips at a time."""
    for start in range(0, len(clips["latents"]), size):
        yield {name: x[start : start + size] for name, x in clips.items()}


def noised_batches(
    model: Any, clips: Mapping[str, Tensor], batch_size: int, seed: int, levels: Sequence[float] | None = None
) -> Iterator[NoisedClips]:
    """Yield `noised_clips` of `batch_size` clips at a time, with one noise level per chunk, drawn from `seed`.

    Noise levels are all of the model's, or `levels`. The draws depend on `batch_size` through their order.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch in in_batches(clips, batch_size):
        latents, text = (batch[name] for name in CLIP)
        yield noised_clips(
            latents,
            text,
            model.causal,
            generator,
            noise_range=model.noise_range,
            levels=levels,
            conditions=conditions_of(batch),
        )


@torch.no_grad()
def flow_loss(
    model: Any,
    clips: Mapping[str, Tensor],
    seed: int = HELDOUT_SEED,
    batch_size: int = 32,
    forward_size: int | None = None,
    levels: Sequence[float] | None = None,
) -> float:
    """The teacher-forcing loss on `clips`, with noise from `seed`, so that models are comparable.

    `clips` holds `latents` `[N, C, F, H, W]`, `encoder_hidden_states` `[N, L, D]` and the model's other conditions.
    The loss depends on `batch_size` through the order of the draws. Noise levels are all of the model's, or
    `levels`. A forward takes `forward_size` clips of a batch, by default all of them.
    """
    losses, sizes = [], []
    for noised in noised_batches(model, clips, batch_size, seed, levels):
        for part in noised.split(forward_size or len(noised.x_t)):
            part = part.to(model.device)
            losses.append((predict_velocity(model, part) - part.target).square().mean().item())
            sizes.append(len(part.target))
    return float(np.average(losses, weights=sizes))
