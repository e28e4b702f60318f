"""Converts chunks and whole videos to the output types of diffusers' pipelines."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..finite import all_finite

OutputType = Literal["np", "pt", "pil", "latent"]
Frames = Any


@dataclass
class StreamingPipelineOutput(BaseOutput):
    """The output of `StreamingMLAPipeline`.

    `frames` of a batch are float32 `[B, F, H, W, 3]` for `np` and `[B, F, 3, H, W]` for `pt`, both in [0, 1]; for `pil`
    a list of images per item; for `latent` `[B, C, F, h, w]`.
    """

    frames: Frames


def to_output(pixels: Tensor, output_type: OutputType) -> Tensor:
    """Pixels `[B, C, F, H, W]` in [-1, 1] in the form that `handed_out` takes. Raises UserError for NaN or Inf."""
    if not all_finite(pixels):
        raise UserError("the video contains NaN or Inf; the model diverged, or its dtype is too narrow (try float32)")
    # Computed on the device, with the same bits as diffusers' `VideoProcessor` on the CPU.
    frames = (pixels.float() * 0.5 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1, -1).transpose(1, 2)
    if output_type == "pil":
        frames = (frames * 255).round().to(torch.uint8)
    return (frames if output_type == "pt" else frames.movedim(2, 4)).contiguous().cpu()


def handed_out(chunks: Generator[Tensor], output_type: OutputType) -> Iterator[Frames]:
    """Yield chunks in the output type, converted in the caller's thread."""
    with contextlib.closing(chunks):
        for chunk in chunks:
            if output_type == "np":
                yield chunk.numpy()
            elif output_type == "pil":
                yield [[Image.fromarray(frame) for frame in video] for video in chunk.numpy()]
            else:
                yield chunk


def joined(chunks: Sequence[Frames], output_type: OutputType) -> Frames:
    """All chunks of a video concatenated."""
    if output_type == "pil":
        return [[image for part in parts for image in part] for parts in zip(*chunks, strict=True)]
    if output_type == "np":
        return np.concatenate(chunks, axis=1)
    return torch.cat(list(chunks), dim=2 if output_type == "latent" else 1)
