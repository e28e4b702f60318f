"""Samples of every layer of a dense model, gathered while it runs on noisy copies of calibration clips."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import flow
from ..mla.attention import DenseSelfAttention
from .config import CalibrationConfig
from .probe import LayerSample, join_samples, sample_layer


class CalibrationBatch(NamedTuple):
    """Clean latents `[B, C, F, H, W]` and `encoder_hidden_states` `[B, L, text_dim]`."""

    latents: Tensor
    encoder_hidden_states: Tensor


@dataclass
class _Recorder:
    layer: DenseSelfAttention
    config: CalibrationConfig
    history_only: bool
    generator: torch.Generator
    tokens_a_pass: int
    parts: list[LayerSample] = field(default_factory=list)

    def __call__(self, module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        hidden_states, _, _, step = args
        self.parts.append(
            sample_layer(
                self.layer, hidden_states, step, self.config, self.history_only, self.tokens_a_pass, self.generator
            )
        )


@torch.no_grad()
def calibrate(
    model: Any,
    batches: Iterable[CalibrationBatch],
    config: CalibrationConfig,
    history_only: bool,
    progress: Callable[[int], None] | None = None,
) -> list[LayerSample]:
    """Run a dense causal `model` on noisy copies of the clips and sample every layer.

    Noise levels are uniform, one a chunk; history is the clean clip. With `history_only` the probes
    ask only about tokens of earlier chunks, which is all that an exact own chunk leaves to the cache.
    Raises UserError for NaN or infinite activations.
    """
    generator = torch.Generator().manual_seed(config.seed)
    passes = max(1, -(-config.clips // config.batch_size))
    recorders = [
        _Recorder(block.attn1, config, history_only, generator, max(1, config.max_tokens // passes))
        for block in model.blocks
    ]
    hooks = [recorder.layer.register_forward_pre_hook(recorder) for recorder in recorders]
    try:
        for index, batch in enumerate(batches):
            clean = batch.latents.to(model.device, torch.float32)
            t = flow.chunk_times(len(clean), model.causal.chunks(clean.shape[2]), generator)
            noise = torch.randn(clean.shape, generator=generator)
            text = flow.drop_prompts(batch.encoder_hidden_states, config.empty_prompt_rate, generator)
            model(
                flow.add_noise(clean, noise, t).to(model.dtype),
                t * flow.NUM_TRAIN_TIMESTEPS,
                text.to(model.device, model.dtype),
                context=clean.to(model.dtype),
            )
            if progress is not None:
                progress(index + 1)
    finally:
        for hook in hooks:
            hook.remove()
    return [join_samples(recorder.parts, index) for index, recorder in enumerate(recorders)]
