"""The clean beginning of a rollout from a file: latents, or pictures for a model of pixels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageSequence, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UsageError, UserError

LATENTS, LATENTS_KEY = ".safetensors", "latents"


def read_start(path: Path, channels: int, height: int, width: int) -> Tensor:
    """Clean latents `[C, F0, H, W]`, float32, to begin a rollout with.

    A `.safetensors` file holds them under `latents`. For pixels, of 1 or 3 channels in [-1, 1], an
    image, a GIF or an mp4 will do: its frames are averaged down, or enlarged, to `height x width`,
    which undoes the enlargement of `save_video`. A GIF has lost the frames that repeat the one before.
    Raises UserError for a file that cannot be read, UsageError for pictures where the model works on
    latents.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist; --start takes a file")
    if path.suffix == LATENTS:
        return _read_latents(path)
    if channels not in (1, 3):
        raise UsageError(f"{path}: the model works on latents; encode the picture and give a {LATENTS} file")
    mode = "L" if channels == 1 else "RGB"
    frames = [
        np.asarray(picture.convert(mode).resize((width, height), Image.Resampling.BOX)) for picture in _pictures(path)
    ]
    pixels = torch.from_numpy(np.stack(frames)).float().view(len(frames), height, width, channels)
    return (2 * pixels / 255 - 1).permute(3, 0, 1, 2).contiguous()


def _read_latents(path: Path) -> Tensor:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if LATENTS_KEY not in tensors or tensors[LATENTS_KEY].ndim != 4:
        shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())) or "nothing"
        raise UserError(f"{path} holds {shapes}; a start is the tensor {LATENTS_KEY} [C, F, H, W]")
    return tensors[LATENTS_KEY].float()


def _pictures(path: Path) -> Iterator[Image.Image]:
    """The frames of an image or a video. Raises UserError."""
    try:
        if path.suffix.lower() == ".mp4":
            frames = imageio_ffmpeg.read_frames(str(path))
            size = next(frames)["size"]
            yield from (Image.frombytes("RGB", size, frame) for frame in frames)
        else:
            with Image.open(path) as image:
                yield from ImageSequence.Iterator(image)
    except (OSError, RuntimeError, UnidentifiedImageError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise UserError(f"{path} is neither an image nor a video that can be read: {reason}") from None
