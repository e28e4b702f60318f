"""What can be chosen about an encoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ..negative import WAN_NEGATIVE_PROMPT


@dataclass(frozen=True)
class EncodeConfig:
    """`model` is a folder or a Hub id of a Wan pipeline in diffusers' layout, at `revision`.

    Of every video the first `frames` at `fps` a second, `height` x `width` pixels, are encoded;
    `batch_size` at once, `shard_size` in a file. The text encoder runs in `dtype`, and everything is
    stored in it; the VAE runs in float32. `latents` are stored `normalised`, as a transformer takes them, or `raw`,
    as the VAE gives them. The embedding of `negative_prompt` is written beside them. With `image_condition` so is what
    an image-to-video model reads of the first frame of each video: its CLIP tokens where the pipeline has an image
    encoder, and its latents, with those of the grey frames after it.
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
    latents: Literal["normalised", "raw"] = "normalised"
    image_condition: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[self.dtype]
