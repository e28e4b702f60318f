"""Defines the settings of an encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..negative import WAN_NEGATIVE_PROMPT


@dataclass(frozen=True)
class EncodeConfig:
    """Settings of an encoding; `model` is a folder or Hub ID of a Wan pipeline in diffusers layout, at `revision`.

    The first `frames` frames of every video are encoded, at `fps` frames per second and `height` x `width` pixels,
    `batch_size` videos at once and `shard_size` per file. The text encoder runs in `dtype`, and everything is
    stored in it; the VAE runs in float32. `latents` are stored `normalized`, as a transformer takes them, or `raw`,
    as the VAE returns them. The embedding of `negative_prompt` is written beside them. With `image_condition`, the
    shards also hold what an image-to-video model reads of the first frame of each video: its CLIP tokens, if the
    pipeline has an image encoder, and the latents of that frame followed by gray frames.
    """

    model: str
    revision: str | None = None
    frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    batch_size: int = 1
    shard_size: int = 64
    negative_prompt: str = WAN_NEGATIVE_PROMPT
    latents: Literal["normalized", "raw"] = "normalized"
    image_condition: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]
