"""Pixels into latents chunk by chunk, the twin of `run/decode.py`: the encoder of Wan's VAE keeps its own past.

`vae.encode` works a video off in parts of one frame and then `scale_factor_temporal` at a time, and keeps for one call
what its convolutions read of the frames before. Here that is kept from chunk to chunk, so that encoding in parts is
encoding the whole, at memory that does not grow with its length.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify
from torch import Tensor

from ...devices import bring_weights


class StreamingEncoder:
    """Latents `[B, C, f, h, w]`, float32 as a transformer takes them, of a video's next pixels `[B, 3, F, H, W]`.

    Pixels are in [-1, 1], f latent frames of `scale_factor_temporal` each, the very first of one. A latent frame is the
    mode of the VAE's distribution, made with the features of those before, one item of a batch after another. The VAE
    itself is left as it was, so that several videos may share it. Raises ValueError for frames that are left over.
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
        return torch.cat([self._encoded(item.split(sizes, dim=2), features) for item, features in items])

    def _encoded(self, parts: tuple[Tensor, ...], features: list[Any]) -> Tensor:
        """One item in `parts` `[1, 3, 1 or temporal, H, W]`, a latent frame each, whose `features` go on."""
        vae, made = self.vae, []
        mean, std = (
            torch.tensor(vae.config[key], device=vae.device).view(1, -1, 1, 1, 1)
            for key in ("latents_mean", "latents_std")
        )
        # The same algorithm at every call, so that what is the same is so to the bit.
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            for part in parts:
                given = part.to(vae.device, vae.dtype)
                if vae.config.patch_size is not None:
                    given = patchify(given, patch_size=vae.config.patch_size)
                encoded = vae.encoder(given, feat_cache=features, feat_idx=[0])
                mode = vae.quant_conv(encoded).float().chunk(2, dim=1)[0]
                made.append((mode - mean) * (1.0 / std))
        return torch.cat(made, dim=2)

    def kept(self) -> list[Tensor]:
        """The features that the next chunk will read."""
        return [x for features in self.features for x in features if isinstance(x, Tensor)]
