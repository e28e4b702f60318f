"""Generates digit rollouts and checks whether each frame shows the prompted digit."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..mla.model import StreamingModel
from ..run.stream import stream_chunks
from ..zoo.digits.classifier import classify
from ..zoo.digits.data import FRAME, Prompt, all_prompts
from .config import EvaluateConfig


def chosen_prompts(count: int) -> list[Prompt]:
    """`count` held-out prompts in a fixed order: digits alternate, places and directions are shuffled."""
    pool = all_prompts("heldout")
    shuffled = [pool[i] for i in np.random.default_rng(0).permutation(len(pool))]
    by_digit = [[prompt for prompt in shuffled if prompt.digit == digit] for digit in range(10)]
    turns = [prompt for turn in itertools.zip_longest(*by_digit) for prompt in turn if prompt is not None]
    return [turns[i % len(turns)] for i in range(count)]


def heldout_prompts(count: int) -> tuple[Tensor, Tensor]:
    """Embeddings `[N, 3, 32]` and classes `[N]` of the prompts of `count` rollouts."""
    chosen = chosen_prompts(count)
    return torch.stack([p.embedding() for p in chosen]), torch.tensor([p.digit for p in chosen])


def digit_rollouts(
    model: StreamingModel,
    num_frames: int,
    config: EvaluateConfig,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Generate videos `[N, 1, F, 16, 16]` of held-out prompts; also return which frames show their class, `[N, F]`."""
    text, classes = heldout_prompts(config.rollout_prompts)
    chunks = []
    rollout = stream_chunks(
        model,
        text,
        num_frames,
        FRAME,
        FRAME,
        seed=config.seed,
        **config.sampling(),
    )
    for chunk in rollout:
        chunks.append(chunk.cpu())
        if progress is not None:
            progress(sum(c.shape[2] for c in chunks), num_frames)
    videos = torch.cat(chunks, dim=2)
    return videos, classify(videos) == classes.unsqueeze(1)
