"""Clips to calibrate on: training clips, or what the teacher makes of their prompts itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import default_collate

from ..convert import CalibrationBatch
from ..errors import UsageError
from ..files import atomic_file, save_tensors
from ..run.stream import stream_chunks
from .context import Context


def calibration_batches(context: Context, work: Path) -> Iterator[CalibrationBatch]:
    """The first training clips in batches; nothing is read before the first is asked for.

    With `source: rollouts` the teacher, which is read whole for that, makes clips of their size
    from their prompts as the `generate` section samples. They are kept in `work` and made once.
    """
    config = context.recipe.convert.calibration
    clips = config.clips if context.data.size is None else min(config.clips, context.data.size)
    starts = range(0, clips, config.batch_size)
    for number, start in enumerate(starts):
        examples = [context.data.example(i) for i in range(start, min(start + config.batch_size, clips))]
        batch = default_collate(examples)
        latents, text = batch["latents"], batch["encoder_hidden_states"]
        if config.source == "rollouts":
            latents = _rolled_out(context, work / f"rollout-{number:05d}.safetensors", latents.shape, text, number)
            context.report("roll out", number + 1, len(starts))
        yield CalibrationBatch(latents, text)


def _rolled_out(context: Context, path: Path, size: torch.Size, text: Tensor, number: int) -> Tensor:
    """Clips `[B, C, F, H, W]` of the teacher, from `path` if they lie there."""
    if not path.is_file():
        generate, teacher = context.recipe.generate, context.dense().to(context.device)
        if teacher.causal.window_frames is None:
            raise UsageError("convert.calibration.source: rollouts needs a finite window; set causal.window_frames")
        frames, height, width = size[2:]
        chunks = stream_chunks(
            teacher,
            text,
            frames,
            height,
            width,
            num_inference_steps=generate.num_inference_steps,
            shift=generate.shift,
            context_noise=generate.context_noise,
            seed=generate.seed + number,
            guidance_scale=generate.guidance_scale,
        )
        latents = torch.cat([chunk.cpu() for chunk in chunks], dim=2)
        with atomic_file(path) as temporary:
            save_tensors({"latents": latents}, temporary)
    return load_file(path)["latents"].clone()
