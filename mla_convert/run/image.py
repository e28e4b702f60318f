"""The image that Wan's image-to-video models are conditioned on, as diffusers' `WanImageToVideoPipeline` makes it.

Its latents are those of a video that begins with the image and is grey after it, under a mask of ones for the first
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
from ..families.image import IMAGE, TOKENS, reads_image, refuse_last_image, with_mask

VIDEOS = (".mp4", ".gif", ".safetensors")


def check_image(config: Config, image: object, named: str, start: str) -> None:
    """Raise UsageError for an image where a model reads none or two, and for none where it does.

    `named` and `start` are what the two options are called.
    """
    refuse_last_image(config)
    if image is not None and not reads_image(config):
        raise UsageError(f"the model has no channels for {named}; {start} continues an image with this model")
    if image is None and reads_image(config):
        raise UsageError(f"the model is conditioned on an image; give {named}")


def read_image(source: Path | Image.Image) -> Image.Image:
    """A picture in RGB. Raises UserError for a file that is none."""
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    if not source.is_file():
        raise UserError(f"{source} does not exist; an image is a file")
    if source.suffix.lower() in VIDEOS:
        raise UsageError(f"{source} is no single image; give a picture, such as a .png")
    try:
        with Image.open(source) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        reason = (str(error).strip().splitlines() or ["unknown"])[0]
        raise UserError(f"{source} is no image that can be read: {reason}") from None


class ImageLatents:
    """The condition `image_latents` of one image: called with (first, stop) it gives `[1, c, stop - first, h, w]`.

    c are the mask's channels, as many as video frames to a latent one, and those of the VAE. `frames` is the length
    of the video in latent frames, None for one without end; no more of them are encoded, and kept, than differ.
    `height` and `width` are the latent's; the image is resized until it covers them, then cut to its centre.
    """

    def __init__(self, vae: Any, image: Image.Image, height: int, width: int, frames: int | None) -> None:
        spatial = vae.config.scale_factor_spatial
        # The resampling of diffusers' `VideoProcessor`; an image of the video's proportions is made the same.
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
    """The `conditions` of a rollout of `frames` latent frames of `height x width`, None for one without end.

    `tokens` `[1, L, D]` are the image's CLIP tokens where the model of `config` reads them, see `encode_image`.
    Raises UserError for a VAE or tokens that are not the model's.
    """
    taken = int(config["in_channels"]) - noise_channels(config)
    made = vae.config.scale_factor_temporal + vae.config.z_dim
    if taken != made:
        raise UserError(f"the model reads {taken} channels beside the latent, this VAE makes {made} of an image")
    width_of, wanted = None if tokens is None else tokens.shape[2], config.get("image_dim")
    if tokens is None and wanted is not None:
        raise UserError("the model reads the image's CLIP tokens; give those that its image encoder makes")
    if width_of != wanted:
        raise UserError(f"the image's tokens have {width_of} numbers, the model reads {wanted}; give its own encoder's")
    given: dict[str, Any] = {IMAGE: ImageLatents(vae, image, height, width, frames)}
    return given if tokens is None else {**given, TOKENS: tokens}
