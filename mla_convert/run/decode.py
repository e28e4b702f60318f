"""Decodes latents to pixels chunk by chunk, without seams between chunks.

The decoder of diffusers' `AutoencoderKLWan` is causal in time: its convolutions read features of earlier latent frames,
which `vae.decode` keeps for one call only. Here a rollout keeps them from chunk to chunk, so decoding in parts equals
decoding the whole video. Memory does not grow with the length: two frames of features per convolution and video, and
the working memory of one latent frame. `decode_memory.py` computes the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify
from numpy.typing import NDArray
from torch import Tensor

from .video import denormalized, to_bytes


class StreamingDecoder:
    """Decodes the next latent chunk `[B, C, F, h, w]` of a rollout to pixels `[B, 3, F', H, W]` in [-1, 1].

    The first latent frame becomes one video frame, every other `scale_factor_temporal` frames. Items are decoded one by
    one, each with its own features, so the working memory is that of one item. The VAE itself is not changed, so
    several rollouts can share it. Raises ValueError for a VAE with tiling.
    """

    def __init__(self, vae: Any) -> None:
        if vae.use_tiling:
            raise ValueError("a VAE with tiling cannot decode chunk by chunk; call vae.disable_tiling()")
        self.vae = vae
        self.convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.decoder.modules())
        self.features: list[list[Any]] = []

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        latents = denormalized(self.vae, latents)
        self.features = self.features or [[None] * self.convolutions for _ in latents]
        items = zip(latents.split(1), self.features, strict=True)
        pixels = torch.cat([self._decoded(item, features) for item, features in items])
        if self.vae.config.patch_size is not None:
            pixels = unpatchify(pixels, patch_size=self.vae.config.patch_size)
        return pixels.clamp(-1, 1)

    def _decoded(self, latents: Tensor, features: list[Any]) -> Tensor:
        """Decode one item `[1, C, F, h, w]` and update its `features`."""
        made = []
        # Frame by frame, so that even the rounding does not depend on the chunks.
        for latent in latents.split(1, dim=2):
            first = {"first_chunk": True} if features[0] is None else {}
            latent = self.vae.post_quant_conv(latent)
            made.append(self.vae.decoder(latent, feat_cache=features, feat_idx=[0], **first))
        return torch.cat(made, dim=2)

    def kept(self) -> list[Tensor]:
        """The features that the next chunk will read."""
        return [x for features in self.features for x in features if isinstance(x, Tensor)]


def decode_chunks(chunks: Iterable[Tensor], vae: Any = None) -> Iterator[Tensor]:
    """Yield pixels `[B, C, F', H, W]` of the chunks of a rollout; without a `vae` the chunks already are pixels."""
    decoder = None if vae is None else StreamingDecoder(vae)
    for chunk in chunks:
        yield chunk if decoder is None else decoder(chunk)


def frame_chunks(chunks: Iterable[Tensor], vae: Any = None) -> Iterator[list[NDArray[np.uint8]]]:
    """Yield the frames `[F', H, W, 3]`, uint8, of each item for every chunk of a rollout; raises like `to_bytes`."""
    for pixels in decode_chunks(chunks, vae):
        yield [to_bytes(item) for item in pixels]
