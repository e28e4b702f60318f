"""Calibration clips on their way through the blocks of a dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import default_collate

from .. import flow
from ..draws import Use, drawn
from ..errors import UserError
from ..families.base import BlockInputs
from ..mla.conditions import conditions_of, placed
from .blocks import Blocks
from .config import CalibrationConfig
from .store import TensorStore


class CalibrationBatch(NamedTuple):
    """Clean latents `[B, C, F, H, W]` and `encoder_hidden_states` `[B, L, text_dim]`.

    `negative` `[L, text_dim]` is what clips get that lose their prompt, zeros without it. `conditions` `[B, ...]` are
    what the model is conditioned on beside text, under the names by which it takes them.
    """

    latents: Tensor
    encoder_hidden_states: Tensor
    negative: Tensor | None = None
    conditions: Mapping[str, Tensor] = MappingProxyType({})


def clip_batches(
    read: Callable[[int], Mapping[str, Tensor]], clips: range, size: int, negative: Tensor | None = None
) -> Iterator[CalibrationBatch]:
    """The `clips` that `read` gives by index, `size` of them at a time; none is read before its batch is asked for.

    A clip has `latents` `[C, F, H, W]`, `encoder_hidden_states` `[L, text_dim]` and its conditions; `negative` is
    that of all.
    """
    for start in range(0, len(clips), size):
        batch = default_collate([read(index) for index in clips[start : start + size]])
        yield CalibrationBatch(batch["latents"], batch["encoder_hidden_states"], negative, conditions_of(batch))


@dataclass
class Clips:
    """The calibration batches between blocks.

    `inputs` are theirs without the tokens, which lie in `store` by layer and batch: `[B' + B, S, C]`
    in the model's dtype, the B' clean clips before their B noisy copies. `targets` `[B, C, F, H, W]`
    are the true velocities, `times` the noise levels t and the second times r of a flow map, `[B, F]`.
    """

    store: TensorStore
    targets: list[Tensor] = field(default_factory=list)
    inputs: list[BlockInputs] = field(default_factory=list)
    times: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    bytes_a_layer: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def loss(self, number: int, velocity: Tensor) -> float:
        """Flow-matching loss of the model's velocity `[B, C, F, H, W]` on batch `number`."""
        return float(flow.velocity_error(velocity.float(), self.targets[number], *self.times[number]))

    @staticmethod
    def key(layer: int, number: int, probe: int = 0) -> str:
        """Name of the tokens of batch `number` as they enter block `layer`, or of a probe's gradient in them."""
        return f"{layer:04d}-{number:05d}" + (f"-{probe:03d}" if probe else "")

    def advance(self, layer: int, number: int, tokens: Tensor, keep: bool = False) -> None:
        """Store what block `layer` made of a batch; what entered it goes, unless it is to be kept."""
        if not keep:
            self.store.pop(self.key(layer, number))
        self.store[self.key(layer + 1, number)] = tokens


@torch.no_grad()
def enter_clips(
    blocks: Blocks, batches: Iterable[CalibrationBatch], config: CalibrationConfig, store: TensorStore
) -> Clips:
    """Noisy copies of the clips as the first block gets them.

    Noise levels are uniform over the model's `noise_range` before the shift, or over those of the `denoising_steps`,
    one a chunk; history is the clean clip (teacher forcing, see `distill.objective`). A flow map gets second times
    too (`flow.mean_times`). Raises UserError if there are no clips.
    """
    model, clips = blocks.model, Clips(store)
    for number, batch in enumerate(batches):
        generator = drawn(Use.CALIBRATION_NOISE, config.seed, number)
        clean = batch.latents.to(model.device, torch.float32)
        chunks = model.causal.chunks(clean.shape[2])
        drawn_times = flow.chunk_times(
            len(clean), chunks, generator, config.timestep_shift, model.noise_range, config.noise_levels
        )
        t = drawn_times.to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        text = flow.drop_prompts(batch.encoder_hidden_states, config.empty_prompt_rate, generator, batch.negative)
        r = flow.mean_times(t, chunks, generator) if model.flow_map else None
        conditions = placed([batch.conditions], model.device, model.dtype)
        if r is not None:
            conditions["r_timestep"] = r * flow.NUM_TRAIN_TIMESTEPS
        inputs = model.enter(
            flow.add_noise(clean, noise, t).to(model.dtype),
            t * flow.NUM_TRAIN_TIMESTEPS,
            text.to(model.device, model.dtype),
            context=clean.to(model.dtype),
            **conditions,
        )
        # The rotations of a pass are large and the same for equal clips.
        kind = (inputs.size, inputs.step.context_batch)
        same = (i.step for i in clips.inputs if (i.size, i.step.context_batch) == kind)
        tokens = inputs.tokens
        clips.store[clips.key(0, number)] = tokens
        clips.targets.append(flow.velocity(clean, noise))
        clips.times.append((t, r))
        clips.bytes_a_layer += tokens.numel() * tokens.element_size()
        clips.inputs.append(inputs._replace(tokens=tokens.new_empty(0), step=next(same, inputs.step)))
    if not clips.inputs:
        raise UserError("there are no clips to calibrate on; init: svd converts from the weights alone")
    return clips
