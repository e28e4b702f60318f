"""Computes the image conditions of Wan's image-to-video models, as diffusers' `WanImageToVideoPipeline` does.

The latents are those of a video that begins with the image and is gray after it, with a mask that is 1 for the first
latent frame.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..distill.encode.begun import encode_begun
from ..distill.encode.frames import to_pixels
from ..errors import UsageError, UserError
from ..families.base import Config, noise_channels
from ..families.image import reads_image, refuse_last_image
from ..mla.image import IMAGE, TOKENS, with_mask

VIDEOS = (".mp4", ".gif", ".safetensors")


def check_image(config: Config, image: object, named: str, start: str) -> None:
    """Raise UsageError for an image with a model that reads none or two, and for a missing image.

    `named` and `start` are the names of the two options in messages.
    """
    refuse_last_image(config)
    if image is not None and not reads_image(config):
        raise UsageError(f"the model has no channels for {named}; use {start} to continue an image")
    if image is None and reads_image(config):
        raise UsageError(f"the model is conditioned on an image; give {named}")


def read_image(source: Path | Image.Image) -> Image.Image:
    """The picture in RGB. Raises UserError for a file that is not an image."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if source.is_dir():
        raise UserError(f"{source} is a folder; give an image file")
    if not source.is_file():
        raise UserError(f"{source} does not exist; give an image file")
    if source.suffix.lower() in VIDEOS:
        raise UsageError(f"{source} is not a single image; give a picture, such as a .png")
    try:
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise UserError(f"{source} cannot be read as an image: {reason}") from None


class ImageLatents:
    """The condition `image_latents` of one image: called with (first, stop), it returns `[1, c, stop - first, h, w]`.

    c is the sum of the mask's channels, one per video frame of a latent frame, and the VAE's. `frames` is the length of
    the video in latent frames, None if endless; only the frames that differ are encoded and kept. `height` and `width`
    are those of the latent; the image is resized to cover them and cropped to its center.
    """

    def __init__(self, vae: Any, image: Image.Image, height: int, width: int, frames: int | None) -> None:
        spatial = vae.config.scale_factor_spatial
        # The same resampling as in diffusers' `VideoProcessor`, so images of the video's proportions come out equal.
        fitted = ImageOps.fit(image, (width * spatial, height * spatial), method=Image.Resampling.LANCZOS)
        pixels = to_pixels(torch.from_numpy(np.array(fitted)[None])).unsqueeze(0)
        latents = encode_begun(vae, pixels, frames)
        self.latents = with_mask(latents, vae.config.scale_factor_temporal)

    def __call__(self, first: int, stop: int) -> Tensor:
        last = self.latents.shape[2] - 1
        return self.latents[:, :, [min(frame, last) for frame in range(first, stop)]]


def image_conditions(
    config: Config,
    image: Image.Image,
    vae: Any,
    height: int,
    width: int,
    frames: int | None,
    tokens: Tensor | None = None,
) -> dict[str, Any]:
    """The `conditions` of a rollout of `frames` latent frames (None if endless) of `height x width`.

    `tokens` `[1, L, D]` are the image's CLIP tokens (see `encode_image`), if the model of `config` reads them. Raises
    UserError for a VAE or tokens that do not fit the model.
    """
    wanted = int(config["in_channels"]) - noise_channels(config)
    found = vae.config.scale_factor_temporal + vae.config.z_dim
    if found != wanted:
        raise UserError(
            f"the model reads {wanted} channels of an image, but this VAE makes {found}; use the model's own VAE"
        )
    wide, wanted_wide = None if tokens is None else tokens.shape[2], config.get("image_dim")
    if tokens is None and wanted_wide is not None:
        raise UserError("the model reads the image's CLIP tokens; encode them with its image encoder")
    if wide != wanted_wide:
        raise UserError(
            f"the image's tokens have {wide} numbers, but the model reads {wanted_wide}; use the model's own encoder"
        )
    given: dict[str, Any] = {IMAGE: ImageLatents(vae, image, height, width, frames)}
    return given if tokens is None else {**given, TOKENS: tokens}
