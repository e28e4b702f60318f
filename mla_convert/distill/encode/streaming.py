"""Encodes a video chunk by chunk with Wan's VAE; the counterpart of `run/decode.py`.

`vae.encode` processes a video in parts, one frame first and then `scale_factor_temporal` at a time. It caches the past
features of its convolutions during one call. Here they are kept between chunks, so that encoding in chunks equals
encoding the whole video, with memory that does not grow with its length.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify
from torch import Tensor

from ...devices import bring_weights
from ..normalization import normalized


class StreamingEncoder:
    """Encodes the next pixels `[B, 3, F, H, W]` of a video to normalized latents `[B, C, f, h, w]`, float32.

    Pixels are in [-1, 1]. A latent frame takes `scale_factor_temporal` frames, the very first takes one. It is the
    mode of the VAE's distribution given the features of earlier frames. Items of a batch are encoded one by one. The
    VAE itself is not changed, so several videos may share it. Raises ValueError if frames are left over.
    """

    def __init__(self, vae: Any) -> None:
        self.vae, self.temporal = vae, int(vae.config.scale_factor_temporal)
        self.convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.encoder.modules())
        self.features: list[list[Any]] = []

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        opens, frames = not self.features, pixels.shape[2]
        sizes = ([1] if opens else []) + [self.temporal] * ((frames - opens) // self.temporal)
        if sum(sizes) != frames:
            raise ValueError(f"the VAE takes one frame and then {self.temporal} at a time, not {frames}")
        bring_weights(self.vae)
        self.features = self.features or [[None] * self.convolutions for _ in pixels]
        items = zip(pixels.split(1), self.features, strict=True)
        modes = [self._encoded(item.split(sizes, dim=2), features) for item, features in items]
        return normalized(self.vae, torch.cat(modes))

    def _encoded(self, parts: tuple[Tensor, ...], features: list[Any]) -> Tensor:
        """The modes of `parts` `[1, 3, 1 or temporal, H, W]` of one item, a latent frame each; updates `features`."""
        vae, modes = self.vae, []
        # Always use the same algorithm, so that equal inputs give bitwise equal latents.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            for part in parts:
                pixels = part.to(vae.device, vae.dtype)
                if vae.config.patch_size is not None:
                    pixels = patchify(pixels, patch_size=vae.config.patch_size)
                encoded = vae.encoder(pixels, feat_cache=features, feat_idx=[0])
                modes.append(vae.quant_conv(encoded).float().chunk(2, dim=1)[0])
        return torch.cat(modes, dim=2)

    def kept(self) -> list[Tensor]:
        """The cached features that the next chunk will read."""
        return [x for features in self.features for x in features if isinstance(x, Tensor)]
