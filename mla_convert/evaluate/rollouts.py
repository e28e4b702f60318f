"""Generated digits of teacher and student: are they the digits that the prompts asked for?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..run.stream import stream_chunks
from ..zoo.digits.classifier import classify
from ..zoo.digits.data import CLIP_FRAMES, FRAME, all_prompts
from .config import EvaluateConfig


def heldout_prompts(count: int) -> tuple[Tensor, Tensor]:
    """Embeddings `[N, 3, 32]` and classes `[N]` of `count` rollouts, the held-out prompts in turn."""
    pool = all_prompts("heldout")
    chosen = [pool[i % len(pool)] for i in range(count)]
    return torch.stack([p.embedding() for p in chosen]), torch.tensor([p.digit for p in chosen])


def digit_rollouts(
    model: Any,
    num_frames: int,
    config: EvaluateConfig,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Videos `[N, 1, F, 16, 16]` of held-out prompts and whether each frame shows its class, bool `[N, F]`."""
    text, classes = heldout_prompts(config.rollout_prompts)
    chunks = []
    rollout = stream_chunks(
        model,
        text,
        num_frames,
        FRAME,
        FRAME,
        num_inference_steps=config.num_inference_steps,
        shift=config.shift,
        seed=config.seed,
        guidance_scale=config.guidance_scale,
    )
    for chunk in rollout:
        chunks.append(chunk.cpu())
        if progress is not None:
            progress(sum(c.shape[2] for c in chunks), num_frames)
    videos = torch.cat(chunks, dim=2)
    return videos, classify(videos) == classes.unsqueeze(1)


def rollout_lengths(long_factor: int) -> dict[str, int]:
    """Frames of the rollouts by name: the training length, and `long_factor` times it."""
    lengths = {"1x": CLIP_FRAMES}
    if long_factor > 1:
        lengths[f"{long_factor}x"] = long_factor * CLIP_FRAMES
    return lengths
