"""Draws the rollout strip that a stage shows while it trains: one row per prompt, frames from left to right."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..distill.data import Batch
from ..distill.keys import PreviewConfig
from ..families.causal import CausalTransformer
from ..mla.conditions import conditions_of
from ..run.stream import stream_chunks
from ..run.video import scale_factor, to_frames

MAX_FRAMES = 16
_MIN_PIXELS, _GAP = 64, 2


def preview_strip(
    student: CausalTransformer, config: PreviewConfig, heldout: Batch, negative: Tensor | None = None
) -> NDArray[np.uint8]:
    """Roll out `student` for the first held-out prompts; returns a uint8 picture `[H, W, 3]`.

    `negative` `[L, D]` is the negative prompt of guidance. At most 16 frames are shown, evenly spaced. Of VAE
    latents, the first three channels are shown.
    """
    text = heldout["encoder_hidden_states"][: config.clips].to(student.device)
    frames, height, width = heldout["latents"].shape[2:]
    chunks = stream_chunks(
        student,
        text,
        config.num_frames or frames,
        height,
        width,
        seed=config.seed,
        negative_hidden_states=None if negative is None else negative.unsqueeze(0).to(text),
        conditions={name: x[: config.clips] for name, x in conditions_of(heldout).items()},
        **config.sampling(),
    )
    return as_strip(torch.cat([chunk.cpu() for chunk in chunks], dim=2))


def as_strip(videos: Tensor) -> NDArray[np.uint8]:
    """Arrange videos `[B, C, F, H, W]` in one uint8 picture `[H, W, 3]`; values that are not finite become black."""
    shown = torch.linspace(0, videos.shape[2] - 1, min(MAX_FRAMES, videos.shape[2])).round().long()
    videos = videos[:, :, shown].nan_to_num(-1, -1, -1)
    if videos.shape[1] not in (1, 3):
        videos = videos[:, [0, 1, min(2, videos.shape[1] - 1)]]
        videos = videos / videos.abs().amax(dim=(1, 2, 3, 4), keepdim=True).clamp_min(1e-8)
    factor = scale_factor(videos.shape[3], videos.shape[4], _MIN_PIXELS)
    rows = []
    for video in videos:
        frames = to_frames(video).repeat(factor, axis=1).repeat(factor, axis=2)
        padded = np.pad(frames, ((0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=1.0)
        rows.append(np.concatenate(list(padded), axis=1))
    strip = np.concatenate(rows, axis=0)[:-_GAP, :-_GAP]
    return np.asarray((strip * 255).round(), dtype=np.uint8)
