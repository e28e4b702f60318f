"""Names and form of the image conditions of an image-to-video model, shared by models, data and rollouts.

`image_latents` are a mask, 1 for the first latent frame, and the encoding of a video that begins with the image and is
gray after it. `encoder_hidden_states_image` are the image's CLIP tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

IMAGE, TOKENS = "image_latents", "encoder_hidden_states_image"
MASK_CHANNELS = 4
"""One channel per video frame of a latent frame: 4 for every VAE of Wan."""


def with_mask(latents: Tensor, channels: int = MASK_CHANNELS) -> Tensor:
    """`image_latents` `[..., channels + C, F, h, w]` for the encoded image `[..., C, F, h, w]`."""
    mask = latents.new_zeros(*latents.shape[:-4], channels, *latents.shape[-3:])
    mask[..., 0, :, :] = 1
    return torch.cat([mask, latents], dim=-4)
