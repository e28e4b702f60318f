"""Provides the calibration clips: training clips, or the teacher's own rollouts from their prompts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..convert import CalibrationBatch, clip_batches
from ..errors import UsageError
from ..files import atomic_file, save_tensors
from ..recipe.schema import Recipe
from ..run.sample import rollout
from .context import Context


def calibration_batches(context: Context, work: Path) -> Iterator[CalibrationBatch]:
    """Yield the first training clips, in the order of the data's split, in batches; each is read when it is needed.

    With `source: rollouts`, the teacher generates clips of the same size from the same prompts, sampled as
    in the `generate` section. This loads the whole teacher. The clips are stored in `work` and made once.
    """
    config = context.recipe.convert.calibration
    clips = config.clips if context.data.size is None else min(config.clips, context.data.size)
    negative = context.data.negative if calibration_reads_negative(context.recipe) else None
    for number, batch in enumerate(clip_batches(context.data.example, range(clips), config.batch_size, negative)):
        if config.source == "rollouts":
            latents = _rolled_out(context, work / f"rollout-{number:05d}.safetensors", batch, number)
            batch = batch._replace(latents=latents)
            context.report("roll out", number + 1, math.ceil(clips / config.batch_size))
        yield batch


def calibration_reads_negative(recipe: Recipe) -> bool:
    """Whether calibration needs the data's negative prompt, for guidance or for empty prompts."""
    config = recipe.convert.calibration
    guided = config.source == "rollouts" and recipe.generate.guidance_scale != 1
    return recipe.convert.init == "activation" and (guided or config.empty_prompt_rate > 0)


def _rolled_out(context: Context, path: Path, batch: CalibrationBatch, number: int) -> Tensor:
    """Clips `[B, C, F, H, W]` that replace those of the batch: read from `path`, or generated and stored there."""
    if not path.is_file():
        generate, teacher = context.recipe.generate, context.dense().to(context.device)
        if teacher.causal.window_frames is None:
            raise UsageError("convert.calibration.source: rollouts needs a finite window; set causal.window_frames")
        context.recipe.streaming.dense.apply(teacher)
        frames, height, width = batch.latents.shape[2:]
        size = {"num_frames": frames, "latent_height": height, "latent_width": width}
        same_size = generate.model_copy(update={**size, "seed": generate.seed + number, "start": None, "source": None})
        negative = None if batch.negative is None else batch.negative.unsqueeze(0)
        text, conditions = batch.encoder_hidden_states, batch.conditions
        chunks = rollout(teacher, text, same_size, negative_hidden_states=negative, conditions=conditions)
        latents = torch.cat([chunk.cpu() for chunk in chunks], dim=2)
        with atomic_file(path) as temporary:
            save_tensors({"latents": latents}, temporary)
    return load_file(path)["latents"].clone()
