"""Turn calibration clips into the inputs of a dense model's first block, and track them from block to block."""

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

    `negative` `[L, text_dim]` replaces the prompt of clips that drop theirs; the default is zeros. `conditions`
    `[B, ...]` are what else the model is conditioned on, by the model's argument names.
    """

    latents: Tensor
    encoder_hidden_states: Tensor
    negative: Tensor | None = None
    conditions: Mapping[str, Tensor] = MappingProxyType({})


def clip_batches(
    read: Callable[[int], Mapping[str, Tensor]], clips: range, size: int, negative: Tensor | None = None
) -> Iterator[CalibrationBatch]:
    """Yield batches of `size` clips; `read` returns a clip by index and is called only when its batch is due.

    A clip has `latents` `[C, F, H, W]`, `encoder_hidden_states` `[L, text_dim]` and its conditions. All batches get the
    same `negative`.
    """
    for start in range(0, len(clips), size):
        batch = default_collate([read(index) for index in clips[start : start + size]])
        yield CalibrationBatch(batch["latents"], batch["encoder_hidden_states"], negative, conditions_of(batch))


@dataclass
class Clips:
    """The calibration batches between two blocks.

    `inputs` are the block inputs of each batch without its tokens. The tokens are in `store` by layer and batch:
    `[B' + B, S, C]` in the model's dtype, the B' clean clips before their B noisy copies. `targets` `[B, C, F, H, W]`
    are the true velocities. `times` are the noise levels t and, for a flow map, the second times r, `[B, F]` each.
    """

    store: TensorStore
    targets: list[Tensor] = field(default_factory=list)
    inputs: list[BlockInputs] = field(default_factory=list)
    times: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    bytes_a_layer: int = 0

    def __len__(self) -> int:
        return len(self.inputs)

    def loss(self, number: int, velocity: Tensor) -> float:
        """Compute the flow-matching loss of the model's velocity `[B, C, F, H, W]` on batch `number`."""
        return float(flow.velocity_error(velocity.float(), self.targets[number], *self.times[number]))

    @staticmethod
    def key(layer: int, number: int, probe: int = 0) -> str:
        """The store's key of batch `number` at the input of block `layer`, or of a probe's gradient there.

        The gradient of probe 0 replaces the tokens under their own key.
        """
        return f"{layer:04d}-{number:05d}" + (f"-{probe:03d}" if probe else "")

    def advance(self, layer: int, number: int, tokens: Tensor, keep: bool = False) -> None:
        """Store the output of block `layer` for a batch; its input is dropped unless `keep`."""
        if not keep:
            self.store.pop(self.key(layer, number))
        self.store[self.key(layer + 1, number)] = tokens


@torch.no_grad()
def enter_clips(
    blocks: Blocks, batches: Iterable[CalibrationBatch], config: CalibrationConfig, store: TensorStore
) -> Clips:
    """Noise the clips and embed them as inputs of the first block.

    Each chunk has its own noise level, uniform over the model's `noise_range` before the shift, or over the
    `denoising_steps`. History is the clip at noise level `context_noise` (teacher forcing, see `distill.objective`). A
    flow map also gets second times (`flow.mean_times`). Raises UserError if there are no clips.
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
        context_noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        t_context = torch.full((len(clean),), config.context_noise, device=clean.device)
        conditions = placed([batch.conditions], model.device, model.dtype)
        if r is not None:
            conditions["r_timestep"] = r * flow.NUM_TRAIN_TIMESTEPS
        inputs = model.enter(
            flow.add_noise(clean, noise, t).to(model.dtype),
            t * flow.NUM_TRAIN_TIMESTEPS,
            text.to(model.device, model.dtype),
            context=flow.add_noise(clean, context_noise, t_context).to(model.dtype),
            context_timestep=t_context * flow.NUM_TRAIN_TIMESTEPS,
            **conditions,
        )
        # The rotations of a pass are large; clips of equal shape share them.
        kind = (inputs.size, inputs.step.context_batch)
        same = (i.step for i in clips.inputs if (i.size, i.step.context_batch) == kind)
        tokens = inputs.tokens
        clips.store[clips.key(0, number)] = tokens
        clips.targets.append(flow.velocity(clean, noise))
        clips.times.append((t, r))
        clips.bytes_a_layer += tokens.numel() * tokens.element_size()
        clips.inputs.append(inputs._replace(tokens=tokens.new_empty(0), step=next(same, inputs.step)))
    if not clips.inputs:
        raise UserError("there are no clips to calibrate on; add clips, or set init: svd to use the weights alone")
    return clips
