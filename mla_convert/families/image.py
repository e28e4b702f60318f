"""Determines from a configuration which image conditions an image-to-video model reads (see `mla/image.py`)."""

from __future__ import annotations

from ..errors import UsageError
from ..mla.image import IMAGE, TOKENS
from .base import Config, noise_channels


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
