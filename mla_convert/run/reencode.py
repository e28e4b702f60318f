"""Encodes the last frame of a video as an image, as the first latent of what follows it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..distill.encode.models import encode_pixels
from .decode import StreamingDecoder


@torch.no_grad()
def image_latent(vae: Any, latents: Tensor) -> Tensor:
    """The latent `[B, C, 1, h, w]`, float32, of the last video frame of `latents` `[B, C, F, h, w]`, as an image.

    Both are on the transformer's scale. Wan's VAE encodes an image as the first frame of a video. `vae`, an
    `AutoencoderKLWan`, is moved to the latents' device. It computes in its own dtype, under any autocast. Videos are
    decoded one by one, a latent frame at a time, so memory does not grow with F.
    """
    vae.to(latents.device)
    # Always use the same algorithm, so that a resumed stage sees the same bytes.
    deterministic = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)
    with torch.autocast(latents.device.type, enabled=False), deterministic:
        return torch.cat([encode_pixels(vae, _last_frame(vae, video)) for video in latents.split(1)])


def _last_frame(vae: Any, latents: Tensor) -> Tensor:
    """The last video frame `[1, 3, 1, H, W]` of one video, which depends on all latents before it."""
    decode = StreamingDecoder(vae)
    for latent in latents.split(1, dim=2):
        pixels = decode(latent)
    return pixels[:, :, -1:]
