"""Refuses outputs that are kept in memory until their end, if they cannot fit there."""

from __future__ import annotations

from pathlib import Path

import psutil

from ..errors import UsageError
from ..sizes import format_bytes, format_count
from .start import LATENTS
from .video import scale_factor

GIF = ".gif"
KEPT_WHOLE = (LATENTS, GIF)
# The chunks of a rollout and their concatenation, float32.
_LATENT_BYTES = 2 * 4


def check_fits(
    out: Path, videos: int, latents: tuple[int, int, int, int], pixels: tuple[int, int, int], remedy: str
) -> None:
    """Raise UsageError if `videos` outputs at `out` certainly need more memory than this machine has free.

    `latents` is (C, F, H, W) and `pixels` (F, H, W) of one video before any enlargement. Only a `.safetensors` and a
    `.gif` are kept whole; the palette images of a gif take at least one byte per pixel.
    """
    suffix = out.suffix.lower()
    if suffix not in KEPT_WHOLE:
        return
    if suffix == LATENTS:
        channels, frames, height, width = latents
        needed = videos * _LATENT_BYTES * channels * frames * height * width
    else:
        frames, height, width = pixels
        needed = videos * frames * height * width * scale_factor(height, width) ** 2
    free = psutil.virtual_memory().available
    if needed > free:
        raise UsageError(
            f"a {suffix} file is kept in memory until its end, and {format_count(frames)} frames take "
            f"{format_bytes(needed)} of the {format_bytes(free)} free here; {remedy}"
        )
