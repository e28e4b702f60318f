"""Latents into pixels chunk by chunk, with no seam between chunks: the VAE of Wan keeps its own past.

The decoder of diffusers' `AutoencoderKLWan` is causal in time: its convolutions read features of the
latent frames before, which `vae.decode` keeps for one call and then drops. Here a rollout keeps them
from chunk to chunk, so that decoding in parts is decoding the whole, at memory that does not grow with its
length: two frames of features a convolution and video, and the working memory of one latent frame. What that
comes to `decode_memory.py` counts.
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

    The first latent frame gives one frame, every other `scale_factor_temporal` of them. Items are decoded one after
    another, each with features of its own, so that the working memory is that of one. The VAE itself is left as it
    was, so that several rollouts may share it. Raises ValueError for a VAE that tiles.
    """

    def __init__(self, vae: Any) -> None:
        if vae.use_tiling:
            raise ValueError("a tiled VAE cannot decode chunk by chunk; one latent frame at a time needs no tiles")
        self.vae = vae
        self.convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self.features: list[list[Any]] = []

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        latents = denormalised(self.vae, latents)
        self.features = self.features or [[None] * self.convolutions for _ in latents]
        items = zip(latents.split(1), self.features, strict=True)
        pixels = torch.cat([self._decoded(item, features) for item, features in items])
        if self.vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self.vae.config.patch_size)
        return pixels.clamp(-1, 1)

    def _decoded(self, latents: Tensor, features: list[Any]) -> Tensor:
        """One item `[1, C, F, h, w]`, whose `features` go on."""
        made = []
        # Frame by frame, so that the chunks' borders do not even show in the rounding.
        for latent in latents.split(1, dim=2):
            first = {"first_chunk": True} if features[0] is None else {}
            latent = self.vae.post_quant_conv(latent)
            made.append(self.vae.decoder(latent, feat_cache=features, feat_idx=[0], **first))
        return torch.cat(made, dim=2)

    def kept(self) -> list[Tensor]:
        """The features that the next chunk will read."""
        return [x for features in self.features for x in features if isinstance(x, Tensor)]


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
