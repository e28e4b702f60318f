"""Determines from a configuration which image conditions an image-to-video model reads.

`image_latents` are a mask, 1 for the first latent frame, and the encoding of a video that begins with the image and is
gray after it. `encoder_hidden_states_image` are the image's CLIP tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .base import Config, noise_channels

IMAGE, TOKENS = "image_latents", "encoder_hidden_states_image"
MASK_CHANNELS = 4
"""One channel per video frame of a latent frame: 4 for every VAE of Wan."""


def reads_image(config: Config) -> bool:
    """Whether a transformer's configuration has channels for an image in addition to the noise."""
    return int(config.get("in_channels") or noise_channels(config)) > noise_channels(config)


def reads_tokens(config: Config) -> bool:
    """Whether the model also reads the image's CLIP tokens, as Wan2.1's do."""
    return config.get("image_dim") is not None


def needed_conditions(config: Config) -> tuple[str, ...]:
    """The names of the image conditions that the model reads; empty for a model that reads only text."""
    return ((IMAGE,) if reads_image(config) else ()) + ((TOKENS,) if reads_tokens(config) else ())


def refuse_last_image(config: Config) -> None:
    """Raise UsageError for a model that also reads the last image."""
    if config.get("pos_embed_seq_len") is not None:
        raise UsageError(
            "the model reads a first and a last image, which streaming does not support; use an image-to-video model "
            "that reads only the first"
        )


def with_mask(latents: Tensor, channels: int = MASK_CHANNELS) -> Tensor:
    """`image_latents` `[..., channels + C, F, h, w]` for the encoded image `[..., C, F, h, w]`."""
    mask = latents.new_zeros(*latents.shape[:-4], channels, *latents.shape[-3:])
    mask[..., 0, :, :] = 1
    return torch.cat([mask, latents], dim=-4)
