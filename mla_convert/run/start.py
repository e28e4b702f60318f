"""Reads the clean beginning of a rollout from a file: latents, or pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..distill.encode.frames import to_pixels
from ..distill.encode.models import encode_pixels
from ..errors import UsageError, UserError, few

LATENTS, LATENTS_KEY = ".safetensors", "latents"


def read_start(path: Path | Sequence[Image.Image], channels: int, height: int, width: int, vae: Any = None) -> Tensor:
    """Clean latents `[C, F0, H, W]`, float32, that begin a rollout, from a file or from pictures.

    A `.safetensors` file holds them under `latents`. For a pixel-space model, with 1 or 3 channels in [-1, 1], the file
    can be an image, a GIF or an mp4. Its frames are averaged down, or enlarged, to `height x width`, which reverses the
    enlargement of `save_video`. A GIF lacks frames that repeat the one before. For a model of latents, the `vae`
    encodes the pictures, resized to cover the video and cropped to their center. Raises UserError for a file that
    cannot be read, and UsageError for pictures without a VAE, or of a number that the VAE does not accept.
    """
    if isinstance(path, Path):
        if path.is_dir():
            raise UserError(f"{path} is a folder; give a start file")
        if not path.is_file():
            raise UserError(f"{path} does not exist; give a start file")
        if path.suffix == LATENTS:
            return read_latents(path, "start")
    if vae is not None:
        return _encoded(path, height, width, vae)
    if channels not in (1, 3):
        raise UsageError(f"{_named(path)}: the model works on latents; encode the picture and give a {LATENTS} file")
    return boxed_pixels(torch.stack([boxed(picture, channels, height, width) for picture in read_pictures(path)]))


def boxed(picture: Image.Image, channels: int, height: int, width: int) -> Tensor:
    """A picture averaged down, or enlarged, to uint8 `[height, width, channels]`, of 1 or 3 channels."""
    mode = "L" if channels == 1 else "RGB"
    small = np.array(picture.convert(mode).resize((width, height), Image.Resampling.BOX))
    return torch.from_numpy(small).view(height, width, channels)


def boxed_pixels(frames: Tensor) -> Tensor:
    """uint8 frames `[F, H, W, C]` as pixels `[C, F, H, W]` in [-1, 1] for a pixel-space model."""
    return (2 * frames.float() / 255 - 1).permute(3, 0, 1, 2).contiguous()


def fitted(picture: Image.Image, height: int, width: int) -> Tensor:
    """A picture resized to cover `height x width` and cropped to its center, uint8 `[height, width, 3]`."""
    return torch.from_numpy(np.array(ImageOps.fit(picture.convert("RGB"), (width, height))))


def _named(source: Path | Sequence[Image.Image]) -> str:
    return str(source) if isinstance(source, Path) else "the start"


def _encoded(path: Path | Sequence[Image.Image], height: int, width: int, vae: Any) -> Tensor:
    temporal, spatial = vae.config.scale_factor_temporal, vae.config.scale_factor_spatial
    frames = [fitted(picture, height * spatial, width * spatial) for picture in read_pictures(path)]
    if (len(frames) - 1) % temporal:
        below = len(frames) - (len(frames) - 1) % temporal
        raise UsageError(
            f"{_named(path)} has {len(frames)} frames, but the VAE takes one and then {temporal} at a time; "
            f"give {below} or {below + temporal}"
        )
    return encode_pixels(vae, to_pixels(torch.stack(frames)).unsqueeze(0))[0].cpu()


def read_latents(path: Path, what: str) -> Tensor:
    """The tensor `latents` `[C, F, H, W]` of a file, float32. Raises UserError; `what` is the file's role in it."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if LATENTS_KEY not in tensors or tensors[LATENTS_KEY].ndim != 4:
        shapes = (
            few(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())) if tensors else "nothing"
        )
        raise UserError(f"{path} holds {shapes}; a {what} must be the tensor {LATENTS_KEY} [C, F, H, W]")
    return tensors[LATENTS_KEY].float()


def read_pictures(path: Path | Sequence[Image.Image]) -> Iterator[Image.Image]:
    """Yield the frames of an image or a video. Raises UserError for a file that cannot be read."""
    if not isinstance(path, Path):
        yield from path
        return
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
        raise UserError(f"{path} cannot be read as an image or a video: {reason}") from None
