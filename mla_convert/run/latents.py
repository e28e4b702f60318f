"""Computes the size, scale and length of a model's latents, and checks that they fit a VAE and a text encoder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UsageError, UserError
from ..families.base import noise_channels
from ..mla.window import causal_of
from ..zoo.digits.data import FRAME, TEXT_DIM
from .config import GenerateConfig
from .extent import video_end

DIGITS = "digits"


class LatentScale(NamedTuple):
    """The scale of latents relative to a video.

    `temporal` is the number of video frames per latent frame after the first, `spatial` the number of pixels per latent
    pixel in height and width. `size` is the default height and width of the latent.
    """

    temporal: int
    spatial: int
    size: tuple[int, int]


PIXELS = LatentScale(1, 1, (60, 104))
WAN21 = LatentScale(4, 8, (60, 104))
# The VAE of Wan2.2-TI2V-5B; 704x1280 is that model's own size.
WAN22 = LatentScale(4, 16, (44, 80))
_BY_CHANNELS = {1: PIXELS, 3: PIXELS, 48: WAN22}


def prompt_encoder(config: Any) -> str | None:
    """`digits` for a model with the embedded teacher's shapes, which needs no text encoder; otherwise None."""
    return DIGITS if config.get("text_dim") == TEXT_DIM and config.get("in_channels") == 1 else None


def latent_scale(config: Any) -> LatentScale:
    """The scale of a transformer's latents, derived from its channels; pixels are latents of scale 1."""
    return _BY_CHANNELS.get(noise_channels(config), WAN21)


def check_text_width(wide: int, config: Any, place: Path) -> None:
    """Raise UserError unless the text encoder in `place`, with `wide` numbers per token, fits the transformer."""
    wanted = config.get("text_dim")
    if wide != wanted:
        raise UserError(f"the text encoder in {place} makes {wide} numbers per token, but the model reads {wanted}")


def check_vae(vae: Any, config: Any, name: str, remedy: str) -> None:
    """Raise UserError unless a VAE's latents fit a transformer; `name` and `remedy` are for the message."""
    channels, wanted, found = noise_channels(config), latent_scale(config), vae.config
    if found.z_dim != channels:
        raise UserError(f"{name} has latents of {found.z_dim} channels, but the model makes {channels}; {remedy}")
    temporal, spatial = found.scale_factor_temporal, found.scale_factor_spatial
    if (temporal, spatial) != (wanted.temporal, wanted.spatial):
        raise UserError(
            f"a latent of {name} covers {temporal} frames of {spatial}x{spatial} pixels, but one of a model of "
            f"{channels} channels covers {wanted.temporal} frames of {wanted.spatial}x{wanted.spatial}; {remedy}"
        )


def latent_size(config: Any, generate: GenerateConfig) -> tuple[int, int]:
    """Height and width of the latent: as requested, or by default 16x16 for digits and the model's size for others."""
    height, width = (FRAME, FRAME) if prompt_encoder(config) == DIGITS else latent_scale(config).size
    return generate.latent_height or height, generate.latent_width or width


def to_latent(name: str, pixels: int, spatial: int) -> int:
    """A height or width (`name`) in latent pixels. Raises UsageError for one that the VAE cannot divide."""
    if pixels < 1 or pixels % spatial:
        near = max(spatial, round(pixels / spatial) * spatial)
        raise UsageError(f"a {name} of {pixels} is not a multiple of the VAE's {spatial}; use {near}")
    return pixels // spatial


def check_latent_size(config: Any, height: int, width: int, spatial: int = 1) -> None:
    """Raise UsageError unless a model's patches divide a latent; `spatial` is the VAE's factor to pixels."""
    _, p_h, p_w = config.get("compressed_patch_size") or config["patch_size"]
    for name, value, patch in (("height", height, p_h), ("width", width, p_w)):
        if value % patch:
            near = max(patch, round(value / patch) * patch)
            pixels = f" ({near * spatial} pixels)" if spatial > 1 else ""
            raise UsageError(
                f"a latent of {height}x{width} does not divide into patches of {p_h}x{p_w}; "
                f"use a {name} of {near}{pixels}"
            )


def check_length(config: Any, num_frames: int | None) -> None:
    """Raise UsageError if the rotary table of a model's configuration ends before `num_frames` (see `video_end`)."""
    video_end(causal_of(config), config.get("rope_max_seq_len") or 1024, num_frames)


def first_video_frame(latent_frame: int, temporal: int) -> int:
    """Index of a latent frame's first video frame, for a VAE that takes one frame and then `temporal` at a time."""
    return 0 if latent_frame == 0 else 1 + (latent_frame - 1) * temporal


def video_frames(seconds: float, fps: float) -> int:
    """The number of video frames in `seconds`, at least 1. Raises UsageError unless `seconds` is more than 0."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"a video of {seconds:g} seconds has no frames; give more than 0")
    return max(1, round(seconds * fps))


def latent_frames(video_frames: int, temporal: int) -> int:
    """The smallest number of latent frames that decode to at least `video_frames` video frames."""
    return 1 + -(-(video_frames - 1) // temporal)
