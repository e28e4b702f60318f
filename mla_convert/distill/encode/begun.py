"""Encodes a video that begins with an image and is gray after it, which image-to-video models read.

The encoder of Wan's VAEs is causal with a finite receptive field. A few frames after the image, all latents are equal,
so a video of any length needs only the latents before that: 30 with the published VAEs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .streaming import StreamingEncoder


def encode_begun(vae: Any, pixels: Tensor, frames: int | None) -> Tensor:
    """Latents `[1, C, f, h, w]`, float32, of a video that is `pixels` `[1, 3, 1, H, W]` first and then 0.

    They equal the latents of `vae.encode` for `frames` latent frames, normalized as a transformer takes them, up to the
    first that all later ones equal. One latent frame is encoded at a time, with the cached features of earlier ones.
    The VAE itself is not changed.
    """
    encoder = StreamingEncoder(vae)
    # A convolution in time looks two frames back, so at most this many latents can differ, on any device.
    longest = 2 * encoder.convolutions + 2
    gray = torch.zeros_like(pixels).expand(-1, -1, encoder.temporal, -1, -1)
    latents = [encoder(pixels)]
    while len(latents) < min(longest, frames or longest):
        before = list(encoder.features[0])
        latents.append(encoder(gray))
        if all(_same(a, b) for a, b in zip(before, encoder.features[0], strict=True)):
            break
    return torch.cat(latents, dim=2)


def _same(before: Any, after: Any) -> bool:
    """Whether the cached features of a convolution are unchanged."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    return before is after
