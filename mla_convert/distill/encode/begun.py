"""The latents of a video that begins with an image and is grey after it, which image-to-video models read.

The encoder of Wan's VAEs is causal and sees finitely far back: some frames after the image all latents are the same,
and a video of any length needs no more than those before, 30 of the published ones.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify
from torch import Tensor

from ...devices import bring_weights


@torch.no_grad()
def encode_begun(vae: Any, pixels: Tensor, frames: int | None) -> Tensor:
    """Latents `[1, C, f, h, w]`, float32, of a video that begins with `pixels` `[1, 3, 1, H, W]` and is 0 after them.

    They are what `vae.encode` gives for `frames` latent frames, normalised as a transformer takes them, up to the
    first after which all are the same. One latent frame is encoded at a time, with the features of those before, and
    the VAE is left as it was.
    """
    bring_weights(vae)
    mean, std = (
        torch.tensor(vae.config[key], device=vae.device).view(1, -1, 1, 1, 1) for key in ("latents_mean", "latents_std")
    )
    convolutions = sum(isinstance(module, WanCausalConv3d) for module in vae.encoder.modules())
    # A convolution in time looks two frames back, so that no more latents than this can differ on any device.
    longest = 2 * convolutions + 2
    features: list[Any] = [None] * convolutions
    given = pixels.to(vae.device, vae.dtype)
    grey = torch.zeros_like(given).expand(-1, -1, vae.config.scale_factor_temporal, -1, -1)
    made: list[Tensor] = []
    # The same algorithm at every call, so that what is the same is so to the bit.
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        while len(made) < min(longest, frames or longest):
            before = list(features)
            encoded = vae.encoder(_patches(vae, grey if made else given), feat_cache=features, feat_idx=[0])
            mode = vae.quant_conv(encoded).float().chunk(2, dim=1)[0]
            made.append((mode - mean) * (1.0 / std))
            if len(made) > 1 and all(_same(a, b) for a, b in zip(before, features, strict=True)):
                break
    return torch.cat(made, dim=2)


def _patches(vae: Any, pixels: Tensor) -> Tensor:
    if vae.config.patch_size is None:
        return pixels
    patches: Tensor = patchify(pixels, patch_size=vae.config.patch_size)
    return patches


def _same(before: Any, after: Any) -> bool:
    """Whether what a convolution remembers has not changed."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    return before is after
