"""What an image-to-video model reads of an image beside noise and text, told from its configuration.

`image_latents` are a mask, ones for the first latent frame, and the encoding of a video that begins with the image and
is grey after it; `encoder_hidden_states_image` are the image's CLIP tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UsageError
from .base import Config, noise_channels

IMAGE, TOKENS = "image_latents", "encoder_hidden_states_image"
MASK_CHANNELS = 4
"""As many as frames of a video make one of its latent: 4 of every VAE of Wan."""


def reads_image(config: Config) -> bool:
    """Whether a transformer's configuration has channels for an image beside its noise."""
    return int(config.get("in_channels") or noise_channels(config)) > noise_channels(config)


def reads_tokens(config: Config) -> bool:
    """Whether it reads the image's CLIP tokens too, as Wan2.1's do."""
    return config.get("image_dim") is not None


def needed_conditions(config: Config) -> tuple[str, ...]:
    """What a model of the configuration reads of an image, by name; nothing of one that reads text alone."""
    return ((IMAGE,) if reads_image(config) else ()) + ((TOKENS,) if reads_tokens(config) else ())


def refuse_last_image(config: Config) -> None:
    """Raise UsageError for a model that reads a second image, that of the end."""
    if config.get("pos_embed_seq_len") is not None:
        raise UsageError("the model reads a first and a last image, and a stream does not know where it ends")


def with_mask(latents: Tensor, channels: int = MASK_CHANNELS) -> Tensor:
    """`image_latents` `[..., channels + C, F, h, w]` of the encoded image `[..., C, F, h, w]`."""
    mask = latents.new_zeros(*latents.shape[:-4], channels, *latents.shape[-3:])
    mask[..., 0, :, :] = 1
    return torch.cat([mask, latents], dim=-4)
