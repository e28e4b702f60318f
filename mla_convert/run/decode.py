"""Latents into pixels chunk by chunk, with no seam between chunks: the VAE of Wan keeps its own past.

The decoder of diffusers' `AutoencoderKLWan` is causal in time: its convolutions read features of the
latent frames before, which `vae.decode` keeps for one call and then drops. Here a rollout keeps them
from chunk to chunk, so that decoding in parts is decoding the whole, at the memory of one latent frame.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from torch import Tensor

from ..errors import UsageError
from .video import Frames, denormalised, to_frames


class StreamingDecoder:
    """Pixels `[B, 3, F', H, W]` in [-1, 1] of the next latent chunk `[B, C, F, h, w]` of one rollout.

    The first latent frame gives one frame, every other `scale_factor_temporal` of them. The VAE itself
    is left as it was, so that several rollouts may share it. Raises ValueError for a VAE that tiles.
    """

    def __init__(self, vae: Any) -> None:
        if vae.use_tiling:
            raise ValueError("a tiled VAE cannot decode chunk by chunk; one latent frame at a time needs no tiles")
        self.vae = vae
        count = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self.features: list[Any] = [None] * count
        self.begun = False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        vae = self.vae
        made = []
        # Frame by frame from here on, so that the chunks' borders do not even show in the rounding.
        for latent in denormalised(vae, latents).split(1, dim=2):
            first = {} if self.begun else {"first_chunk": True}
            made.append(vae.decoder(vae.post_quant_conv(latent), feat_cache=self.features, feat_idx=[0], **first))
            self.begun = True
        pixels = torch.cat(made, dim=2)
        if vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
        return pixels.clamp(-1, 1)


def decode_chunks(chunks: Iterable[Tensor], vae: Any = None) -> Iterator[Tensor]:
    """Pixels `[B, C, F', H, W]` of the chunks of a rollout; without a `vae` they are pixels already."""
    decoder = None if vae is None else StreamingDecoder(vae)
    for chunk in chunks:
        yield chunk if decoder is None else decoder(chunk)


def frame_chunks(chunks: Iterable[Tensor], vae: Any = None) -> Iterator[list[Frames]]:
    """For every chunk of a rollout the frames `[F', H, W, 3]` of each item; raises what `to_frames` raises."""
    for pixels in decode_chunks(chunks, vae):
        yield [to_frames(item) for item in pixels]


def first_video_frame(latent_frame: int, temporal: int) -> int:
    """Number of the first video frame of a latent one, for a VAE that takes one frame and then `temporal` at a time."""
    return 0 if latent_frame == 0 else 1 + (latent_frame - 1) * temporal


def video_frames(seconds: float, fps: float) -> int:
    """The video frames of some seconds, at least one. Raises UsageError unless they are more than 0."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise UsageError(f"a video of {seconds:g} seconds has no frames; give more than 0")
    return max(1, round(seconds * fps))


def latent_frames(video_frames: int, temporal: int) -> int:
    """The fewest latent frames that make at least so many video frames."""
    return 1 + -(-(video_frames - 1) // temporal)
