"""The image that Wan's image-to-video models are conditioned on, as diffusers' `WanImageToVideoPipeline` makes it.

Its latents are those of a video that begins with the image and is grey after it, under a mask of ones for the first
latent frame. The encoder of the VAE is causal and sees finitely far back: some frames after the image all latents are
the same, and a video of any length needs no more than those before, 30 of Wan's VAEs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..devices import bring_weights
from ..distill.encode.frames import to_pixels
from ..errors import UsageError, UserError
from ..families.base import Config, noise_channels

IMAGE, TOKENS = "image_latents", "encoder_hidden_states_image"
VIDEOS = (".mp4", ".gif", ".safetensors")


def reads_image(config: Config) -> bool:
    """Whether a transformer's configuration has channels for an image beside its noise."""
    return int(config.get("in_channels") or noise_channels(config)) > noise_channels(config)


def reads_tokens(config: Config) -> bool:
    """Whether it reads the image's CLIP tokens too, as Wan2.1's do."""
    return config.get("image_dim") is not None


def check_image(config: Config, image: object, named: str, start: str) -> None:
    """Raise UsageError for an image where a model reads none or two, and for none where it does.

    `named` and `start` are what the two options are called.
    """
    if config.get("pos_embed_seq_len") is not None:
        raise UsageError("the model reads a first and a last image, and a stream does not know where it ends")
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
        mask = latents.new_zeros(1, vae.config.scale_factor_temporal, *latents.shape[2:])
        mask[:, :, 0] = 1
        self.latents = torch.cat([mask, latents], dim=1)

    def __call__(self, first: int, stop: int) -> Tensor:
        last = self.latents.shape[2] - 1
        return self.latents[:, :, [min(frame, last) for frame in range(first, stop)]]


@torch.no_grad()
def encode_begun(vae: Any, pixels: Tensor, frames: int | None) -> Tensor:
    """Latents `[1, C, f, h, w]`, float32, of a video that begins with `pixels` `[1, 3, 1, H, W]` and is 0 after them.

    They are what `vae.encode` gives for `frames` latent frames, normalised as a transformer takes them, up to the
    first after which all are the same. One latent frame is encoded at a time, with the features of those before, and
    the VAE is left as it was.
    """
    bring_weights(vae)
    mean, std = (
        torch.tensor(vae.config[key], device=vae.device).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.encoder.modules())
    # A convolution in time looks two frames back, so that no more latents than this can differ on any device.
    longest = 2 * convolutions + 2
    features: list[Any] = [None] * convolutions
    given = pixels.to(vae.device, vae.dtype)
    grey = torch.zeros_like(given).expand(-1, -1, vae.config.scale_factor_temporal, -1, -1)
    made: list[Tensor] = []
    # The same algorithm at every call, so that what is the same is so to the bit.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        while len(made) < min(longest, frames or longest):
            before = list(features)
            encoded = vae.encoder(_patches(vae, grey if made else given), feat_cache=features, feat_idx=[0])
            mode = vae.quant_conv(encoded).float().chunk(2, dim=1)[0]
            made.append((mode - mean) * (1.0 / std))
            if len(made) > 1 and all(_same(a, b) for a, b in zip(before, features, strict=True)):
                break
    return torch.cat(made, dim=2)


def _patches(vae: Any, pixels: Tensor) -> Tensor:
    if vae.config.patch_size is None:
        return pixels
    patches: Tensor = patchify(pixels, patch_size=vae.config.patch_size)
    return patches


def _same(before: Any, after: Any) -> bool:
    """Whether what a convolution remembers has not changed."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    return before is after


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
