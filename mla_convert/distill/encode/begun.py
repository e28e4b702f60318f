"""The latents of a video that begins with an image and is grey after it, which image-to-video models read.

The encoder of Wan's VAEs is causal and sees finitely far back: some frames after the image all latents are the same,
and a video of any length needs no more than those before, 30 of the published ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .streaming import StreamingEncoder


def encode_begun(vae: Any, pixels: Tensor, frames: int | None) -> Tensor:
    """Latents `[1, C, f, h, w]`, float32, of a video that begins with `pixels` `[1, 3, 1, H, W]` and is 0 after them.

    They are what `vae.encode` gives for `frames` latent frames, normalised as a transformer takes them, up to the
    first after which all are the same. One latent frame is encoded at a time, with the features of those before, and
    the VAE is left as it was.
    """
    encoder = StreamingEncoder(vae)
    # A convolution in time looks two frames back, so that no more latents than this can differ on any device.
    longest = 2 * encoder.convolutions + 2
    grey = torch.zeros_like(pixels).expand(-1, -1, encoder.temporal, -1, -1)
    made = [encoder(pixels)]
    while len(made) < min(longest, frames or longest):
        before = list(encoder.features[0])
        made.append(encoder(grey))
        if all(_same(a, b) for a, b in zip(before, encoder.features[0], strict=True)):
            break
    return torch.cat(made, dim=2)


def _same(before: Any, after: Any) -> bool:
    """Whether what a convolution remembers has not changed."""
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return torch.equal(before, after)
    return before is after
